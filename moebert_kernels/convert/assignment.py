"""Token ids to experts at the least error, no expert with more tokens than its room: a transportation problem."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SWEEPS = 20  # over the experts' prices, which settle in about ten


class Assignment(NamedTuple):
    """Expert of each type (n,) int64, and the prices (E,) of the experts' places in units of the error."""

    expert: Tensor
    prices: Tensor


def balanced_assignment(errors: Tensor, counts: Tensor, max_load: float) -> Assignment:
    """Give each type of token an expert so that the summed error is small and no expert gets too many tokens.

    The dual of the transportation problem: a place in expert e has a price, and each type takes the expert of the least
    error plus price. Prices rise, one expert after the other, until nobody has too much (coordinate ascent). What
    types of many tokens leave over is moved one by one, at the least extra error for a token.

    Args:
        errors: (n, E) mean error of a token of each type with each expert.
        counts: (n,) tokens of each type, at least 0.
        max_load: the most tokens of an expert, relative to the E-th part of all, at least 1. A type that has more
            tokens than that has an expert for itself.

    Returns:
        The assignment. Types without tokens take the expert of the least error plus price.
    """
    errors, counts = errors.double().cpu(), counts.double().cpu()
    E = errors.shape[1]
    room = max(max_load * float(counts.sum()) / E, float(counts.max()) if len(counts) else 0.0)
    prices = torch.zeros(E, dtype=torch.float64)
    for _ in range(_SWEEPS):
        before = prices.clone()
        for e in range(E):
            prices[e] = _price(errors, counts, prices, e, room)
        if torch.equal(prices, before):
            break
    return Assignment(_moved((errors + prices).argmin(1), errors, counts, room), prices)


def _price(errors: Tensor, counts: Tensor, prices: Tensor, e: int, room: float) -> float:
    """The least price of expert e, at least 0, at which no more tokens than its room want it."""
    if len(prices) == 1 or len(errors) == 0:
        return 0.0
    others = (errors + prices).index_fill(1, torch.tensor([e]), torch.inf).min(1).values
    gain = others - errors[:, e]  # a type wants e while its price is less
    order = gain.argsort(descending=True, stable=True)
    too_many = torch.nonzero(counts[order].cumsum(0) > room * (1 + 1e-9))
    return 0.0 if len(too_many) == 0 else max(0.0, float(gain[order[too_many[0, 0]]]))


def _moved(expert: Tensor, errors: Tensor, counts: Tensor, room: float) -> Tensor:
    """Move types out of experts that have too much, those of the least extra error for a token first."""
    expert, E = expert.clone(), errors.shape[1]
    loads = _loads(expert, counts, E)
    for e in loads.argsort(descending=True).tolist():
        if loads[e] <= room:
            continue
        inside = torch.nonzero((expert == e) & (counts > 0)).flatten()
        extra = errors[inside] - errors[inside, e, None]
        extra[:, e] = torch.inf
        for n in extra.min(1).values.argsort(stable=True).tolist():
            if loads[e] <= room:
                break
            kind = int(inside[n])
            cost = torch.where(loads + counts[kind] <= room, extra[n], torch.inf)
            to = int(cost.argmin())
            if not torch.isfinite(cost[to]):
                continue
            expert[kind] = to
            loads[e] -= counts[kind]
            loads[to] += counts[kind]
    return expert


def _loads(expert: Tensor, counts: Tensor, E: int) -> Tensor:
    return torch.zeros(E, dtype=torch.float64).index_add_(0, expert, counts)
