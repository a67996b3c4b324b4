"""Expert weights from a shared central tensor: W_e = L_e C R_e, one expert after the other, in library GEMMs.

L_e (I J, D) and R_e (K Q, D') are the products of the auxiliary tensors left and right of the central one,
C (D, i, j, D'). Their rows are sorted into row factors before column factors, which costs nothing at their size and
leaves runs of Q elements for the copy into W (I i K, J j Q). One expert at a time: what is between two GEMMs stays in
the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class Side:
    """The auxiliary tensors on one side of the central one, and their product.

    `sites` come from the outer end inwards, so on the right with their bonds swapped (`mirrored`).

    Attributes:
        matrix: (E, rows * columns, D): row factors, then column factors, then the bond to the central tensor.
        rows, columns: products of the row and of the column factors.
    """

    def __init__(self, sites: Sequence[Tensor], mirrored: bool, like: Tensor) -> None:
        self._mirrored = mirrored
        self._sites = [site.permute(0, 4, 2, 3, 1) for site in reversed(sites)] if mirrored else list(sites)
        self.rows = math.prod(site.shape[2] for site in sites)
        self.columns = math.prod(site.shape[3] for site in sites)
        product = like.new_ones(like.shape[0], 1, 1)
        self._products = [product]  # of none, of the first, of the first two ...
        for site in self._sites:
            product = torch.bmm(product, site.flatten(2)).view(product.shape[0], -1, site.shape[4])
            self._products.append(product)
        factors = [size for site in self._sites for size in site.shape[2:4]]  # i_1 j_1 i_2 j_2 ...
        places = list(range(1, len(factors) + 1))
        rows, columns = places[0::2], places[1::2]
        if mirrored:
            rows, columns = rows[::-1], columns[::-1]
        self._factors, self._order = factors, [0, *rows, *columns, len(factors) + 1]
        interleaved = product.view(product.shape[0], *factors, product.shape[2])
        self.matrix = interleaved.permute(self._order).reshape(product.shape)

    def gradients(self, dmatrix: Tensor) -> list[Tensor]:
        """The gradients of the sites, in their original order and layout, from the gradient of `matrix`."""
        sizes = [dmatrix.shape[0], *self._factors, dmatrix.shape[2]]
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        dproduct = dmatrix.view([sizes[place] for place in self._order]).permute(back)
        grads = []
        for site, before in zip(reversed(self._sites), reversed(self._products[:-1]), strict=True):
            dproduct = dproduct.reshape(before.shape[0], before.shape[1], -1)
            grads.append(torch.bmm(before.transpose(1, 2), dproduct).view(site.shape))
            dproduct = torch.bmm(dproduct, site.flatten(2).transpose(1, 2))
        if self._mirrored:
            return [grad.permute(0, 4, 2, 3, 1).contiguous() for grad in grads]
        return grads[::-1]


def sides(aux: Sequence[Tensor], central_site: int) -> tuple[Side, Side]:
    """The sides left and right of the central tensor."""
    return Side(aux[:central_site], False, aux[0]), Side(aux[central_site:], True, aux[0])


def _used(offsets: Tensor | None, num_experts: int) -> list[bool]:
    """Which experts have rows. On a GPU this waits for the device, where this backend is only the fallback."""
    return [True] * num_experts if offsets is None else [end > start for start, end in pairwise(offsets.tolist())]


def forward(central: Tensor, aux: Sequence[Tensor], offsets: Tensor | None, central_site: int) -> Tensor:
    """(E, out, in); zeros for experts without rows."""
    left, right = sides(aux, central_site)
    bond, i, j, next_bond = central.shape
    c = central.reshape(bond, -1)
    num_experts = aux[0].shape[0]
    w = c.new_empty(num_experts, left.rows * i * right.rows, left.columns * j * right.columns)
    h = c.new_empty(left.matrix.shape[1], c.shape[1])
    product = c.new_empty(h.shape[0] * i * j, right.matrix.shape[1])
    by_site = product.view(left.rows, left.columns, i, j, right.rows, right.columns).permute(0, 2, 4, 1, 3, 5)
    for e, used in enumerate(_used(offsets, num_experts)):
        if not used:
            w[e].zero_()
            continue
        torch.mm(left.matrix[e], c, out=h)
        torch.mm(h.view(-1, next_bond), right.matrix[e].t(), out=product)
        w[e].view(by_site.shape).copy_(by_site)
    return w


def backward(
    dw: Tensor, central: Tensor, aux: Sequence[Tensor], offsets: Tensor | None, central_site: int,
    needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of central and of each aux, None where `needs` says so.

    With Z_e = dW_e R_e (I J i j, D'): dL_e = Z_e C^T and dC = sum of L_e^T Z_e; dR_e = dW_e^T (L_e C). These five GEMMs
    take nothing from forward; with C R_e instead of L_e C, dC would need one of twice the size.
    """
    need_c, need_left, need_right = needs[0], any(needs[1 : 1 + central_site]), any(needs[1 + central_site :])
    left, right = sides(aux, central_site)
    bond, i, j, next_bond = central.shape
    c = central.reshape(bond, -1)
    sum_dtype = torch.promote_types(c.dtype, torch.float32)
    dc = torch.zeros_like(c, dtype=sum_dtype) if need_c else None
    dleft = torch.zeros_like(left.matrix) if need_left else None
    dright = torch.zeros_like(right.matrix) if need_right else None
    dproduct = c.new_empty(left.matrix.shape[1] * i * j, right.matrix.shape[1])
    by_site = dproduct.view(left.rows, left.columns, i, j, right.rows, right.columns).permute(0, 2, 4, 1, 3, 5)
    between = c.new_empty(left.matrix.shape[1], c.shape[1])  # Z_e, then L_e C
    for e, used in enumerate(_used(offsets, aux[0].shape[0])):
        if not used:
            continue
        by_site.copy_(dw[e].reshape(by_site.shape))
        if need_c or need_left:
            torch.mm(dproduct, right.matrix[e], out=between.view(-1, next_bond))
        if dleft is not None:
            torch.mm(between, c.t(), out=dleft[e])
        if dc is not None:
            if sum_dtype == c.dtype:
                torch.addmm(dc, left.matrix[e].t(), between, out=dc)
            else:
                dc.add_(torch.mm(left.matrix[e].t(), between))
        if dright is not None:
            torch.mm(left.matrix[e], c, out=between)
            torch.mm(dproduct.t(), between.view(-1, next_bond), out=dright[e])
    grads = [None if dc is None else dc.to(c.dtype).view(central.shape)]
    grads += [None] * central_site if dleft is None else left.gradients(dleft)
    grads += [None] * (len(aux) - central_site) if dright is None else right.gradients(dright)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]
