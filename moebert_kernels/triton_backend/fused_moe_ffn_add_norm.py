"""The MoEBERT expert: two grouped GEMMs, then one pass that un-permutes, adds the residual and normalises.

With `in_order`, x and dx are in row order (docs/design/0009): no GEMM gathers or scatters, and y alone is by token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.expert_gemm import expert_gemm
from moebert_kernels.kernels.fused_moe_ffn_add_norm import add_norm, add_norm_backward
from moebert_kernels.kernels.launch import empty, made, recorded
from moebert_kernels.triton_backend.expert_gemm import sums_of_chunks
from moebert_kernels.triton_backend.fused_moe_ffn import contiguous, hidden_gradients, hidden_rows


@recorded
def ffn_rows(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str,
    hidden_dropout_p: float, seed: Tensor | None, save: bool, in_order: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The feed-forward's outputs (num_rows, H) and, if `save`, its pre-activations, in row order and w1's dtype."""
    dtype = w1.dtype
    x = made(lambda t: t.to(dtype), x)
    h, h_pre = hidden_rows(x, grouping, w1, b1, w2.shape[2], activation, hidden_dropout_p, seed, save, not in_order)
    ffn = empty(h, grouping.num_rows, w2.shape[1])
    expert_gemm(h, w2, ffn, grouping, bias=b2)
    return ffn, h_pre


@recorded
def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, routing_weights: Tensor | None, eps: float, activation: str,
    dropout_p: float, hidden_dropout_p: float, seed: Tensor | None, save: bool, in_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (T, H) in x's dtype and, if `save`, the pre-activations and the feed-forward's outputs, both in row order."""
    ffn, h_pre = ffn_rows(x, grouping, w1, b1, w2, b2, activation, hidden_dropout_p, seed, save, in_order)
    y = empty(x, *x.shape)
    add_norm(
        x, ffn, norm_weight, norm_bias, contiguous(routing_weights), y, grouping, eps, dropout_p, seed,
        by_row=("x", "ffn") if in_order else ("ffn",),
    )  # fmt: skip
    return y, h_pre, ffn if save else empty(ffn, 0, ffn.shape[1])


@recorded
def backward(
    dy: Tensor, x: Tensor, h_pre: Tensor, ffn: Tensor, grouping: Grouping,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    routing_weights: Tensor | None, eps: float, activation: str, dropout_p: float, hidden_dropout_p: float,
    seed: Tensor | None, needs: Sequence[bool], in_order: bool = False,
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, drouting_weights], None where `needs` is false."""
    need_db1, need_db2, (need_dnorm_weight, need_dnorm_bias, need_dweights) = needs[2], needs[4], needs[5:]
    rows = grouping.num_rows
    if ffn.shape[0] < rows:
        ffn, h_pre = ffn_rows(x, grouping, w1, b1, w2, b2, activation, hidden_dropout_p, seed, True, in_order)
    dz = empty(x, rows, x.shape[1])
    apart = (dropout_p > 0 and seed is not None) or x.dtype != w1.dtype
    dffn = empty(w1, rows, x.shape[1]) if apart else dz
    H = x.shape[1]
    sums = sums_of_chunks(x, grouping, (2 + need_db2) * H + need_db1 * w1.shape[1])
    dweights = None
    if need_dweights and routing_weights is not None:
        dweights = made(lambda t: t.new_zeros(t.shape), routing_weights)
    add_norm_backward(
        dy, x, ffn, norm_weight, norm_bias, contiguous(routing_weights), dz, dffn if apart else None,
        sums, dweights, grouping, eps, dropout_p, seed, sum_dffn=need_db2,
        by_row=("x", "ffn", "dz") if in_order else ("ffn", "dz"),
    )  # fmt: skip
    dnorm_weight = empty(norm_weight, *norm_weight.shape) if need_dnorm_weight else None
    dnorm_bias = empty(norm_bias, *norm_bias.shape) if need_dnorm_bias else None
    db2 = empty(w2, *b2.shape) if b2 is not None and need_db2 else None
    others = ((dnorm_weight, H), (dnorm_bias, H), (db2, H))[: 2 + need_db2]
    dtype = w1.dtype
    dh_pre, dw1, db1, dw2, _, _ = hidden_gradients(
        dffn, made(lambda t: t.to(dtype), x), h_pre, grouping, w1, b1, w2, b2, None, activation, hidden_dropout_p, seed,
        (*needs[:4], False, False), gather=False, gather_x=not in_order, begun=sums, others=others,
    )  # fmt: skip
    dx = None
    if needs[0]:
        dx = empty(x, *x.shape)
        expert_gemm(dh_pre, w1.transpose(1, 2), dx, grouping, residual=dz, skipped=dy, scatter=not in_order)
    return [dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, dweights]
