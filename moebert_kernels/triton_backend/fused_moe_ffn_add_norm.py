"""The MoEBERT expert: two grouped GEMMs, then one pass that un-permutes, adds the residual and normalises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.expert_gemm import expert_gemm
from moebert_kernels.kernels.fused_moe_ffn_add_norm import NORM_CHUNK, add_norm, add_norm_backward
from moebert_kernels.kernels.tiles import num_chunks
from moebert_kernels.triton_backend.expert_gemm import sum_chunks
from moebert_kernels.triton_backend.fused_moe_ffn import contiguous, hidden_gradients, hidden_rows


def ffn_rows(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str,
    hidden_dropout_p: float, seed: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The feed-forward's outputs (num_rows, H) and, if `save`, its pre-activations, in row order and w1's dtype."""
    h, h_pre = hidden_rows(
        x.to(w1.dtype), grouping, w1, b1, w2.shape[2], activation, hidden_dropout_p, seed, save
    )  # fmt: skip
    ffn = h.new_empty(grouping.num_rows, w2.shape[1])
    expert_gemm(h, w2, ffn, grouping, bias=b2)
    return ffn, h_pre


def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, routing_weights: Tensor | None, eps: float, activation: str,
    dropout_p: float, hidden_dropout_p: float, seed: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (T, H) in x's dtype and, if `save`, the pre-activations and the feed-forward's outputs, both in row order."""
    ffn, h_pre = ffn_rows(x, grouping, w1, b1, w2, b2, activation, hidden_dropout_p, seed, save)
    y = x.new_empty(x.shape)
    add_norm(
        x, ffn, norm_weight, norm_bias, contiguous(routing_weights), y, grouping, eps, dropout_p, seed
    )  # fmt: skip
    return y, h_pre, ffn if save else ffn.new_empty(0, ffn.shape[1])


def backward(
    dy: Tensor, x: Tensor, h_pre: Tensor, ffn: Tensor, grouping: Grouping,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    routing_weights: Tensor | None, eps: float, activation: str, dropout_p: float, hidden_dropout_p: float,
    seed: Tensor | None, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, drouting_weights], None where `needs` is false."""
    need_db2, (need_dnorm_weight, need_dnorm_bias, need_dweights) = needs[4], needs[5:]
    rows = grouping.num_rows
    if ffn.shape[0] < rows:
        ffn, h_pre = ffn_rows(x, grouping, w1, b1, w2, b2, activation, hidden_dropout_p, seed, save=True)
    dz = x.new_empty(rows, x.shape[1])
    apart = (dropout_p > 0 and seed is not None) or x.dtype != w1.dtype
    dffn = w1.new_empty(rows, x.shape[1]) if apart else dz
    chunks = num_chunks(rows, grouping.num_experts, NORM_CHUNK)
    partials = x.new_empty(2 + need_db2, chunks, x.shape[1], dtype=torch.float32)
    dweights = x.new_zeros(grouping.num_tokens, 1) if need_dweights else None
    add_norm_backward(
        dy, x, ffn, norm_weight, norm_bias, contiguous(routing_weights), dz, dffn if apart else None,
        partials, dweights, grouping, eps, dropout_p, seed,
    )  # fmt: skip
    dnorm_weight = dnorm_bias = db2 = None
    if need_dnorm_weight or need_dnorm_bias or need_db2:
        sums = sum_chunks(partials, grouping, NORM_CHUNK, norm_weight.dtype)
        dnorm_weight = sums[0] if need_dnorm_weight else None
        # outputs of a custom op may not share memory
        dnorm_bias = sums[1].clone() if need_dnorm_bias else None
        db2 = sums[2].to(w2.dtype, copy=True) if need_db2 else None
    grads = ffn_gradients(
        dffn, dz, dy, x, h_pre, grouping, w1, b1, w2, b2, activation, hidden_dropout_p, seed,
        (*needs[:4], False),
    )  # fmt: skip
    return [*grads[:4], db2, dnorm_weight, dnorm_bias, dweights]


def ffn_gradients(
    dffn: Tensor, dz: Tensor, dy: Tensor, x: Tensor, h_pre: Tensor, grouping: Grouping,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, hidden_dropout_p: float,
    seed: Tensor | None, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dw1, db1, dw2, db2] from what the norm's backward left.

    `dffn` and `dz` (num_rows, H) are gradients of the feed-forward's outputs and of the residual, in row order.
    """
    dh_pre, *weight_grads, _ = hidden_gradients(
        dffn, x.to(w1.dtype), h_pre, grouping, w1, b1, w2, b2, None, activation, hidden_dropout_p, seed,
        (*needs, False), gather=False,
    )  # fmt: skip
    dx = None
    if needs[0]:
        dx = x.new_empty(x.shape)
        expert_gemm(dh_pre, w1.transpose(1, 2), dx, grouping, residual=dz, skipped=dy, scatter=True)
    return [dx, *weight_grads]
