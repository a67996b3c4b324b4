"""Sums over each expert's rows: bias gradients, and partial sums of other kernels added in order."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import ceil_div, chunks_of, num_chunks, padded_experts, row_chunk

SUMS_CHUNK = 128  # rows of a program of `column_sums`
_ROWS, _COLUMNS, _REDUCE_BLOCK = 16, 128, 128


@triton.jit
def _column_sums_kernel(
    A, stride_am, stride_ak,  # (rows or T, N)
    Sums,  # (chunks, N) float32, contiguous
    Weights,  # (rows,) by assignment, or null
    Offsets, RowToToken,  # (E + 1,), (rows,) int32
    N, TOP_K,
    E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr, GATHER: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    expert, row0, end = row_chunk(Offsets, chunk, E, E_POW2, CHUNK)
    if expert >= E:
        return
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_columns = A + column.to(tl.int64)[None, :] * stride_ak
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(row0, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = row < end
        assignment = tl.load(RowToToken + row, mask=inside, other=0).to(tl.int64)
        row_a = assignment // TOP_K if GATHER else row.to(tl.int64)
        mask = inside[:, None] & (column < N)[None, :]
        a = tl.load(a_columns + row_a[:, None] * stride_am, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            a *= tl.load(Weights + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += a
    tl.store(Sums + chunk.to(tl.int64) * N + column, tl.sum(total, 0), mask=column < N)


@triton.jit(do_not_specialize=["chunks"])
def _add_chunks_kernel(
    Partials,  # (S, chunks, N) float32
    Y0, Y1, Y2,  # (E, N) of each of the S sums, or null
    Offsets, chunks, N,
    E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(2).to(tl.int64)
    first, end = chunks_of(Offsets, expert, E, E_POW2, CHUNK)
    partials = Partials + which * chunks * N + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for chunk0 in range(first, end, BLOCK_M):
        chunk = chunk0 + tl.arange(0, BLOCK_M)
        mask = (chunk < end)[:, None] & (column < N)[None, :]
        total += tl.load(partials + chunk.to(tl.int64)[:, None] * N, mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    place = expert.to(tl.int64) * N + column
    if Y0 is not None:
        tl.store(Y0 + place, sums.to(Y0.dtype.element_ty), mask=(column < N) & (which == 0))
    if Y1 is not None:
        tl.store(Y1 + place, sums.to(Y1.dtype.element_ty), mask=(column < N) & (which == 1))
    if Y2 is not None:
        tl.store(Y2 + place, sums.to(Y2.dtype.element_ty), mask=(column < N) & (which == 2))


def add_chunks(partials: Tensor, sums: Sequence[Tensor | None], offsets: Tensor, chunk: int) -> None:
    """Launch: the ordered sums of each expert's partials (S, chunks, N) float32, of `chunk` rows each.

    sums: S <= 3 tensors (E, N); None where nobody needs one.
    """
    which, chunks, columns = partials.shape
    num_experts = offsets.shape[0] - 1
    if columns == 0 or not any(y is not None for y in sums):
        return
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts), "CHUNK": chunk,
        "BLOCK_M": _ROWS, "BLOCK": _REDUCE_BLOCK,
    }  # fmt: skip
    grid = (num_experts, ceil_div(columns, _REDUCE_BLOCK), which)
    outputs = (*sums, None, None)[:3]
    launch(_add_chunks_kernel, grid, (partials, *outputs, offsets, chunks, columns), constants)


def column_sums(
    a: Tensor, sums: Tensor, grouping: Grouping, *, weights: Tensor | None = None, gather: bool = False
) -> None:
    """Launch: sums (num_chunks(.., SUMS_CHUNK), N) float32 of a (rows, N), or (T, N) with `gather`.

    weights: (T, top_k) contiguous; each row's share.
    """
    num_experts, columns, rows, top_k = grouping.num_experts, a.shape[1], grouping.num_rows, grouping.top_k
    if columns == 0:
        return
    arguments = (a, *a.stride(), sums, weights, grouping.offsets, grouping.row_to_assignment, columns, top_k)
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts), "CHUNK": SUMS_CHUNK, "GATHER": gather,
        "HAS_WEIGHTS": weights is not None, "BLOCK_M": _ROWS, "BLOCK_N": _COLUMNS,
    }  # fmt: skip
    grid = (num_chunks(rows, num_experts, SUMS_CHUNK), ceil_div(columns, _COLUMNS))
    launch(_column_sums_kernel, grid, arguments, constants)
