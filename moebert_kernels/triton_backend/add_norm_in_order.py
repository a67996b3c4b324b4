"""The LayerNorm before the experts, which writes its rows in their order: what the attention leaves, and its residual.

    row(t) of the next experts:    x[row(t)] = LayerNorm(residual[t] + dropout(added[t]))        docs/design/0009

It is the experts' own pass over the tokens (`add_norm`) with one expert that all tokens have, and other orders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.column_sums import SUMS_CHUNK, add_chunks
from moebert_kernels.kernels.fused_moe_ffn_add_norm import add_norm, add_norm_backward
from moebert_kernels.kernels.launch import empty, made, recorded
from moebert_kernels.kernels.tiles import num_chunks


def _one_expert(grouping: Grouping) -> Grouping:
    """The same rows, as those of one expert."""
    rows = grouping.num_rows
    offsets = made(lambda t: torch.arange(2, dtype=t.dtype, device=t.device) * rows, grouping.offsets)
    return Grouping(offsets, grouping.row_to_assignment, grouping.assignment_to_row)


@recorded
def forward(
    residual: Tensor, added: Tensor, norm_weight: Tensor, norm_bias: Tensor, grouping: Grouping, eps: float,
    dropout_p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Rows (T, H) of residual and `added` (T, H) by token, contiguous; norm_weight and norm_bias (H,)."""
    rows = empty(residual, *residual.shape)
    add_norm(
        residual, added, norm_weight[None], norm_bias[None], None, rows, _one_expert(grouping), eps, dropout_p, seed,
        by_row=("y",),
    )  # fmt: skip
    return rows


@recorded
def backward(
    drows: Tensor, residual: Tensor, added: Tensor, norm_weight: Tensor, norm_bias: Tensor, grouping: Grouping,
    eps: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dresidual, dadded, dnorm_weight, dnorm_bias) of the gradient of the rows; the first two by token.

    The first two are one tensor where nothing is dropped and their dtypes are equal.
    """
    dresidual = empty(residual, *residual.shape)
    drops = dropout_p > 0 and seed is not None
    apart = drops or added.dtype != residual.dtype
    dadded = empty(added, *added.shape) if apart else dresidual
    H, chunks = residual.shape[1], num_chunks(grouping.num_rows, 1, SUMS_CHUNK)
    partials = empty(residual, chunks, 2 * H, dtype=torch.float32)
    one = _one_expert(grouping)
    add_norm_backward(
        drows, residual, added, norm_weight[None], norm_bias[None], None, dresidual, dadded if apart else None,
        partials, None, one, eps, dropout_p, seed, sum_dffn=False, by_row=("dy",),
    )  # fmt: skip
    dnorm_weight, dnorm_bias = empty(norm_weight, *norm_weight.shape), empty(norm_bias, *norm_bias.shape)
    add_chunks(partials, ((dnorm_weight, H), (dnorm_bias, H)), one.offsets, SUMS_CHUNK)
    return dresidual, dadded, dnorm_weight, dnorm_bias
