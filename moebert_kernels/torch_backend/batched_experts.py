"""Inference in float32 on a CPU: batched GEMMs over experts of similar size.

A batch gives each thread whole products, without a barrier in every GEMM; pairing experts by size keeps the padding
small. With few rows per expert the weights are most of what a GEMM reads: MKL is then faster on h' = w1 x' than on
x w1'. Rows live in a padded layout (batches, n, M, H); whatever stands in the padding never leaves it.
Numbers: docs/experiments.md, 2026-11-21.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy
import torch
from torch import Tensor

from moebert_kernels.cpu import is_amd
from moebert_kernels.grouping import Grouping
from moebert_kernels.torch_backend.activation import activate
from moebert_kernels.torch_backend.expert_gemm import Span, row_to_assignment, spans

_WEIGHT_LEFT = 64  # rows up to which h' = w1 x' is the faster form
_PADDING = 1.4  # of the rows: up to here one batch of all experts beats pairs


def applies(x: Tensor) -> bool:
    """Whether to take this path. On AMD's CPUs, MKL's batched products are slower than one product after the other."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not is_amd()


@dataclass
class _Batch:
    """`size` experts at equal distances, in `rows` padded rows each, from padded row `base` on."""

    experts: slice
    size: int
    rows: int
    base: int

    @staticmethod
    def of(members: list[Span], base: int) -> _Batch:
        first, last = members[0][0], members[-1][0]
        step = max((last - first) // max(len(members) - 1, 1), 1)
        return _Batch(slice(first, last + 1, step), len(members), max(hi - lo for _, lo, hi in members), base)

    def view(self, padded: Tensor) -> Tensor:
        """(n, M, columns) of this batch."""
        return padded[self.base : self.base + self.size * self.rows].view(self.size, self.rows, -1)


class _Layout:
    """Where each routed row stands among the padded ones."""

    def __init__(self, grouping: Grouping, bounds: list[int]) -> None:
        self.batches: list[_Batch] = []
        shift = [0] * grouping.num_experts  # padded row minus grouped row
        base = 0
        for members in _similar(spans(bounds), grouping.num_experts):
            batch = _Batch.of(members, base)
            self.batches.append(batch)
            for e, lo, _ in members:
                shift[e] = base - lo
                base += batch.rows
        # numpy: a dozen steps on a few hundred integers, where a call of torch costs more than its work.
        counts = [hi - lo for lo, hi in pairwise(bounds)]
        row_to_padded = numpy.arange(bounds[-1]) + numpy.repeat(shift, counts)
        padded_to_token = numpy.zeros(base, dtype=numpy.int64)
        padded_to_token[row_to_padded] = grouping.row_to_assignment[: bounds[-1]].numpy() // grouping.top_k
        self.padded_to_token = torch.from_numpy(padded_to_token)  # padding repeats token 0
        self.row_to_padded = row_to_padded

    def scatter(self, padded: Tensor, grouping: Grouping, skipped: Tensor | None, p_rows: Tensor | None) -> Tensor:
        """(num_rows, H) in assignment order; `skipped` (num_rows, H) is what skipped assignments get, None zeros."""
        routed = self.row_to_padded.shape[0]
        if routed == grouping.num_rows and p_rows is None:
            token_to_padded = self.row_to_padded[grouping.assignment_to_row.numpy()]
            return padded.index_select(0, torch.from_numpy(token_to_padded))
        rows = padded.index_select(0, torch.from_numpy(self.row_to_padded))
        if p_rows is not None:
            rows *= p_rows
        if routed == grouping.num_rows:
            return rows.index_select(0, grouping.assignment_to_row)
        if skipped is None:
            y = rows.new_zeros(grouping.num_rows, rows.shape[1])
        else:
            y = skipped.clone(memory_format=torch.contiguous_format)
        return y.index_copy_(0, row_to_assignment(grouping, routed), rows)


def _similar(experts: list[Span], num_experts: int) -> list[list[Span]]:
    """Experts to batch: all if their sizes are close and small, else pairs by size. Each is in order of experts."""
    largest = max(hi - lo for _, lo, hi in experts)
    total = sum(hi - lo for _, lo, hi in experts)
    if len(experts) == num_experts and largest <= _WEIGHT_LEFT and largest * num_experts <= _PADDING * total:
        return [experts]
    return _pairs_by_size(experts)


def _pairs_by_size(experts: list[Span]) -> list[list[Span]]:
    by_size = sorted(experts, key=lambda span: span[2] - span[1], reverse=True)
    return [sorted(by_size[i : i + 2]) for i in range(0, len(by_size), 2)]


def _hidden(x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(x (n, M, K) @ w (n, N, K)' + bias (n, N)); strided like its transpose if there are few rows."""
    if x.shape[1] > _WEIGHT_LEFT:
        w = w.transpose(1, 2)
        h = torch.bmm(x, w) if bias is None else torch.baddbmm(bias[:, None], x, w)
    else:
        x = x.transpose(1, 2)
        h = torch.bmm(w, x) if bias is None else torch.baddbmm(bias[:, :, None], w, x)
        h = h.transpose(1, 2)
    return activate(h, activation, inplace=True)


def _output_onto(rows: Tensor, h: Tensor, w: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    """rows (n, M, N) = [rows +] h (n, M, K) @ w (n, N, K)' + bias, in place."""
    if rows.shape[1] > _WEIGHT_LEFT:
        rows.baddbmm_(h, w.transpose(1, 2), beta=1.0 if residual else 0.0)
        return rows if bias is None else rows.add_(bias[:, None])
    h = h.transpose(1, 2)
    y = torch.bmm(w, h) if bias is None else torch.baddbmm(bias[:, :, None], w, h)
    return rows.add_(y.transpose(1, 2)) if residual else rows.copy_(y.transpose(1, 2))


def _run(
    rows: Tensor, batch: _Batch, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    activation: str, residual: bool,
) -> None:  # fmt: skip
    """rows (n, M, H) = [rows +] FFN(rows), in place."""
    e = batch.experts
    h = _hidden(rows, w1[e], None if b1 is None else b1[e], activation)
    _output_onto(rows, h, w2[e], None if b2 is None else b2[e], residual)


def ffn(
    x: Tensor, grouping: Grouping, bounds: list[int], w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    p_rows: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """Few rows: p * FFN_e(x) in assignment order (num_rows, H); zero for skipped assignments."""
    layout = _Layout(grouping, bounds)
    padded = x.index_select(0, layout.padded_to_token)
    for batch in layout.batches:
        _run(batch.view(padded), batch, w1, b1, w2, b2, activation, residual=False)
    return layout.scatter(padded, grouping, None, p_rows)


def ffn_add_norm(
    x: Tensor, grouping: Grouping, bounds: list[int], w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, p_rows: Tensor | None, eps: float, activation: str,
) -> Tensor:  # fmt: skip
    """Few rows: p * LN_e(x + FFN_e(x)) in token order (T, H); x for skipped tokens."""
    layout = _Layout(grouping, bounds)
    padded = x.index_select(0, layout.padded_to_token)
    for batch in layout.batches:
        e, rows = batch.experts, batch.view(padded)
        _run(rows, batch, w1, b1, w2, b2, activation, residual=True)
        normed = torch.layer_norm(rows, rows.shape[2:], None, None, eps)
        torch.addcmul(norm_bias[e, None], normed, norm_weight[e, None], out=rows)
    return layout.scatter(padded, grouping, x, p_rows)
