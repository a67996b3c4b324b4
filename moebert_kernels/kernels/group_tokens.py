"""Grouping in two launches for all layers: count, then place. Stable, without atomics, without a look from the host.

A program owns a span of tokens and walks it in blocks small enough to compare with every expert at once:

    count:  Counts[l, s, e] = tokens of expert e in span s          (e = E: skipped)
    place:  row = rows of experts before e + tokens of e before this one

Traffic: the ids twice, Counts once per span, the two permutations once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import ceil_div, padded_experts

_SPAN = 1024  # tokens of a program
_COMPARISONS = 8192  # of a block: tokens times experts
_SPANS_AT_ONCE = 16


def num_spans(tokens: int) -> int:
    return ceil_div(tokens, _SPAN)


@triton.jit
def _block_of(ExpertIds, stride_layer, stride_row, layer, first, rows, E: tl.constexpr, E_POW2: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Row numbers of a block and a (BLOCK, E_POW2) indicator of their experts; rows past the end have none."""
    row = first + tl.arange(0, BLOCK)
    ids = tl.load(ExpertIds + layer * stride_layer + row * stride_row, mask=row < rows, other=-1).to(tl.int64)
    ids = tl.where((ids >= 0) & (ids < E), ids, E)
    ids = tl.where(row < rows, ids, E_POW2).to(tl.int32)
    return row, (ids[:, None] == tl.arange(0, E_POW2)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["stride_layer", "rows", "spans"])
def _count_kernel(
    ExpertIds, stride_layer, stride_row,  # (L, rows)
    Counts,  # (L, spans, E_POW2) int32
    rows, spans,
    E: tl.constexpr, E_POW2: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    span, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = span.to(tl.int64) * SPAN
    counts = tl.zeros((E_POW2,), tl.int32)
    for i in range(0, SPAN, BLOCK):
        _, chosen = _block_of(ExpertIds, stride_layer, stride_row, layer, first + i, rows, E, E_POW2, BLOCK)
        counts += tl.sum(chosen, 0)
    tl.store(Counts + (layer * spans + span) * E_POW2 + tl.arange(0, E_POW2), counts)


@triton.jit(do_not_specialize=["stride_layer", "rows", "spans"])
def _place_kernel(
    ExpertIds, stride_layer, stride_row,  # (L, rows)
    Counts,  # (L, spans, E_POW2) int32
    Offsets,  # (L, E + 1) int32
    RowToToken, TokenToRow,  # (L, rows) int32
    rows, spans,
    E: tl.constexpr, E_POW2: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, SPANS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    span, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = span.to(tl.int64) * SPAN
    e = tl.arange(0, E_POW2)
    total = tl.zeros((E_POW2,), tl.int32)
    before = tl.zeros((E_POW2,), tl.int32)
    for s in range(0, spans, SPANS_AT_ONCE):
        spans_here = s + tl.arange(0, SPANS_AT_ONCE)
        counts = tl.load(
            Counts + (layer * spans + spans_here)[:, None] * E_POW2 + e[None, :],
            mask=(spans_here < spans)[:, None], other=0,
        )  # fmt: skip
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((spans_here < span)[:, None], counts, 0), 0)
    starts = tl.cumsum(total, 0) - total
    if span == 0:
        tl.store(Offsets + layer * (E + 1) + e, starts, mask=e <= E)

    next_row = starts + before
    for i in range(0, SPAN, BLOCK):
        token, chosen = _block_of(ExpertIds, stride_layer, stride_row, layer, first + i, rows, E, E_POW2, BLOCK)
        rank = tl.cumsum(chosen, 0) - 1
        row = tl.sum(chosen * (rank + next_row[None, :]), 1)
        tl.store(RowToToken + layer * rows + row, token.to(tl.int32), mask=token < rows)
        tl.store(TokenToRow + layer * rows + token, row, mask=token < rows)
        next_row += tl.sum(chosen, 0)


def group_tokens(
    expert_ids: Tensor,
    num_experts: int,
    counts: Tensor,
    offsets: Tensor,
    row_to_assignment: Tensor,
    assignment_to_row: Tensor,
) -> None:
    """Launch: the maps of expert_ids (L, N >= 1); counts is (L, num_spans(N), padded_experts(E)) int32 of scratch."""
    layers, rows = expert_ids.shape
    spans, padded = counts.shape[1:]
    block = max(16, min(_SPAN, _COMPARISONS // padded))
    warps = 8 if padded > 1024 else 4  # 4 spill: 16 tokens, compared with 2,048 experts
    sizes = {"E": num_experts, "E_POW2": padded, "SPAN": _SPAN, "BLOCK": block, "num_warps": warps}
    ids = (expert_ids, *expert_ids.stride())
    launch(_count_kernel, (spans, layers), (*ids, counts, rows, spans), sizes)
    arguments = (*ids, counts, offsets, row_to_assignment, assignment_to_row, rows, spans)
    launch(_place_kernel, (spans, layers), arguments, sizes | {"SPANS_AT_ONCE": _SPANS_AT_ONCE})


__all__ = ["group_tokens", "num_spans", "padded_experts"]
