"""The MoEBERT expert: the feed-forward on gathered rows, then residual and the expert's LayerNorm before un-permuting.

The sum and the norm are computed in float32 (float64 for float64 inputs), whatever the GEMMs' dtype.
`in_order`: x and dx are rows; here they are only brought into the order of the tokens and back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebert_kernels import dropout
from moebert_kernels.grouping import Grouping
from moebert_kernels.torch_backend import batched_experts
from moebert_kernels.torch_backend.expert_gemm import host_bounds, routed_tokens, row_to_assignment, spans
from moebert_kernels.torch_backend.fused_moe_ffn import (
    assignment_gradient,
    expert_outputs,
    ffn_rows,
    ffn_rows_backward,
    row_weights,
    rows_per_expert,
)

_native_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def output_keep(seed: Tensor | None, tokens: Tensor, columns: int, p: float) -> Tensor | None:
    if p == 0 or seed is None:
        return None
    return dropout.keep_mask(seed, tokens, columns, p, dropout.OUTPUT_STREAM)


def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, routing_weights: Tensor | None, eps: float, activation: str,
    dropout_p: float, hidden_dropout_p: float, seed: Tensor | None, save: bool, in_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (T, H) in x's dtype and, if `save`, the pre-activations and the feed-forward's outputs, both in row order."""
    if in_order:
        x = x.index_select(0, grouping.assignment_to_row)
    bounds = host_bounds(grouping)
    routed = bounds[-1]
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    norm_weight, norm_bias = norm_weight.to(acc_dtype), norm_bias.to(acc_dtype)
    p_rows = row_weights(routing_weights, grouping, routed)
    plain = not save and dropout_p == 0 and hidden_dropout_p == 0 and x.dtype == w1.dtype == acc_dtype
    way = rows_per_expert(bounds) if plain else "few"
    nothing_saved = w1.new_empty(0, w1.shape[1]), w1.new_empty(0, x.shape[1])
    if way == "some" and batched_experts.applies(x):
        y = batched_experts.ffn_add_norm(
            x, grouping, bounds, w1, b1, w2, b2, norm_weight, norm_bias, p_rows, eps, activation
        )  # fmt: skip
        return y, *nothing_saved

    tokens = row_to_assignment(grouping, routed)
    if way == "many":
        y = x.clone(memory_format=torch.contiguous_format) if routed < grouping.num_rows else x.new_empty(x.shape)
        gathered = routed_tokens(grouping, routed)  # int32: faster to read by, but not to write by
        for (e, lo, hi), z_rows in expert_outputs(x, gathered, w1, b1, w2, b2, bounds, activation, residual=True):
            normed = torch.layer_norm(z_rows, z_rows.shape[1:], norm_weight[e], norm_bias[e], eps)
            y.index_put_((tokens[lo:hi],), normed if p_rows is None else normed.mul_(p_rows[lo:hi]))
        return y, *nothing_saved

    x_rows = x.index_select(0, tokens)
    rows, h_pre = ffn_rows(
        x_rows.to(w1.dtype), w1, b1, w2, b2, grouping, bounds, activation, hidden_dropout_p, seed, save
    )  # fmt: skip
    z = sums(x_rows, rows, tokens, dropout_p, seed)
    y_rows = torch.empty_like(z)
    for e, lo, hi in spans(bounds):
        y_rows[lo:hi] = torch.layer_norm(z[lo:hi], z.shape[1:], norm_weight[e], norm_bias[e], eps)
    if p_rows is not None:
        y_rows *= p_rows
    y = _to_token_order(y_rows.to(x.dtype), grouping, tokens, skipped=x)
    return (y, h_pre, _padded(rows, grouping)) if save else (y, *nothing_saved)


def sums(x_rows: Tensor, ffn_rows: Tensor, tokens: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x + dropout(ffn) (R, H), in float32 or above."""
    acc_dtype = torch.promote_types(x_rows.dtype, torch.float32)
    keep = output_keep(seed, tokens, ffn_rows.shape[1], dropout_p)
    if keep is not None:
        ffn_rows = (ffn_rows * keep).mul_(dropout.scale(dropout_p))
    return ffn_rows.to(acc_dtype) + x_rows


def _padded(rows: Tensor, grouping: Grouping) -> Tensor:
    """(R, H) -> (num_rows, H), zero past the routed rows."""
    if rows.shape[0] == grouping.num_rows:
        return rows
    return torch.nn.functional.pad(rows, (0, 0, 0, grouping.num_rows - rows.shape[0]))


def _to_token_order(rows: Tensor, grouping: Grouping, tokens: Tensor, skipped: Tensor) -> Tensor:
    """Routed rows (R, H) -> (T, H), with `skipped` (T, H) where a token has no expert."""
    if rows.shape[0] == grouping.num_rows:
        return rows.index_select(0, grouping.assignment_to_row)
    return skipped.clone(memory_format=torch.contiguous_format).index_copy_(0, tokens, rows)


def backward(
    dy: Tensor, x: Tensor, h_pre: Tensor, ffn: Tensor, grouping: Grouping,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    routing_weights: Tensor | None, eps: float, activation: str, dropout_p: float, hidden_dropout_p: float,
    seed: Tensor | None, needs: Sequence[bool], in_order: bool = False,
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, drouting_weights], None where `needs` is false."""
    if in_order:
        x = x.index_select(0, grouping.assignment_to_row)
    need_dx, *need_ffn, need_dnorm_weight, need_dnorm_bias, need_dp = needs
    bounds = host_bounds(grouping)
    routed = bounds[-1]
    tokens = row_to_assignment(grouping, routed)
    x_rows = x.index_select(0, tokens)
    keep = output_keep(seed, tokens, x.shape[1], dropout_p)
    if ffn.shape[0] < routed:
        _, h_pre, ffn = forward(
            x, grouping, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation,
            dropout_p, hidden_dropout_p, seed, True,
        )  # fmt: skip
    z = sums(x_rows, ffn[:routed], tokens, dropout_p, seed)
    dy_rows = dy.index_select(0, tokens).to(z.dtype)
    p_rows = row_weights(routing_weights, grouping, routed)

    dz = torch.empty_like(z)
    dnorm_weight = z.new_zeros(norm_weight.shape)
    dnorm_bias = z.new_zeros(norm_bias.shape)
    dp_rows = z.new_empty(routed)
    for e, lo, hi in spans(bounds):
        weight, bias = norm_weight[e].to(z.dtype), norm_bias[e].to(z.dtype)
        normed, mean, rstd = torch.native_layer_norm(z[lo:hi], z.shape[1:], weight, bias, eps)
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
        dx = _to_token_order(dz.add_(dx_rows).to(x.dtype), grouping, tokens, skipped=dy)
        dx = dx.index_select(0, grouping.row_to_assignment) if in_order else dx
    return [
        dx, dw1, db1, dw2, db2,
        dnorm_weight.to(norm_weight.dtype) if need_dnorm_weight else None,
        dnorm_bias.to(norm_bias.dtype) if need_dnorm_bias else None,
        assignment_gradient(dp_rows.to(routing_weights.dtype), grouping) if need_dp else None,
    ]  # fmt: skip
