"""The tensors of layers made from dense feed-forwards: experts, norms, routers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.convert.mpo import mpo_decompose
from moebert_kernels.convert.sites import DenseWeights, Site, common_width
from moebert_kernels.convert.split import expert_indices
from moebert_kernels.convert.tables import balanced_hash_table, random_hash_table, stacked_tables
from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import MoEConfig
from moebert_kernels.layers.routing import stack_of

_GATE_STD = 0.02  # of new gates and tasks' logits: close to even, so that all experts get tokens


def expert_state(
    config: MoEConfig, dense: DenseWeights, site: Site, indices: Tensor | None, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of a layer's experts and norm, by their names in the layer.

    Args:
        indices: (E, I) neurons of each expert, with experts="split".
        noise: as for `convert_to_moe`, drawn from `generator`.
    """
    E, made = config.num_experts, {}
    if config.is_task_routed and config.norm == "layer":  # of top_k experts each has the probability 1 / E
        scale = E / config.experts_per_token
        dense = dense._replace(w2=dense.w2 * scale, b2=None if dense.b2 is None else dense.b2 * scale)

    def copies(tensor: Tensor) -> Tensor:
        expanded = tensor.expand(E, *tensor.shape)
        if not noise:
            return expanded
        drawn = torch.randn(expanded.shape, generator=generator).to(tensor)
        return expanded + noise * tensor.float().square().mean().sqrt().to(tensor) * drawn

    biases = {"b1": dense.b1, "b2": dense.b2}
    if (dense.b1 is None) != (dense.b2 is None):
        raise UserError(f"model: expected both or none of the biases in {site.name}, got one")
    if indices is not None:
        rows = indices if len(dense.w1) == dense.w2.shape[1] else torch.cat([indices, indices + dense.w2.shape[1]], 1)
        flat_rows, flat = rows.flatten().to(dense.w1.device), indices.flatten().to(dense.w1.device)
        made["w1"] = dense.w1.index_select(0, flat_rows).unflatten(0, rows.shape)
        made["w2"] = (
            dense.w2.index_select(1, flat).unflatten(1, indices.shape).transpose(0, 1)
        )  # (H, E, I) -> (E, H, I)
        if config.is_task_routed and config.norm == "layer":  # a neuron of one expert is not added up
            made["w2"] = made["w2"].clone()
            made["w2"][..., config.num_shared_neurons :] *= config.experts_per_token
        if dense.b1 is not None:
            made["b1"] = dense.b1.index_select(0, flat_rows).unflatten(0, rows.shape)
            made["b2"] = dense.b2.expand(E, -1)
    else:
        for name, weight, factors in (("w1", dense.w1, config.w1_factors), ("w2", dense.w2, config.w2_factors)):
            if config.experts == "copy":
                made[name] = copies(weight)
                continue
            assert factors is not None  # `resolved` chose them
            parts = mpo_decompose(weight, factors[0], factors[1], config.max_bond).sites
            middle = (len(parts) - 1) // 2
            made[f"{name}.central"] = parts[middle]
            for k, part in enumerate((*parts[:middle], *parts[middle + 1 :])):
                made[f"{name}.aux.{k}"] = copies(part)
        for name, bias in biases.items():
            if bias is not None:
                made[name] = bias.expand(E, -1) if config.expert_bias == "expert" else bias
    if config.norm == "expert":
        scale = E if config.is_task_routed else 1
        made |= {
            "norm_weight": scale * site.norm.weight.detach().expand(E, -1),
            "norm_bias": scale * site.norm.bias.detach().expand(E, -1),
        }
    state = {f"experts.{name}": tensor for name, tensor in made.items()}
    if config.norm == "layer" and site.norm is not None:
        state |= {f"norm.{name}": tensor for name, tensor in site.norm.state_dict().items()}
    return state


def split_of(
    config: MoEConfig, sites: list[Site], importance: Tensor | None, generator: torch.Generator
) -> list[Tensor]:
    """(E, I) neurons of the experts of each layer."""
    shape = (len(sites), common_width(sites))
    if importance is None:
        warnings.warn("no importance scores given: neurons are ranked at random (pass importance=)", stacklevel=3)
        importance = torch.rand(shape, generator=generator)
    if importance.shape != shape:
        raise UserError(f"importance: expected shape (L={shape[0]}, D={shape[1]}), got {tuple(importance.shape)}")
    size, shared = config.expert_size, config.num_shared_neurons
    assert size is not None and shared is not None  # `resolved` chose them
    return list(expert_indices(importance.detach().cpu(), config.num_experts, size, shared))


def router_states(
    model: Any,
    config: MoEConfig,
    sites: list[Site],
    generator: torch.Generator,
    token_counts: Tensor | None,
    tables: Any,
) -> list[dict[str, Tensor]]:
    """The tensors of each layer's router, by their names in the layer."""
    E = config.num_experts
    if not config.is_hash_routed:
        if tables is not None:
            raise UserError(f"tables: expected none with router={config.router!r}, got some")
        H = sites[0].weights().w2.shape[0]
        if config.is_task_routed:
            shape = (len(config.tasks or ()), E)
            return [{"router.logits": torch.randn(shape, generator=generator) * _GATE_STD} for _ in sites]
        gates = [{"router.gate.weight": torch.randn(E, H, generator=generator) * _GATE_STD} for _ in sites]
        return [gate | {"router.gate.bias": torch.zeros(E)} for gate in gates] if config.router == "switch" else gates
    V = stack_of(model, sites[0].name).get_input_embeddings().num_embeddings
    if tables is None and config.router == "hash-random":
        tables = torch.stack([random_hash_table(V, E, generator) for _ in sites])
    elif tables is None:
        if token_counts is None or token_counts.shape != (V,):
            got = "none" if token_counts is None else tuple(token_counts.shape)
            raise UserError(f"token_counts: expected shape (V={V},) with router='hash-balance', got {got}")
        tables = balanced_hash_table(token_counts, E, seed=generator.initial_seed())
    return [{"router.table": table} for table in stacked_tables(tables, len(sites), V, E)]
