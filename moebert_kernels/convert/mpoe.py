"""Dense T5, GPT-2 or BERT -> MPOE (2203.01104): experts that share central tensors of the pretrained feed-forward."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.convert.moe import build_model
from moebert_kernels.convert.mpo import mpo_decompose
from moebert_kernels.convert.mpo_plan import check_caps, plan_factors
from moebert_kernels.convert.tables import balanced_hash_table, random_hash_table, stacked_tables
from moebert_kernels.errors import UserError
from moebert_kernels.models.mpoe import CLASSES
from moebert_kernels.models.mpoe_configuration import CONFIGS, HASH_ROUTERS
from moebert_kernels.models.mpoe_layers import Slot, ffn_size, slots
from moebert_kernels.nn.mpo_weight import check_factors

Factors = Sequence[Sequence[int]]
_ROUTER_STD = 0.02  # of a new gate: close to even, so that all experts get tokens
# what the dense configuration says of itself, not of the model to be made
_NOT_CARRIED = ("model_type", "architectures", "transformers_version")


def convert_to_mpoe(
    model: nn.Module,
    num_experts: int = 8,
    *,
    experts: str = "mpo",
    router: str = "switch",
    w1_factors: Factors | None = None,
    w2_factors: Factors | None = None,
    sites: int = 5,
    max_bond: int | Sequence[int] | None = None,
    force: bool = False,
    noise: float = 0.0,
    seed: int = 0,
    token_counts: Tensor | None = None,
    tables: Any = None,
    **config_options: Any,
) -> Any:
    """Put experts in the place of every feed-forward of a dense model, each computing what the dense one does.

    With the routers' default form the output is the dense model's, to rounding, unless `max_bond` cuts bonds or
    `noise` tells the experts apart. `model` is not changed, and torch's generators are left as they were.

    Args:
        model: a transformers model of the families t5 (mt5, umt5, longt5), gpt2 or bert (roberta, xlm-roberta,
            camembert), bare or with a head that the Auto classes know.
        num_experts: E.
        experts: "mpo", or "dense" for copies of the whole feed-forward, as in Switch Transformers.
        router: "switch", "top2", "gate-token", "hash-random" or "hash-balance".
        w1_factors, w2_factors: row and column factors of w1 (I or, with a gate, 2I; H) and w2 (H, I). None: the first
            of `plan_factors` with so many `sites`.
        max_bond: caps of the bonds, see `mpo_bonds`. Caps so low that building weights is the wrong thing to do are
            refused with the arithmetic.
        force: take any caps.
        noise: standard deviation of normal noise on each auxiliary tensor (on each expert's copy, with
            experts="dense"), relative to the root mean square of its values.
        seed: of everything random here.
        token_counts: (V,) integers, for "hash-balance"; see `count_tokens`.
        tables: (V,) or (L, V) integers in [0, E): hash tables to use as they are; layers in the order of the model.
        config_options: further fields of `MPOEOptions` (`load_balance`, `router_options`, ...).

    Returns:
        The MPOE model of the same class (`MPOET5ForConditionalGeneration` for `T5ForConditionalGeneration`), on the
        same device, in the same dtype and mode.

    Raises:
        UserError: a model that is converted already or of another family, factors that do not multiply to the shapes,
            caps below 1 or too low, factors or caps where experts have none, noise that is negative or not finite, or
            no tables and counts where they are needed.
    """
    source: Any = model
    config_class, model_class = _classes(source)
    if not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise UserError(f"noise: expected a finite number of at least 0, got {noise!r}")
    size = ffn_size(source.config)
    generator = torch.Generator().manual_seed(seed)
    fields = {name: value for name, value in source.config.to_dict().items() if name not in _NOT_CARRIED}
    fields |= {"num_experts": num_experts, "experts": experts, "router": router, "max_bond": max_bond}
    fields |= config_options | {"attn_implementation": source.config._attn_implementation}
    if unknown := sorted(set(config_options) - set(config_class().to_dict())):
        raise UserError(f"{unknown[0]}: expected an option of convert_to_mpoe or a field of MPOEOptions, got neither")
    for name, value in (("w1_factors", w1_factors), ("w2_factors", w2_factors), ("max_bond", max_bond)):
        if experts != "mpo" and value is not None:
            raise UserError(f"{name}: expected none with experts={experts!r}, got {value!r}")
    found = list(slots(source))
    if experts == "mpo":
        w1, _, w2, _ = dense_weights(found[0])
        for name, weight, factors in (("w1_factors", w1, w1_factors), ("w2_factors", w2, w2_factors)):
            if factors is None:
                plan = plan_factors(weight.shape[0], weight.shape[1], sites=sites)[0]
                factors = (plan.row_factors, plan.col_factors)
            check_factors(name, factors, tuple(weight.shape))
            if not force:
                check_caps(factors[0], factors[1], max_bond)
            fields[name] = [list(part) for part in factors]
    config = config_class(**fields)
    config.check()

    state = dict(source.state_dict())
    for slot in found:
        state |= _layer_state(state, slot, config, noise, generator)
    state |= _router_state(config, found, size.hidden_size, tables, token_counts, generator)
    options: dict[str, Any] = {"add_pooling_layer": False} if getattr(source, "pooler", 0) is None else {}
    return build_model(model_class, config, state, like=source, **options)


def to_dense_experts(model: nn.Module) -> Any:
    """Export: the same model with experts="dense", whose weights are what the shared tensors fold to.

    It computes the same with the weights of Switch-style experts, w1 (E, I or 2I, H) and w2 (E, H, I) in each layer.

    Raises:
        UserError: not an MPOE model.
    """
    source: Any = model
    if type(source).__name__ not in CLASSES:
        raise UserError(f"model: expected an MPOE model, got {type(source).__name__}")
    config = copy.deepcopy(source.config)
    config.experts, config.w1_factors, config.w2_factors, config.max_bond = "dense", None, None, None
    state = {key: value for key, value in source.state_dict().items() if not re.search(r"\.w[12]\.(central|aux)", key)}
    with torch.no_grad():
        for slot in slots(source):
            weights = slot.module.experts.weights()
            state |= {f"{slot.name}.experts.{name}": w for name, w in zip(("w1", "w2"), weights, strict=True)}
    options: dict[str, Any] = {"add_pooling_layer": False} if getattr(source, "pooler", 0) is None else {}
    return build_model(type(source), config, state, like=source, **options)


def dense_weights(slot: Slot) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w1 (I or 2I, H), gate rows first, b1, w2 (H, I) and b2 of a dense feed-forward of transformers."""
    ffn, owner = slot.module, slot.owner
    if slot.attribute == "mlp":  # Conv1D keeps (in, out)
        return ffn.c_fc.weight.T, ffn.c_fc.bias, ffn.c_proj.weight.T, ffn.c_proj.bias
    if slot.attribute == "intermediate":
        second: Any = owner.output
        return ffn.dense.weight, ffn.dense.bias, second.dense.weight, second.dense.bias
    w1 = torch.cat([ffn.wi_0.weight, ffn.wi_1.weight]) if hasattr(ffn, "wi_0") else ffn.wi.weight
    return w1, None, ffn.wo.weight, None


def _classes(model: Any) -> tuple[Any, Any]:
    if isinstance(getattr(model, "config", None), tuple(CONFIGS.values())):
        raise UserError(f"model: expected a dense model, got {type(model).__name__}, which has experts already")
    config_class = CONFIGS.get(type(getattr(model, "config", None)))
    model_class = CLASSES.get(f"MPOE{type(model).__name__}")
    if config_class is None or model_class is None:
        families = ", ".join(config.model_type for config in CONFIGS)
        raise UserError(
            f"model: expected one of the families {families} with a common head, got {type(model).__name__}"
        )
    return config_class, model_class


def _layer_state(
    state: dict[str, Tensor], slot: Slot, config: Any, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of one layer's experts; the dense ones leave `state`."""
    w1, b1, w2, b2 = (None if t is None else t.detach() for t in dense_weights(slot))
    assert w1 is not None and w2 is not None
    dense = (slot.name, f"{slot.name.rpartition('.')[0]}.output.dense")[: 2 if slot.attribute == "intermediate" else 1]
    for key in [key for key in state if key.startswith(tuple(f"{name}." for name in dense))]:
        del state[key]
    E, made = config.num_experts, {}

    def expand(tensor: Tensor) -> Tensor:
        copies = tensor.expand(E, *tensor.shape)
        if not noise:
            return copies
        drawn = torch.randn(copies.shape, generator=generator).to(tensor)
        return copies + noise * tensor.float().square().mean().sqrt().to(tensor) * drawn

    for name, weight, factors in (("w1", w1, config.w1_factors), ("w2", w2, config.w2_factors)):
        if config.experts == "dense":
            made[name] = expand(weight)
            continue
        sites = mpo_decompose(weight, factors[0], factors[1], config.max_bond).sites
        middle = (len(sites) - 1) // 2
        made[f"{name}.central"] = sites[middle]
        for k, site in enumerate((*sites[:middle], *sites[middle + 1 :])):
            made[f"{name}.aux.{k}"] = expand(site)
    for name, bias in (("b1", b1), ("b2", b2)):
        if bias is not None:
            made[name] = bias.expand(E, -1) if config.expert_bias == "expert" else bias
    return {f"{slot.name}.experts.{name}": tensor for name, tensor in made.items()}


def _router_state(
    config: Any,
    found: list[Slot],
    hidden_size: int,
    tables: Any,
    token_counts: Tensor | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    names, V, E = [f"{slot.name}.router." for slot in found], config.vocab_size, config.num_experts
    if config.router not in HASH_ROUTERS:
        if tables is not None:
            raise UserError(f"tables: expected none with router={config.router!r}, got some")
        state = {n + "gate.weight": torch.randn(E, hidden_size, generator=generator) * _ROUTER_STD for n in names}
        return state | ({n + "gate.bias": torch.zeros(E) for n in names} if config.router == "switch" else {})
    if tables is None and config.router == "hash-random":
        tables = torch.stack([random_hash_table(V, E, generator) for _ in names])
    elif tables is None:
        if token_counts is None or token_counts.shape != (V,):
            got = "none" if token_counts is None else tuple(token_counts.shape)
            raise UserError(f"token_counts: expected shape (V={V},) with router='hash-balance', got {got}")
        tables = balanced_hash_table(token_counts, E, seed=generator.initial_seed())
    return {n + "table": table for n, table in zip(names, stacked_tables(tables, len(names), V, E), strict=True)}
