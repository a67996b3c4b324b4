"""Objectives by name, as arguments and files say them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from moebert_kernels.convert.sample_loss import is_causal
from moebert_kernels.distill.discriminator import AdversaryConfig
from moebert_kernels.distill.embedding import EmbeddingObjective, Pooling, read_pooling
from moebert_kernels.distill.microbert import MicroBertObjective
from moebert_kernels.distill.objectives import Kind, LayerwiseObjective, Objective
from moebert_kernels.distill.settings import nearest
from moebert_kernels.distill.token_objective import TokenObjective
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config


def make_objective(name: str, options: Mapping[str, Any] | None, model: nn.Module, teacher: Any = None) -> Objective:
    """An objective for a model.

    What the options leave open is taken from the model: the kind of its head, whether its losses count padding
    ("paper", where it routes padding), which token its logits predict. The pooling of "embedding" is that of the
    teacher's files.

    Args:
        name: "layerwise" (MoEBERT's), "tokens", "microbert" or "embedding".
        options: arguments of its class. A layer map's numbers may be strings, as JSON has them.
        model: the student.
        teacher: a model, its folder or name on the Hub, or None.

    Raises:
        UserError: an option that the objective does not have, or a value that it refuses.
    """
    given: dict[str, Any] = dict(options or {})
    if given.get("layer_map") is not None:
        given["layer_map"] = _layer_map(given["layer_map"])
    made: type[Objective]
    if name == "layerwise":
        route_padding = getattr(moe_config(getattr(model, "config", None)), "route_padding", False)
        given = {"kind": kind_of(model), "preset": "paper" if route_padding else "default"} | given
        made = LayerwiseObjective
    elif name == "tokens":
        given, made = {"causal": is_causal(model)} | given, TokenObjective
    elif name == "microbert":
        given, made = {"kind": kind_of(model)} | given, MicroBertObjective
        if isinstance(given.get("adversary"), Mapping):
            given["adversary"] = _made(AdversaryConfig, "adversary", given["adversary"])
    elif name == "embedding":
        made, pooling = EmbeddingObjective, given.get("pooling")
        if isinstance(pooling, Mapping):
            given["pooling"] = _made(Pooling, "pooling", pooling)
        elif pooling is None:
            given["pooling"] = _pooling_of(teacher)
    else:
        raise UserError(f"objective: expected layerwise, tokens, microbert or embedding, got {name!r}")
    return _made(made, "objective_options", given)


def kind_of(model: nn.Module) -> Kind:
    """What a model's head predicts of a sequence.

    Raises:
        UserError: it predicts something of each token, or several classes at once.
    """
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    if name.endswith("ForQuestionAnswering"):
        return "qa"
    if not name.endswith("ForSequenceClassification"):
        raise UserError(
            f"objective: expected a model for sequence classification or question answering, got {name} (objective"
            " 'tokens' follows predictions by token, 'embedding' an encoder without a head)"
        )
    if config.problem_type == "multi_label_classification":
        raise UserError(
            "objective: expected a model with one class or with scores for each sequence, got one with"
            " problem_type='multi_label_classification'"
        )
    return "regression" if config.num_labels == 1 or config.problem_type == "regression" else "classification"


def _pooling_of(teacher: Any) -> Pooling:
    name = getattr(getattr(teacher, "config", None), "_name_or_path", teacher)
    return (read_pooling(name) if name and isinstance(name, str) else None) or Pooling()


def _layer_map(pairs: Any) -> dict[int, int]:
    try:
        return {int(layer): int(followed) for layer, followed in dict(pairs).items()}
    except (TypeError, ValueError):
        raise UserError(f"layer_map: expected pairs of layers, got {pairs!r}") from None


def _made(made: Any, name: str, options: Mapping[str, Any]) -> Any:
    known = list(inspect.signature(made).parameters)
    if unknown := [option for option in options if option not in known]:
        near = nearest(unknown[0], known)
        raise UserError(f"{name}: expected names among {', '.join(known)}, got {unknown[0]!r}{near}")
    try:
        return made(**options)
    except TypeError as error:  # a value of another type
        raise UserError(f"{name}: expected arguments of {made.__name__}, got {dict(options)} ({error})") from None
