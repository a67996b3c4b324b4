"""Routing: `hash_route` and `group_tokens`, and `group_tokens_by_hash`, which does both for all layers at once.

The original looks up and sorts in every layer, twice, and counts by a one-hot matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import Case, Outputs, Provider, Target
from moebert_kernels import Grouping, group_tokens, group_tokens_by_hash, hash_route, reference

TOKENS = (128, 1024, 4096)
PROVIDERS = ("group_tokens_by_hash", "one_layer_at_a_time", "original")


def cases(target: Target) -> list[Case]:
    smoke = target.smoke
    shape = {"V": 100, "L": 2, "E": 4} if smoke else {"V": 30522, "L": 12, "E": 4}
    return [
        Case(
            name=f"routing-T{T}",
            parameters={"T": T, **shape},
            providers=PROVIDERS,
            build=lambda T=T: _build(T, **shape),
            baseline="original",
        )
        for T in ((16,) if smoke else TOKENS)
    ]


def _build(T: int, *, V: int, L: int, E: int) -> dict[str, Provider]:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, V, (T,), generator=generator)
    tables = torch.randint(0, E, (L, V), generator=generator)

    def one_layer_at_a_time() -> Outputs:
        return _maps([group_tokens(hash_route(token_ids, table), E) for table in tables])

    def original() -> Outputs:
        outputs: list[Tensor] = []
        for table in tables:
            expert_ids = table[token_ids]
            row_to_token = expert_ids.argsort(stable=True)
            counts = F.one_hot(expert_ids, E).gt(0).sum(0).tolist()
            outputs += [torch.tensor([0, *counts]).cumsum(0), row_to_token, row_to_token.argsort()]
        return tuple(outputs)

    def exact(dtype: torch.dtype) -> Outputs:
        return _as_float(_maps(reference.group_tokens_by_hash(token_ids, tables, E)))

    runs = {
        "group_tokens_by_hash": lambda: _maps(group_tokens_by_hash(token_ids, tables, E)),
        "one_layer_at_a_time": one_layer_at_a_time,
        "original": original,
    }
    return {name: Provider(run, exact, arrange=_as_float) for name, run in runs.items()}


def _maps(groupings: list[Grouping]) -> Outputs:
    return tuple(t for g in groupings for t in (g.offsets, g.row_to_token, g.token_to_row))


def _as_float(outputs: Outputs) -> Outputs:
    """Whole numbers up to 2^53 are exact in float64, so that the bound on errors is less than 1: equality."""
    return tuple(tensor.double() for tensor in outputs)


def test_routing(case, provider, run_provider):
    run_provider(case, provider)
