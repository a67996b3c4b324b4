"""Grouped GEMM as one library GEMM per non-empty expert, on rows sorted by expert.

`bounds` is `offsets` on the host: rows of expert e are bounds[e]:bounds[e + 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moebert_kernels.grouping import Grouping

Span = tuple[int, int, int]  # expert, first row, row past the last


def host_bounds(grouping: Grouping) -> list[int]:
    """The offsets as Python ints. On a GPU this waits for the device, where this backend is only the fallback."""
    return grouping.offsets.tolist()


def spans(bounds: list[int]) -> list[Span]:
    """Where each expert's rows are, without the experts that have none."""
    return [(e, lo, hi) for e, (lo, hi) in enumerate(pairwise(bounds)) if hi > lo]


def routed_tokens(grouping: Grouping, routed: int) -> Tensor:
    """(R,) token of each routed row."""
    assignments = grouping.row_to_assignment[:routed]
    return assignments if grouping.top_k == 1 else assignments // grouping.top_k


def linear(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x (M, K) @ w (N, K).T + bias, into out (M, N)."""
    return torch.mm(x, w.t(), out=out) if bias is None else torch.addmm(bias, x, w.t(), out=out)


def grouped_linear(x: Tensor, w: Tensor, bias: Tensor | None, bounds: list[int], out: Tensor) -> Tensor:
    """Rows (R, K) of each expert times its weight (E, N, K), plus its bias, into out (R, N)."""
    # One call that makes all experts' views costs as much as one that makes one expert's.
    counts = [hi - lo for lo, hi in pairwise(bounds)]
    rows_of, targets = torch.split_with_sizes(x, counts), torch.split_with_sizes(out, counts)
    views = zip(counts, rows_of, w.transpose(1, 2).unbind(), targets, strict=True)
    if bias is None:
        for count, rows, weight, target in views:
            if count:
                torch.mm(rows, weight, out=target)
    else:
        for (count, rows, weight, target), row in zip(views, bias.unbind(), strict=True):
            if count:
                torch.addmm(row, rows, weight, out=target)
    return out


def forward(x: Tensor, w: Tensor, bias: Tensor | None, grouping: Grouping, gather: bool) -> Tensor:
    """Rows (num_rows, N); zero past the routed ones."""
    bounds = host_bounds(grouping)
    routed = bounds[-1]
    rows = x.index_select(0, routed_tokens(grouping, routed)) if gather else x[:routed]
    y = x.new_empty(grouping.num_rows, w.shape[1])
    y[routed:].zero_()
    grouped_linear(rows, w, bias, bounds, y[:routed])
    return y


def weight_gradients(
    dy: Tensor, x: Tensor, bounds: list[int], num_experts: int, need_dw: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dw (E, N, K) and db (E, N) of y = x @ w[e].T + bias[e]; zero for experts without rows."""
    dw = dy.new_empty(num_experts, dy.shape[1], x.shape[1]) if need_dw else None
    db = dy.new_empty(num_experts, dy.shape[1]) if need_db else None
    for e, (lo, hi) in enumerate(pairwise(bounds)):
        if dw is not None:
            torch.mm(dy[lo:hi].t(), x[lo:hi], out=dw[e])
        if db is not None:
            torch.sum(dy[lo:hi], 0, out=db[e])
    return dw, db


def backward(
    dy: Tensor, x: Tensor, w: Tensor, grouping: Grouping, gather: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db); an entry is None where `needs` says so. dx has the order of x."""
    bounds = host_bounds(grouping)
    routed = bounds[-1]
    dy = dy.contiguous()
    dx = None
    if needs[0]:
        dx = dy.new_empty(grouping.num_rows, w.shape[2])
        dx[routed:].zero_()
        grouped_linear(dy[:routed], w.transpose(1, 2), None, bounds, dx[:routed])
        if gather:
            dx = rows_to_tokens(dx[:routed], grouping)
    if gather and (needs[1] or needs[2]):
        x = x.index_select(0, routed_tokens(grouping, routed))
    dw, db = weight_gradients(dy, x, bounds, w.shape[0], needs[1], needs[2])
    return dx, dw, db


def row_to_assignment(grouping: Grouping, routed: int) -> Tensor:
    """(R,) int64: `index_copy_` takes no int32."""
    return grouping.row_to_assignment[:routed].long()


def rows_to_tokens(rows: Tensor, grouping: Grouping) -> Tensor:
    """Routed rows (R, H) back to token order (T, H), summed over a token's experts; zero where it has none."""
    if rows.shape[0] == grouping.num_rows:
        return sum_assignments(rows.index_select(0, grouping.assignment_to_row), grouping)
    assignments = rows.new_zeros(grouping.num_rows, rows.shape[1])
    return sum_assignments(assignments.index_copy_(0, row_to_assignment(grouping, rows.shape[0]), rows), grouping)


def sum_assignments(y: Tensor, grouping: Grouping) -> Tensor:
    """(T * top_k, H) in assignment order -> (T, H)."""
    return y if grouping.top_k == 1 else y.view(grouping.num_tokens, grouping.top_k, y.shape[1]).sum(1)
