"""Matrix-product-operator (MPO) decomposition of a weight: MPOE (2203.01104), after MPOP (2106.02205), appendix.

A matrix of prod i_k rows and prod j_k columns becomes n site tensors T_k (D_k, i_k, j_k, D_k+1) with D_1 = D_n+1 = 1:

    W[(i_1 .. i_n), (j_1 .. j_n)] = T_1[i_1, j_1] T_2[i_2, j_2] ... T_n[i_n, j_n]        (products of matrices)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moebert_kernels.errors import UserError
from moebert_kernels.nn.mpo_weight import mpo_bonds


@dataclass(frozen=True)
class MPODecomposition:
    """Site tensors of a matrix, and what cutting the bonds cost.

    Attributes:
        sites: n tensors (D_k, i_k, j_k, D_k+1) in the dtype of the weight.
        spectra: n - 1 float64 vectors: all singular values at each bond, descending, those that were cut too.
    """

    sites: tuple[Tensor, ...]
    spectra: tuple[Tensor, ...]

    @property
    def bonds(self) -> tuple[int, ...]:
        """(D_1, ..., D_n+1)."""
        return (1, *(site.shape[3] for site in self.sites))


@torch.no_grad()
def mpo_decompose(
    weight: Tensor,
    row_factors: Sequence[int],
    col_factors: Sequence[int],
    max_bond: int | Sequence[int] | None = None,
) -> MPODecomposition:
    """Decompose a matrix; at every bond the root of the singular values is on both sides, as in the original.

    Args:
        weight: (rows, columns) float on any device. Computed in float64.
        row_factors, col_factors: i_1 .. i_n and j_1 .. j_n, with products rows and columns.
        max_bond: caps of the bonds, see `mpo_bonds`. Cut bonds keep the largest singular values.

    Returns:
        Site tensors, spectra and error bound. Without a cap the reconstruction is exact but for rounding. Singular
        values that are zero but for rounding give zeros in the site tensors: zero matrices and others of low rank are
        fine. The signs of bond indices are arbitrary, as in any SVD.

    Raises:
        UserError: not a matrix of floats, values that are not finite, factors that do not multiply to its shape,
            bonds below 1.
    """
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise UserError(f"weight: expected a matrix of floats, got {got}")
    bonds = mpo_bonds(row_factors, col_factors, max_bond)
    for name, factors, size in (
        ("row_factors", row_factors, weight.shape[0]),
        ("col_factors", col_factors, weight.shape[1]),
    ):
        if math.prod(factors) != size:
            product = " x ".join(map(str, factors))
            raise UserError(f"{name}: expected a product of {size}, got {product} = {math.prod(factors)}")
    if not torch.isfinite(weight).all():
        raise UserError("weight: expected finite values, got nan or inf")

    n = len(row_factors)
    x = weight.double().reshape(*row_factors, *col_factors)
    x = x.permute([place for k in range(n) for place in (k, n + k)]).contiguous()  # i_1 j_1 i_2 j_2 ...
    sizes = [i * j for i, j in zip(row_factors, col_factors, strict=True)]
    left_sizes = [math.prod(sizes[:k]) for k in range(1, n)]
    # At a bond left of the pivot the vectors of the left side are fewer and span all; right of it, those of the right.
    pivot = sum(size * size <= x.numel() for size in left_sizes)
    spectra, vectors = [], []
    for k, size in enumerate(left_sizes):
        values, basis = _spectrum(x.view(size, -1).t() if k < pivot else x.view(size, -1))
        spectra.append(values)
        vectors.append(basis[:, : bonds[k + 1]])
    return MPODecomposition(
        tuple(
            site.view(bonds[k], row_factors[k], col_factors[k], bonds[k + 1]).to(weight.dtype)
            for k, site in enumerate(_sites(x, vectors, spectra, pivot))
        ),
        tuple(spectra),
    )


def _spectrum(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of a matrix (m, k) with m >= k, and its right vectors as columns (k, k)."""
    # the small triangle has both, at the accuracy of an SVD of the whole; a Gram matrix would lose half of the digits
    _, values, vectors = torch.linalg.svd(torch.linalg.qr(tall, mode="r").R)
    return values, vectors.mT


def _sites(x: Tensor, vectors: list[Tensor], spectra: list[Tensor], pivot: int) -> list[Tensor]:
    """T_k = s^-1/2 U^T X V'^T s'^-1/2, with X = U s V at the site's left bond and X = U' s' V' at its right bond.

    X V'^T is U' s' and U^T X is s V, so left of the pivot U alone is needed, right of it V, and no site is divided by
    more than it was multiplied with.
    """
    roots = []
    for values, basis in zip(spectra, vectors, strict=True):
        null = values <= torch.finfo(values.dtype).eps * x.numel() / len(values) * values[0]
        root = values.masked_fill(null, 0).sqrt()[: basis.shape[1]]
        roots.append((root, torch.where(root > 0, 1 / root, 0)))
    one = x.new_ones(1)
    ends = [(x.new_ones(1, 1), (one, one))]
    bonds = [*ends, *zip(vectors, roots, strict=True), *ends]
    sites = []
    for k, ((before, (root, inverse)), (after, (next_root, next_inverse))) in enumerate(pairwise(bonds)):
        if k < pivot:
            site = before.mT @ after.reshape(before.shape[0], -1)
            site = inverse[:, None] * site.view(-1, after.shape[1]).mul(next_root).view(site.shape)
        elif k > pivot:
            site = before.view(-1, after.shape[0], before.shape[1]).movedim(-1, 0).contiguous() @ after
            site = root[:, None] * site.mul_(next_inverse).view(before.shape[1], -1)
        else:
            site = (before.mT @ x.view(before.shape[0], -1)).view(-1, after.shape[0]) @ after
            site = inverse[:, None] * site.mul_(next_inverse).view(before.shape[1], -1)
        sites.append(site)
    return sites
