"""Sums over each expert's rows: bias gradients, and partial sums of other kernels added in order.

Partial sums of all that one backward needs stand next to each other, (chunks, W) with W the columns of all sums: one
launch makes those of both biases, and one adds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import MAPS, ceil_div, chunks_of, padded_experts, row_chunk

SUMS_CHUNK = 64  # rows of a program that sums over rows
_ROWS, _COLUMNS, _REDUCE_BLOCK = 16, 128, 128


class Summand(NamedTuple):
    """What is summed over each expert's rows: weights * a."""

    a: Tensor  # (rows, N) in row order, or (T, N) with `gather`; columns are adjacent
    weights: Tensor | None = None  # (T, top_k) contiguous; each row's share
    gather: bool = False


@triton.jit(do_not_specialize_on_alignment=MAPS)
def _column_sums_kernel(
    A0, stride_a0, N0,  # (rows or T, N0); columns are adjacent
    A1, stride_a1, N1,  # of the second summand, or the first again
    Weights,  # (rows,) by assignment, or null
    Sums, stride_sums,  # (chunks, N0 + N1) float32
    Offsets, RowToToken,  # (E + 1,), (rows,) int32
    TOP_K,
    E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr, TWO: tl.constexpr,
    GATHER0: tl.constexpr, GATHER1: tl.constexpr, WEIGHTED0: tl.constexpr, WEIGHTED1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    expert, row0, end = row_chunk(Offsets, chunk, E, E_POW2, CHUNK)
    if expert >= E:
        return
    block, second = tl.program_id(1), False
    base, stride, N, to = A0, stride_a0, N0, 0
    if TWO:
        second = block >= tl.cdiv(N0, BLOCK_N)
        block = tl.where(second, block - tl.cdiv(N0, BLOCK_N), block)
        base, stride = tl.where(second, A1, A0), tl.where(second, stride_a1, stride_a0)
        N, to = tl.where(second, N1, N0), tl.where(second, N0, 0)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(row0, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = row < end
        assignment = tl.load(RowToToken + row, mask=inside, other=0).to(tl.int64)
        row_a = row.to(tl.int64)
        if GATHER0 or GATHER1:
            row_a = tl.where(tl.where(second, GATHER1, GATHER0), assignment // TOP_K, row_a)
        mask = inside[:, None] & (column < N)[None, :]
        a = tl.load(base + row_a[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED0 or WEIGHTED1:
            weights = tl.load(Weights + assignment, mask=inside, other=0.0).to(tl.float32)
            a *= tl.where(tl.where(second, WEIGHTED1, WEIGHTED0), weights, 1.0)[:, None]
        total += a
    tl.store(Sums + chunk.to(tl.int64) * stride_sums + to + column, tl.sum(total, 0), mask=column < N)


@triton.jit
def _store_columns(Y, expert, column, sums, first, N):
    """The columns that are Y's, (E, N), where Y is not null."""
    if Y is not None:
        own = (column >= first) & (column < first + N)
        tl.store(Y + expert.to(tl.int64) * N + (column - first), sums.to(Y.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize_on_alignment=MAPS)
def _add_chunks_kernel(
    Partials,  # (chunks, N0 + N1 + N2 + N3) float32
    Y0, N0, Y1, N1, Y2, N2, Y3, N3,  # (E, N) each, or null; the columns of one that is null nobody needs
    Offsets,
    E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.cast(N0, tl.int64) + N1 + N2 + N3
    first, end = chunks_of(Offsets, expert, E, E_POW2, CHUNK)
    total = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for chunk0 in range(first, end, BLOCK_M):
        chunk = chunk0 + tl.arange(0, BLOCK_M)
        mask = (chunk < end)[:, None] & (column < columns)[None, :]
        total += tl.load(Partials + chunk.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    _store_columns(Y0, expert, column, sums, 0, N0)
    _store_columns(Y1, expert, column, sums, N0, N1)
    _store_columns(Y2, expert, column, sums, N0 + N1, N2)
    _store_columns(Y3, expert, column, sums, N0 + N1 + N2, N3)


def add_chunks(partials: Tensor, sums: Sequence[tuple[Tensor | None, int]], offsets: Tensor, chunk: int) -> None:
    """Launch: the ordered sums of each expert's partials (chunks, W) float32, contiguous, of `chunk` rows each.

    sums: at most four of (E, N) and N in the order of their columns, which are W together; None where nobody needs one.
    """
    columns, num_experts = partials.shape[1], offsets.shape[0] - 1
    if columns == 0 or all(y is None for y, _ in sums):
        return
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts), "CHUNK": chunk,
        "BLOCK_M": _ROWS, "BLOCK": _REDUCE_BLOCK,
    }  # fmt: skip
    padded = [*sums, (None, 0), (None, 0), (None, 0)][:4]
    arguments = (partials, *(part for pair in padded for part in pair), offsets)
    launch(_add_chunks_kernel, (num_experts, ceil_div(columns, _REDUCE_BLOCK)), arguments, constants)


def column_sums(summands: Sequence[Summand], sums: Tensor, grouping: Grouping) -> None:
    """Launch: sums (num_chunks(.., SUMS_CHUNK), W) float32 of one or two summands of one dtype, next to each other."""
    num_experts, (first, second) = grouping.num_experts, (summands[0], summands[-1])
    if sums.shape[1] == 0:
        return
    weights = first.weights if first.weights is not None else second.weights
    arguments = (
        first.a, first.a.stride(0), first.a.shape[1], second.a, second.a.stride(0), second.a.shape[1], weights,
        sums, sums.stride(0), grouping.offsets, grouping.row_to_assignment, grouping.top_k,
    )  # fmt: skip
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts), "CHUNK": SUMS_CHUNK, "TWO": len(summands) > 1,
        "GATHER0": first.gather, "GATHER1": second.gather,
        "WEIGHTED0": first.weights is not None, "WEIGHTED1": second.weights is not None,
        "BLOCK_M": _ROWS, "BLOCK_N": _COLUMNS,
    }  # fmt: skip
    blocks = sum(ceil_div(summand.a.shape[1], _COLUMNS) for summand in summands)
    launch(_column_sums_kernel, (sums.shape[0], blocks), arguments, constants)
