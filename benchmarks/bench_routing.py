"""Routing: `hash_route` and `group_tokens`, and `group_tokens_by_hash`, which does both for all layers at once.

The original looks up and sorts in every layer, twice, and counts by a one-hot matrix. `sort_bincount_cumsum` is the
shortest that torch can do for each layer, with nothing waiting for the device, and `sort_all_layers` our own plain
torch, one sort of small keys for all of them (on a CPU it is what `group_tokens_by_hash` runs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import Draws
from benchmarks.layers import cuda_or_skipped
from benchmarks.measuring import Case, Limit, Outputs, Provider, Requirement, Skipped, Target
from benchmarks.model import op_cost
from moebert_kernels import Grouping, backend, group_tokens, group_tokens_by_hash, hash_route, reference

TOKENS = {"cpu": (128, 1024, 4096), "cuda": (16384, 128, 4096)}
PROVIDERS = ("group_tokens_by_hash", "one_layer_at_a_time", "sort_bincount_cumsum", "original")
CUDA, IN_TORCH = "group_tokens_by_hash_cuda", ("sort_bincount_cumsum", "sort_all_layers")
AT_MOST_MS = {16384: 0.012, 128: 0.005}  # of the CUDA kernel, on an H200
SPEED = {16384: 10.0}  # over the faster of IN_TORCH


def cases(target: Target) -> list[Case]:
    shape = {"V": 100, "L": 2, "E": 4} if target.smoke else {"V": 30522, "L": 12, "E": 4}
    names = (*PROVIDERS, IN_TORCH[1], CUDA) if target.on_gpu else PROVIDERS
    return [
        Case(
            name=f"routing-T{T}",
            parameters={"op": "group_tokens_by_hash", "direction": "forward", "dtype": "int64", "T": T, **shape},
            providers=names,
            build=lambda T=T: _build(T, target, names, **shape),
            baseline="original",
            requires=_gpu_requirements(T) if target.on_gpu else (),
            cost=op_cost("group_tokens_by_hash", "forward", T=T, **shape),
        )
        for T in ((16,) if target.smoke else TOKENS[target.device.type])
    ]


def _gpu_requirements(T: int) -> tuple[Limit | Requirement, ...]:
    limits = (Limit(CUDA, AT_MOST_MS[T]),) if T in AT_MOST_MS else ()
    return (*limits, *((Requirement(CUDA, IN_TORCH, SPEED[T]),) if T in SPEED else ()))


def _build(T: int, target: Target, names: tuple[str, ...], *, V: int, L: int, E: int) -> dict[str, Provider | Skipped]:
    draws = Draws(target)
    token_ids, tables = draws.integers(V, T), draws.integers(E, L, V)

    def by_hash() -> Outputs:
        return _maps(group_tokens_by_hash(token_ids, tables, E))

    def by_hash_cuda() -> Outputs:
        with backend.use_backend("cuda", strict=True):
            return by_hash()

    def sort_all_layers() -> Outputs:
        with backend.use_backend("torch", strict=True):
            return by_hash()

    def one_layer_at_a_time() -> Outputs:
        return _maps([group_tokens(hash_route(token_ids, table), E) for table in tables])

    def sort_bincount_cumsum() -> Outputs:
        outputs: list[Tensor] = []
        positions = torch.arange(T, device=target.device)
        for table in tables:
            expert_ids = table[token_ids]
            row_to_assignment = expert_ids.sort(stable=True).indices
            counts = torch.zeros(E + 1, dtype=torch.int64, device=target.device)
            counts.index_add_(0, expert_ids + 1, torch.ones_like(expert_ids))  # bincount would wait for the device
            assignment_to_row = torch.empty_like(row_to_assignment).index_copy_(0, row_to_assignment, positions)
            outputs += [counts.cumsum(0), row_to_assignment, assignment_to_row]
        return tuple(outputs)

    def original() -> Outputs:
        outputs: list[Tensor] = []
        for table in tables:
            expert_ids = table[token_ids]
            row_to_assignment = expert_ids.argsort(stable=True)
            counts = F.one_hot(expert_ids, E).gt(0).sum(0).tolist()
            offsets = torch.tensor([0, *counts], device=target.device).cumsum(0)
            outputs += [offsets, row_to_assignment, row_to_assignment.argsort()]
        return tuple(outputs)

    def exact(dtype: torch.dtype) -> Outputs:
        return _as_float(_maps(reference.group_tokens_by_hash(token_ids, tables, E)))

    runs = {
        "group_tokens_by_hash": by_hash, "one_layer_at_a_time": one_layer_at_a_time,
        "sort_bincount_cumsum": sort_bincount_cumsum, "sort_all_layers": sort_all_layers, "original": original,
        CUDA: by_hash_cuda,
    }  # fmt: skip
    providers: dict[str, Provider | Skipped] = {name: Provider(runs[name], exact, arrange=_as_float) for name in names}
    if CUDA in names and (skipped := cuda_or_skipped("group_tokens", token_ids)):
        providers[CUDA] = skipped
    return providers


def _maps(groupings: list[Grouping]) -> Outputs:
    return tuple(t for g in groupings for t in (g.offsets, g.row_to_assignment, g.assignment_to_row))


def _as_float(outputs: Outputs) -> Outputs:
    """Whole numbers up to 2^53 are exact in float64, so that the bound on errors is less than 1: equality."""
    return tuple(tensor.double() for tensor in outputs)
