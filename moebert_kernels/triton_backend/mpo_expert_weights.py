"""Expert weights from a shared central tensor: one kernel forward; one kernel and library GEMMs backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebert_kernels.kernels.mpo_expert_weights import fold, permute
from moebert_kernels.torch_backend.mpo_expert_weights import sides


def forward(central: Tensor, aux: Sequence[Tensor], offsets: Tensor | None, central_site: int) -> Tensor:
    """(E, out, in); zeros for experts without rows."""
    left, right = sides(aux, central_site)
    i, j = central.shape[1:3]
    w = central.new_empty(aux[0].shape[0], left.rows * i * right.rows, left.columns * j * right.columns)
    fold(left.matrix, central.contiguous(), right.matrix, w, offsets, left.columns, right.columns)
    return w


def backward(
    dw: Tensor, central: Tensor, aux: Sequence[Tensor], offsets: Tensor | None, central_site: int,
    needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of central and of each aux, None where `needs` says so: the products of the torch backend.

    All experts at once, so that dC is one GEMM that sums over them; an expert without rows has zeros for its dW.
    """
    need_c, need_left, need_right = needs[0], any(needs[1 : 1 + central_site]), any(needs[1 + central_site :])
    left, right = sides(aux, central_site)
    bond, i, j, next_bond = central.shape
    c = central.reshape(bond, -1)
    num_experts, rows, columns = aux[0].shape[0], left.matrix.shape[1], right.matrix.shape[1]
    by_site = dw.new_empty(num_experts, rows * i * j, columns)
    permute(dw.contiguous(), by_site, offsets, i, j, left.columns, right.columns)
    stacked = left.matrix.view(num_experts * rows, bond)
    grads: list[Tensor | None] = [None] * (1 + len(aux))
    if need_c or need_left:
        z = torch.bmm(by_site, right.matrix).view(num_experts * rows, -1)
        if need_c:
            grads[0] = torch.mm(stacked.t(), z).view(central.shape)
        if need_left:
            grads[1 : 1 + central_site] = left.gradients(torch.mm(z, c.t()).view(left.matrix.shape))
    if need_right:
        h = torch.mm(stacked, c).view(num_experts, rows * i * j, next_bond)
        grads[1 + central_site :] = right.gradients(torch.bmm(by_site.mT, h))
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]
