"""How to factor a weight for `mpo_decompose`: a proposal, and a check of the caps on its bonds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, permutations

from moebert_kernels.errors import UserError
from moebert_kernels.nn.mpo_weight import mpo_bonds

MAX_SITES = 6  # all orders of the factors are tried
# (rows, columns) -> row factors, column factors of MPOE's T5 and GPT-2, and of its attention
PUBLISHED = {
    (3072, 768): ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)),
    (768, 3072): ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4)),
    (4096, 1024): ((4, 4, 8, 8, 4), (4, 4, 4, 4, 4)),
    (1024, 4096): ((4, 4, 4, 4, 4), (4, 4, 8, 8, 4)),
    (768, 768): ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)),
}


@dataclass(frozen=True)
class FactorPlan:
    """One way to factor a (rows, columns) matrix, and what it makes; the central tensor is the middle one.

    Attributes:
        row_factors, col_factors: as `mpo_decompose` takes them.
        bonds: (D_1, ..., D_n+1).
    """

    row_factors: tuple[int, ...]
    col_factors: tuple[int, ...]
    bonds: tuple[int, ...]

    @property
    def central_site(self) -> int:
        return (len(self.row_factors) - 1) // 2

    @property
    def parameters(self) -> tuple[int, ...]:
        """The parameters of each site tensor."""
        return tuple(
            before * i * j * after
            for i, j, (before, after) in zip(self.row_factors, self.col_factors, pairwise(self.bonds), strict=True)
        )

    @property
    def central_parameters(self) -> int:
        return self.parameters[self.central_site]

    @property
    def aux_parameters(self) -> int:
        """The parameters that every further expert adds."""
        return sum(self.parameters) - self.central_parameters


def plan_factors(rows: int, columns: int, sites: int = 5, max_bond: int | Sequence[int] | None = None) -> FactorPlan:
    """Return factors of a (rows, columns) matrix: what MPOE used for the shape, if it did, else the best by our rule.

    The rule: factors as equal as the sizes allow, in the order that gives the smallest auxiliary tensors, which is also
    the one that takes the fewest operations to multiply up.

    Args:
        rows, columns: of the matrix, >= 1.
        sites: n, 2 to 6.
        max_bond: caps, as for `mpo_decompose`.

    Raises:
        UserError: a number out of range.
    """
    if not 2 <= sites <= MAX_SITES:
        raise UserError(f"sites: expected 2 to {MAX_SITES}, got {sites}")
    for name, value in (("rows", rows), ("columns", columns)):
        if value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    if sites == 5 and (rows, columns) in PUBLISHED:
        i, j = PUBLISHED[rows, columns]
        return FactorPlan(i, j, mpo_bonds(i, j, max_bond))
    plans = {
        FactorPlan(i, j, mpo_bonds(i, j, max_bond))
        for i in set(permutations(_balanced(rows, sites)))
        for j in set(permutations(_balanced(columns, sites)))
    }
    return min(plans, key=lambda plan: (plan.aux_parameters, plan.row_factors, plan.col_factors))


def _balanced(size: int, count: int) -> tuple[int, ...]:
    """`count` factors of `size` whose logarithms differ least."""
    return min(_factorisations(size, count, 1), key=lambda factors: sum(math.log(f) ** 2 for f in factors))


def _factorisations(size: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    """Ascending factors, none below `least`."""
    if count == 1:
        if size >= least:
            yield (size,)
        return
    for factor in _divisors(size):
        if factor >= least and factor**count <= size:
            for rest in _factorisations(size // factor, count - 1, factor):
                yield (factor, *rest)


@cache
def _divisors(size: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, size + 1) if size % d == 0)


def chain_flops_per_token(
    row_factors: Sequence[int], col_factors: Sequence[int], max_bond: int | Sequence[int] | None = None
) -> int:
    """FLOPs of W x for one x by contracting x with one site tensor after the other, from the better end."""
    bonds = mpo_bonds(row_factors, col_factors, max_bond)
    forwards = _chain_flops(row_factors, col_factors, bonds)
    return min(forwards, _chain_flops(row_factors[::-1], col_factors[::-1], bonds[::-1]))


def _chain_flops(row_factors: Sequence[int], col_factors: Sequence[int], bonds: Sequence[int]) -> int:
    total, made, left = 0, 1, math.prod(col_factors)
    for i, j, (before, after) in zip(row_factors, col_factors, pairwise(bonds), strict=True):
        left //= j
        total += 2 * made * before * i * j * after * left
        made *= i
    return total


def check_caps(
    row_factors: Sequence[int], col_factors: Sequence[int], max_bond: int | Sequence[int] | None = None
) -> None:
    """Refuse caps at which multiplying x by the chain is cheaper than by the weight, which this package always builds.

    `convert_to_moe` calls it before it decomposes a weight, unless `force` is given.

    Raises:
        UserError: the caps are too low; the message shows both FLOP counts.
    """
    chain = chain_flops_per_token(row_factors, col_factors, max_bond)
    dense = 2 * math.prod(row_factors) * math.prod(col_factors)
    if chain < dense:
        bonds = ",".join(map(str, mpo_bonds(row_factors, col_factors, max_bond)))
        raise UserError(
            f"max_bond: expected caps at which building the weight pays, got bonds {bonds}: {chain:,} FLOPs per token "
            f"from site to site, {dense:,} with the weight ({chain / dense:.2f} times)"
        )
