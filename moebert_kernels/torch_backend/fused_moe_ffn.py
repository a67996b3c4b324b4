"""The expert feed-forward: gather once, two GEMMs per non-empty expert, un-permute once.

Three ways through inference, by rows per expert: few enough that calls cost most (as in training, one call for all
experts wherever possible), batches of experts, and one expert at a time while its rows are in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from moebert_kernels import dropout
from moebert_kernels.grouping import Grouping
from moebert_kernels.torch_backend import batched_experts
from moebert_kernels.torch_backend.activation import activate, activate_backward
from moebert_kernels.torch_backend.expert_gemm import (
    Span,
    grouped_linear,
    host_bounds,
    linear,
    routed_tokens,
    row_to_assignment,
    rows_to_tokens,
    spans,
    sum_assignments,
    weight_gradients,
)


def _hidden_keep(seed: Tensor | None, grouping: Grouping, routed: int, columns: int, p: float) -> Tensor | None:
    if p == 0 or seed is None:
        return None
    return dropout.keep_mask(seed, grouping.row_to_assignment[:routed], columns, p, dropout.HIDDEN_STREAM)


# Mean rows per expert that has any: below the first, calls cost more than batches save; above the second, passes over
# memory count. docs/experiments.md, 2026-11-21
_SOME_ROWS, _MANY_ROWS = 8, 96


def rows_per_expert(bounds: list[int]) -> Literal["few", "some", "many"]:
    """Choose the fastest of the three ways through inference."""
    experts = max(len(set(bounds)) - 1, 1)
    if bounds[-1] < _SOME_ROWS * experts:
        return "few"
    return "some" if bounds[-1] <= _MANY_ROWS * experts else "many"


def expert_outputs(
    x: Tensor, tokens: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, bounds: list[int],
    activation: str, residual: bool,
) -> Iterator[tuple[Span, Tensor]]:  # fmt: skip
    """Inference with many rows: each expert's output rows in turn, while they are in the cache.

    Drawing the next rows overwrites the yielded ones. x (T, H), tokens (R,) int32 of each
    routed row; with `residual` x's rows are added.
    """
    of_experts = spans(bounds)
    most = max((hi - lo for _, lo, hi in of_experts), default=0)
    # One buffer for all experts: fresh memory costs a page fault for every 4 KiB.
    x_buffer, h_buffer = x.new_empty(most, x.shape[1]), x.new_empty(most, w1.shape[1])
    for e, lo, hi in of_experts:
        rows = torch.index_select(x, 0, tokens[lo:hi], out=x_buffer[: hi - lo])
        h_pre = linear(rows, w1[e], None if b1 is None else b1[e], out=h_buffer[: hi - lo])
        h, bias = activate(h_pre, activation, inplace=True), None if b2 is None else b2[e]
        if residual:
            rows.addmm_(h, w2[e].t())
            yield (e, lo, hi), rows if bias is None else rows.add_(bias)
        else:
            yield (e, lo, hi), linear(h, w2[e], bias, out=rows)


def ffn_rows(
    x_rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, grouping: Grouping,
    bounds: list[int], activation: str, hidden_dropout_p: float, seed: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(R, H) gathered rows -> (R, H) expert outputs, and if `save` the pre-activations (num_rows, I or 2I)."""
    routed = bounds[-1]
    h_pre = x_rows.new_empty(grouping.num_rows if save else routed, w1.shape[1])
    if save:
        h_pre[routed:].zero_()
    pre = h_pre[:routed] if save else h_pre
    grouped_linear(x_rows, w1, b1, bounds, pre)
    h = activate(pre, activation, inplace=not save)
    if (keep := _hidden_keep(seed, grouping, routed, h.shape[1], hidden_dropout_p)) is not None:
        h = (h * keep).mul_(dropout.scale(hidden_dropout_p))
    y_rows = grouped_linear(h, w2, b2, bounds, x_rows.new_empty(routed, w2.shape[1]))
    return y_rows, h_pre if save else h_pre.new_empty(0, w1.shape[1])


def ffn_rows_backward(
    dy_rows: Tensor, x_rows: Tensor, h_pre: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    grouping: Grouping, bounds: list[int], activation: str, hidden_dropout_p: float, seed: Tensor | None,
    p_rows: Tensor | None, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of p * ffn_rows: [dx_rows, dw1, db1, dw2, db2, dp_rows], None where `needs` is false.

    `dy_rows` (R, H) does not yet hold the routing weight p (R, 1). An empty `h_pre` is recomputed from the rows.
    """
    need_dx, need_dw1, need_db1, need_dw2, need_db2, need_dp = needs
    routed = bounds[-1]
    if h_pre.shape[0] < routed:
        h_pre = x_rows.new_empty(routed, w1.shape[1])
        grouped_linear(x_rows, w1, b1, bounds, h_pre)
    h_pre = h_pre[:routed]
    keep = _hidden_keep(seed, grouping, routed, w2.shape[2], hidden_dropout_p)
    factor = dropout.scale(hidden_dropout_p)

    h = dp = None
    if need_dw2 or need_dp:
        h = activate(h_pre, activation, inplace=False)
        if keep is not None:
            h = (h * keep).mul_(factor)
    dy_weighted = dy_rows if p_rows is None else (dy_rows * p_rows).to(dy_rows.dtype)
    dw2, db2 = (
        weight_gradients(dy_weighted, h if h is not None else dy_weighted, bounds, w2.shape[0], need_dw2, need_db2)
        if need_dw2 or need_db2
        else (None, None)
    )
    dx_rows = dw1 = db1 = None
    if need_dx or need_dw1 or need_db1 or need_dp:
        dh = dy_rows.new_empty(routed, w2.shape[2])
        grouped_linear(dy_rows, w2.transpose(1, 2), None, bounds, dh)
        if need_dp and p_rows is not None:
            # <dy, w2 h + b2> without computing the expert's output again: <w2' dy, h> + <dy, b2>
            dp = (dh * h).sum(1, dtype=p_rows.dtype)
            if b2 is not None:
                for e, lo, hi in spans(bounds):
                    dp[lo:hi] += dy_rows[lo:hi] @ b2[e]
        if p_rows is not None:
            dh *= p_rows
        if keep is not None:
            dh.mul_(keep).mul_(factor)
        dh_pre = activate_backward(dh, h_pre, activation)
        dw1, db1 = weight_gradients(dh_pre, x_rows, bounds, w1.shape[0], need_dw1, need_db1)
        if need_dx:
            dx_rows = torch.empty_like(x_rows)
            grouped_linear(dh_pre, w1.transpose(1, 2), None, bounds, dx_rows)
    return [dx_rows, dw1, db1, dw2, db2, dp]


def row_weights(routing_weights: Tensor | None, grouping: Grouping, routed: int) -> Tensor | None:
    """(T, top_k) routing weights -> (R, 1), one per routed row."""
    if routing_weights is None:
        return None
    return routing_weights.reshape(-1).index_select(0, grouping.row_to_assignment[:routed])[:, None]


def assignment_gradient(dp_rows: Tensor, grouping: Grouping) -> Tensor:
    """(R,) gradients of the routing weights -> (T, top_k); zero for skipped assignments."""
    dp = dp_rows.new_zeros(grouping.num_rows)
    dp.index_copy_(0, row_to_assignment(grouping, dp_rows.shape[0]), dp_rows)
    return dp.view(grouping.num_tokens, grouping.top_k)


def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    routing_weights: Tensor | None, activation: str, hidden_dropout_p: float, seed: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (T, H) and, if `save`, the pre-activations in row order."""
    bounds = host_bounds(grouping)
    routed = bounds[-1]
    p_rows = row_weights(routing_weights, grouping, routed)
    way = rows_per_expert(bounds) if not save and hidden_dropout_p == 0 else "few"
    if way == "many":
        assignments = row_to_assignment(grouping, routed)
        y = x.new_empty(grouping.num_rows, w2.shape[1])
        if routed < grouping.num_rows:
            y.zero_()
        tokens = routed_tokens(grouping, routed)
        for (_, lo, hi), rows in expert_outputs(x, tokens, w1, b1, w2, b2, bounds, activation, residual=False):
            y.index_put_((assignments[lo:hi],), rows if p_rows is None else rows.mul_(p_rows[lo:hi]))
        return sum_assignments(y, grouping), x.new_empty(0, w1.shape[1])
    if way == "some" and batched_experts.applies(x):
        y = batched_experts.ffn(x, grouping, bounds, w1, b1, w2, b2, p_rows, activation)
        return sum_assignments(y, grouping), x.new_empty(0, w1.shape[1])

    x_rows = x.index_select(0, routed_tokens(grouping, routed))
    y_rows, h_pre = ffn_rows(x_rows, w1, b1, w2, b2, grouping, bounds, activation, hidden_dropout_p, seed, save)
    if p_rows is not None:
        y_rows *= p_rows
    return rows_to_tokens(y_rows, grouping), h_pre


def backward(
    dy: Tensor, x: Tensor, h_pre: Tensor, grouping: Grouping,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, routing_weights: Tensor | None,
    activation: str, hidden_dropout_p: float, seed: Tensor | None, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dw1, db1, dw2, db2, drouting_weights], None where `needs` is false."""
    bounds = host_bounds(grouping)
    tokens = routed_tokens(grouping, bounds[-1])
    p_rows = row_weights(routing_weights, grouping, bounds[-1])
    grads = ffn_rows_backward(
        dy.index_select(0, tokens), x.index_select(0, tokens), h_pre, w1, b1, w2, b2, grouping, bounds,
        activation, hidden_dropout_p, seed, p_rows, needs,
    )  # fmt: skip
    if grads[0] is not None:
        grads[0] = rows_to_tokens(grads[0], grouping)
    if grads[5] is not None:
        grads[5] = assignment_gradient(grads[5], grouping)
    return grads
