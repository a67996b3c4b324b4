"""A dense BERT or RoBERTa-style model -> a task-routed MoEBERT, with a head for each task or with the dense one's head.

Before training the MoE computes what the dense model does, as far as its chosen experts hold the neurons: a router that
starts with equal probabilities 1/E multiplies the outputs of top_k experts by 1/E each, so what the experts copy is
scaled by the inverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from moebert_kernels.convert.encoders import dense_ffns, encoder_style
from moebert_kernels.convert.moe import (
    build_model,
    expert_weights,
    moe_config,
    moe_state,
    pop_ffn,
    ranking,
)
from moebert_kernels.convert.mpo import mpo_decompose
from moebert_kernels.convert.mpo_plan import check_caps, plan_factors
from moebert_kernels.convert.split import check_split, expert_indices
from moebert_kernels.errors import UserError
from moebert_kernels.models import MoEBertConfig, MoEBertForMultiTaskClassification
from moebert_kernels.models.configuration import TASK_ROUTER

EXPERTS = ("importance", "copy", "mpo")


def convert_to_task_moe(
    model: nn.Module,
    tasks: Mapping[str, Sequence[str]] | Sequence[str],
    num_experts: int = 4,
    top_k: int | None = None,
    *,
    experts: str = "importance",
    importance: Tensor | None = None,
    expert_size: int | None = None,
    shared: int = 0,
    norm: str = "layer",
    router_noise: float = 0.02,
    seed: int = 0,
    **config_options: Any,
) -> Any:
    """Return a MoE model whose layers route by task; `model` is not changed.

    Args:
        model: as for `convert_to_moe`.
        tasks: name -> its classes, none for a score: the result has a new head for each. Or names alone: the result
            keeps the head of `model`, common to all tasks.
        num_experts, top_k: E, and experts per task. None: 2, or 1 with norm="expert".
        experts: "importance" splits the neurons as `convert_to_moe` does; "copy" makes each expert the whole layer
            (sparse upcycling, 2212.05055); "mpo" too, with a central tensor of each matrix shared by all (MPOE,
            2203.01104).
        importance: (L, D) scores; None: a random ranking, with a warning. Read for "importance" alone.
        expert_size, shared: the split, see `expert_indices`; for "importance" alone. None: D / E neurons, so that none
            is lost.
        norm: "layer": one LayerNorm around the experts; "expert": one in each, at top_k = 1.
        router_noise: standard deviation of the routers' first logits. They decide which experts a task starts with; 0
            gives all tasks the same ones.
        seed: of everything random here.
        config_options: further fields of MoEBertConfig; with "mpo" also `w1_factors`, `w2_factors` and `max_bond`
            (without them: the first of `plan_factors`, no caps).

    Returns:
        The model, on the same device, in the same dtype and mode.

    Raises:
        UserError: as `convert_to_moe`; no tasks, an unknown kind of experts, a size that copies cannot have.
    """
    ffns = dense_ffns(model)
    source = cast(Any, model)
    D, E = ffns[0].first.out_features, num_experts
    if experts not in EXPERTS:
        raise UserError(f"experts: expected one of {', '.join(EXPERTS)}, got {experts!r}")
    if not router_noise >= 0:
        raise UserError(f"router_noise: expected a number of at least 0, got {router_noise!r}")
    for name in ("w1_factors", "w2_factors", "max_bond"):
        if experts != "mpo" and config_options.get(name) is not None:
            raise UserError(f"{name}: expected none with experts={experts!r}, got {config_options[name]}")
    if experts != "importance":
        if expert_size not in (None, D):
            raise UserError(
                f"expert_size: expected none, or the dense layer's {D} neurons, with experts={experts!r},"
                f" got {expert_size}"
            )
        expert_size, shared, scores = D, D, torch.zeros(len(ffns), D)
    else:
        expert_size = D // max(E, 1) if expert_size is None else expert_size
        check_split(D, E, expert_size, shared)
        scores = ranking(model, importance, seed)
    indices = expert_indices(scores, E, expert_size, shared)

    if experts == "mpo":
        H = source.config.hidden_size
        max_bond = config_options.get("max_bond")
        for name, rows, columns in (("w1_factors", D, H), ("w2_factors", H, D)):
            plan = plan_factors(rows, columns, max_bond=max_bond)[0]
            config_options.setdefault(name, [list(plan.row_factors), list(plan.col_factors)])
            row_factors, col_factors = config_options[name]
            check_caps(row_factors, col_factors, max_bond)
    config = moe_config(
        source.config.to_dict(), attn_implementation=source.config._attn_implementation, style=encoder_style(model),
        router=TASK_ROUTER, tasks=list(tasks), num_experts=E, expert_size=expert_size, shared=shared, top_k=top_k,
        norm=norm, task_labels={t: list(names) for t, names in tasks.items()} if isinstance(tasks, Mapping) else None,
        **config_options,
    )  # fmt: skip
    moe_class, prefix, state = moe_state(model)
    if config.task_labels is not None:
        state = _without_head(state, prefix, config.style)
        moe_class, prefix = MoEBertForMultiTaskClassification, "moebert."
    generator = torch.Generator().manual_seed(seed)
    for layer in range(len(ffns)):
        base = f"{prefix}encoder.layer.{layer}."
        w1, b1, w2, b2, norm_weight, norm_bias = pop_ffn(state, base)
        weights = _scaled(expert_weights(w1, b1, w2, b2, norm_weight, norm_bias, indices[layer]), config)
        if experts == "mpo":
            weights |= _decomposed(weights.pop("w1"), "w1", config) | _decomposed(weights.pop("w2"), "w2", config)
        state |= {f"{base}experts.{name}": tensor for name, tensor in weights.items()}
        state[f"{base}router.logits"] = torch.randn(len(config.tasks or ()), E, generator=generator) * router_noise
    # what a dense model without this head does not have
    new = ("classifier.", "moebert.pooler.") if config.task_labels is not None else ()
    options: dict[str, Any] = {} if prefix or source.pooler is not None else {"add_pooling_layer": False}
    return build_model(moe_class, config, state, like=source, new=new, seed=seed, **options)


def _scaled(weights: dict[str, Tensor], config: MoEBertConfig) -> dict[str, Tensor]:
    """The experts' weights for routing weights of 1/E each: neurons that all of the top_k experts have add up."""
    E, shared, top_k = config.num_experts, config.shared, config.top_k or 1
    if config.norm == "expert":
        return weights | {name: weights[name] * E for name in ("norm_weight", "norm_bias")}
    w2 = torch.cat([weights["w2"][..., :shared] * (E / top_k), weights["w2"][..., shared:] * E], dim=-1)
    norms = {name: weights[name][0] for name in ("norm_weight", "norm_bias")}
    return weights | norms | {"w2": w2, "b2": weights["b2"] * (E / top_k)}


def _decomposed(copies: Tensor, name: str, config: MoEBertConfig) -> dict[str, Tensor]:
    """The sites of an `MPOWeight` of equal experts (E, rows, columns), by key."""
    row_factors, col_factors = getattr(config, f"{name}_factors")
    sites = list(mpo_decompose(copies[0], row_factors, col_factors, config.max_bond).sites)
    central = sites.pop((len(sites) - 1) // 2)
    aux = {f"{name}.aux.{k}": site.expand(len(copies), *site.shape) for k, site in enumerate(sites)}
    return {f"{name}.central": central, **aux}


def _without_head(state: dict[str, Tensor], prefix: str, style: str) -> dict[str, Tensor]:
    """The encoder's weights, and those of RoBERTa's head that all tasks share."""
    if not prefix:  # RoBERTa's head takes the place of its pooler
        kept = [key for key in state if style == "bert" or not key.startswith("pooler.")]
        return {f"moebert.{key}": state[key] for key in kept}
    return {key: tensor for key, tensor in state.items() if key.startswith((prefix, "classifier.dense."))}
