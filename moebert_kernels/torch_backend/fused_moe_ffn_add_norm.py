"""The MoEBERT expert: the feed-forward on gathered rows, then residual and the expert's LayerNorm before un-permuting.

The sum and the norm are computed in float32 (float64 for float64 inputs), whatever the GEMMs' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels import dropout
from moebert_kernels.grouping import Grouping
from moebert_kernels.torch_backend.expert_gemm import host_bounds, spans
from moebert_kernels.torch_backend.fused_moe_ffn import (
    assignment_gradient,
    ffn_rows,
    ffn_rows_backward,
    row_weights,
)

_native_layer_norm = torch.ops.aten.native_layer_norm
_native_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def _output_keep(seed: Tensor | None, tokens: Tensor, columns: int, p: float) -> Tensor | None:
    if p == 0 or seed is None:
        return None
    return dropout.keep_mask(seed, tokens, columns, p, dropout.OUTPUT_STREAM)


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, routing_weights: Tensor | None, eps: float, activation: str,
    dropout_p: float, hidden_dropout_p: float, seed: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (T, H) in x's dtype and, if `save`, the pre-activations and the sums before the norm, both in row order."""
    bounds = host_bounds(grouping)
    routed = bounds[-1]
    acc_dtype = _accumulator_dtype(x.dtype)
    tokens = grouping.row_to_token[:routed]
    x_rows = x.index_select(0, tokens)
    z, h_pre = ffn_rows(
        x_rows.to(w1.dtype), w1, b1, w2, b2, grouping, bounds, activation, hidden_dropout_p, seed, save
    )  # fmt: skip
    keep = _output_keep(seed, tokens, z.shape[1], dropout_p)
    if keep is not None:
        z = z.mul_(keep).mul_(dropout.scale(dropout_p))
    z = z.to(acc_dtype).add_(x_rows)
    p_rows = row_weights(routing_weights, grouping, routed)

    y_rows = torch.empty_like(z)
    for e, lo, hi in spans(bounds):
        y_rows[lo:hi] = _native_layer_norm(
            z[lo:hi], z.shape[1:], norm_weight[e].to(acc_dtype), norm_bias[e].to(acc_dtype), eps
        )[0]
    if p_rows is not None:
        y_rows *= p_rows
    y_rows = y_rows.to(x.dtype)
    if routed == grouping.num_rows:
        y = y_rows.index_select(0, grouping.token_to_row)
    else:
        y = x.clone(memory_format=torch.contiguous_format).index_copy_(0, tokens.long(), y_rows)
    return y, h_pre, z if save else z.new_empty(0, z.shape[1])


def backward(
    dy: Tensor, x: Tensor, h_pre: Tensor, z: Tensor, grouping: Grouping,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    routing_weights: Tensor | None, eps: float, activation: str, dropout_p: float, hidden_dropout_p: float,
    seed: Tensor | None, needs: tuple[bool, bool, bool, bool, bool, bool, bool, bool],
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, drouting_weights], None where `needs` is false."""
    need_dx, *need_ffn, need_dnorm_weight, need_dnorm_bias, need_dp = needs
    bounds = host_bounds(grouping)
    routed = bounds[-1]
    tokens = grouping.row_to_token[:routed]
    x_rows = x.index_select(0, tokens)
    keep = _output_keep(seed, tokens, x.shape[1], dropout_p)
    if z.shape[0] < routed:
        _, h_pre, z = forward(
            x, grouping, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation,
            dropout_p, hidden_dropout_p, seed, True,
        )  # fmt: skip
    dy_rows = dy.index_select(0, tokens).to(z.dtype)
    p_rows = row_weights(routing_weights, grouping, routed)

    dz = torch.empty_like(z)
    dnorm_weight = z.new_zeros(norm_weight.shape)
    dnorm_bias = z.new_zeros(norm_bias.shape)
    dp_rows = z.new_empty(routed)
    for e, lo, hi in spans(bounds):
        weight, bias = norm_weight[e].to(z.dtype), norm_bias[e].to(z.dtype)
        normed, mean, rstd = _native_layer_norm(z[lo:hi], z.shape[1:], weight, bias, eps)
        dnormed = dy_rows[lo:hi]
        if p_rows is not None:
            torch.sum(dnormed * normed, 1, out=dp_rows[lo:hi])
            dnormed = dnormed * p_rows[lo:hi]
        dz[lo:hi], dnorm_weight[e], dnorm_bias[e] = _native_layer_norm_backward(
            dnormed, z[lo:hi], z.shape[1:], mean, rstd, weight, bias, [True, True, True]
        )

    dffn = dz if keep is None else (dz * keep).mul_(dropout.scale(dropout_p))
    dx_rows, dw1, db1, dw2, db2, _ = ffn_rows_backward(
        dffn.to(w1.dtype), x_rows.to(w1.dtype), h_pre, w1, b1, w2, b2, grouping, bounds,
        activation, hidden_dropout_p, seed, None, (need_dx, *need_ffn, False),
    )  # fmt: skip
    dx = None
    if need_dx:
        dx_rows = dz.add_(dx_rows).to(x.dtype)
        if routed == grouping.num_rows:
            dx = dx_rows.index_select(0, grouping.token_to_row)
        else:
            dx = dy.clone(memory_format=torch.contiguous_format).index_copy_(0, tokens.long(), dx_rows)
    return [
        dx, dw1, db1, dw2, db2,
        dnorm_weight.to(norm_weight.dtype) if need_dnorm_weight else None,
        dnorm_bias.to(norm_bias.dtype) if need_dnorm_bias else None,
        assignment_gradient(dp_rows.to(routing_weights.dtype), grouping) if need_dp else None,
    ]  # fmt: skip
