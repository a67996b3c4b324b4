"""A task-routed MoE -> the dense model that it is for one task, to be served by transformers alone."""

from __future__ import annotations

from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from moebert_kernels.convert.moe import build_model, ffn_names, renamed_key
from moebert_kernels.errors import UserError
from moebert_kernels.models import MoEBertConfig, MoEBertForMultiTaskClassification
from moebert_kernels.nn import MoEFeedForward

_CONFIGS: dict[str, Any] = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}


def collapse(model: nn.Module, task: str) -> Any:
    """Return the plain BERT or RoBERTa that computes what a task-routed model computes for `task`.

    A task's routing weights g are numbers, so its experts add up to one dense layer, for any activation by element:
    w1 = [w1_e], b1 = [b1_e], w2 = [g_e w2_e], b2 = sum_e g_e b2_e over the top_k chosen experts, of width top_k * I.
    With a norm per expert (top_k = 1) the probability goes into that norm: g LayerNorm(.) has weight g w and bias g b.
    All layers have the same width, since I and top_k belong to the whole model.

    Args:
        model: a MoEBERT with router="task", with any head; not changed. Of MoEBertForMultiTaskClassification the task's
            own head is kept.
        task: one of `model.config.tasks`.

    Returns:
        A BertModel or BertFor... (RobertaModel, RobertaFor... with style="roberta") with the same embeddings, pooler
        and label names, on the same device, in the same dtype and mode. Its dropout is `hidden_dropout_prob`.

    Raises:
        UserError: a model that does not route by task (hash tables, gates, a dense one), or a task that it lacks.
    """
    source = cast(Any, model)
    config = getattr(model, "config", None)
    if not isinstance(config, MoEBertConfig):
        raise UserError(
            f"model: expected a MoEBERT with router='task', got a {type(model).__name__}, which is no MoEBERT"
        )
    if not config.is_task_routed:
        raise UserError(f"model: expected a MoEBERT with router='task', got router={config.router!r}, by tokens")
    task_id = config.task_id(task)

    whole = source.state_dict()
    state = {
        renamed_key(key, "moebert", config.style): t
        for key, t in whole.items()
        if not {"experts", "router"} & {*key.split(".")}
    }
    prefix = "" if source.base_model is source else f"{config.style}."
    for number, layer in enumerate(source.base_model.encoder.layer):
        chosen, probabilities = layer.router.chosen()
        names = ffn_names(f"{prefix}encoder.layer.{number}.")
        state |= zip(names, _dense_layer(layer.experts, chosen[task_id], probabilities[task_id]), strict=True)

    name = type(model).__name__.replace("MoEBert", "Bert" if config.style == "bert" else "Roberta")
    labels = {"id2label": config.id2label, "label2id": config.label2id}
    if isinstance(model, MoEBertForMultiTaskClassification):
        name = name.replace("ForMultiTaskClassification", "ForSequenceClassification")
        head = "classifier.out_proj" if config.style == "roberta" else "classifier"
        state |= {key: state[key][model.rows_of(task_id)] for key in (f"{head}.weight", f"{head}.bias")}
        classes = (config.task_labels or {})[task] or ["LABEL_0"]  # transformers' name for a score
        labels = {"id2label": dict(enumerate(classes)), "label2id": {c: number for number, c in enumerate(classes)}}
    dense_config = _dense_config(config, **labels)
    options: dict[str, Any] = {} if prefix or source.pooler is not None else {"add_pooling_layer": False}
    return build_model(getattr(transformers, name), dense_config, state, like=source, **options)


def _dense_config(config: MoEBertConfig, **options: Any) -> Any:
    """What transformers' own configuration class has a field for, with the width of the chosen experts together."""
    config_class = _CONFIGS[config.style]
    known = config_class().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    fields |= {"intermediate_size": (config.top_k or 1) * config.expert_size}
    return config_class(**fields | options, attn_implementation=config._attn_implementation)


def _dense_layer(experts: MoEFeedForward, chosen: Tensor, probabilities: Tensor) -> list[Tensor]:
    """w1, b1, w2, b2, norm's weight and bias of one dense layer; sums and products in float64, rounded once."""
    dtype, g = experts.b1.dtype, probabilities.double()
    all_w1, all_w2 = experts.weights()
    w1, b1, w2, b2 = (p.detach()[chosen] for p in (all_w1, experts.b1, all_w2, experts.b2))
    if experts.norm == "expert":
        norms = [norm.detach()[chosen[0]].double() * g[0] for norm in (experts.norm_weight, experts.norm_bias)]
        g = torch.ones_like(g)
    else:
        norms = [experts.norm_weight.detach(), experts.norm_bias.detach()]
    w2 = w2.double() * g[:, None, None]  # (k, H, I)
    b2 = (b2.double() * g[:, None]).sum(0)
    dense = [w1.flatten(0, 1), b1.flatten(), w2.transpose(0, 1).flatten(1), b2, *norms]
    return [tensor.to(dtype) for tensor in dense]
