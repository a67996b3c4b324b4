"""Weight gradients: sums over each expert's rows, split into fixed chunks of rows.

    dW[e] = sum_r A[from_a(r)].T * B[from_b(r)]      dbias[e] = sum_r weight[r] * A[from_a(r)]

With few experts the tiles of dW alone leave most of a GPU idle, and the largest expert decides the time. So one program
sums one tile over one chunk of an expert's rows into float32 partials, and a second kernel adds an expert's chunks in
their order: the work is even whatever the routing, and the result the same every time. An expert without rows has one
chunk of none, which writes its zeros. Groups that fit into one chunk skip the partials.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.config import Config, precision_of
from moebert_kernels.kernels.expert_gemm import INTERPRETED
from moebert_kernels.kernels.tiles import chunks_of, num_chunks, padded_experts, row_chunk

_REDUCE_BLOCK = 1024


@triton.jit
def _expert_gemm_weights_kernel(
    A, stride_am, stride_ak,  # (rows or T, M)
    B, stride_bm, stride_bk,  # (rows or T, N)
    DW,  # (E or chunks, M, N) contiguous, or null
    DBias,  # (E or chunks, M) contiguous, or null
    Weights,  # (rows,) by assignment, or null
    Offsets, RowToToken,  # (E + 1,), (rows,) int32
    M, N, TOP_K,
    E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    HAS_DW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    chunk = tl.program_id(0) // tiles
    expert, row0, end = row_chunk(Offsets, chunk, E, E_POW2, CHUNK)
    if expert >= E:
        return
    tile = tl.program_id(0) % tiles
    tile_n = tile % tiles_n
    offs_m = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_columns = A + offs_m.to(tl.int64)[None, :] * stride_ak
    b_columns = B + offs_n.to(tl.int64)[None, :] * stride_bk

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(row0, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        inside = row < end
        assignment = tl.load(RowToToken + row, mask=inside, other=0).to(tl.int64)
        row_a = assignment // TOP_K if GATHER_A else row.to(tl.int64)
        row_b = assignment // TOP_K if GATHER_B else row.to(tl.int64)
        mask_a = inside[:, None] if EVEN else inside[:, None] & (offs_m < M)[None, :]
        a = tl.load(a_columns + row_a[:, None] * stride_am, mask=mask_a, other=0.0)
        if HAS_DW:
            mask_b = inside[:, None] if EVEN else inside[:, None] & (offs_n < N)[None, :]
            b = tl.load(b_columns + row_b[:, None] * stride_bm, mask=mask_b, other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        if HAS_BIAS:
            if tile_n == 0:  # the other tiles of these columns would sum the same
                if HAS_WEIGHTS:
                    weight = tl.load(Weights + assignment, mask=inside, other=0.0).to(tl.float32)
                    bias += tl.sum(a.to(tl.float32) * weight[:, None], 0)
                else:
                    bias += tl.sum(a.to(tl.float32), 0)

    slot = (chunk if SPLIT else expert).to(tl.int64)
    if HAS_DW:
        target = DW + slot * M * N + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        tl.store(target, acc.to(DW.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
    if HAS_BIAS:
        if tile_n == 0:
            tl.store(DBias + slot * M + offs_m, bias.to(DBias.dtype.element_ty), mask=offs_m < M)


@triton.jit
def _reduce_chunks_kernel(
    Partials,  # (chunks, N) float32
    Y,  # (E, N)
    Offsets, N,
    E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    expert = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first, end = chunks_of(Offsets, expert, E, E_POW2, CHUNK)
    total = tl.zeros((BLOCK,), tl.float32)
    partials = Partials + first.to(tl.int64) * N + column
    for _ in range(first, end):
        total += tl.load(partials, mask=column < N, other=0.0)
        partials += N
    tl.store(Y + expert.to(tl.int64) * N + column, total.to(Y.dtype.element_ty), mask=column < N)


def reduce_chunks(partials: Tensor, y: Tensor, offsets: Tensor, chunk: int) -> None:
    """Launch: y (E, ...) = the ordered sums of each expert's partials (chunks, ...)."""
    num_experts = y.shape[0]
    columns = y.numel() // num_experts
    if columns == 0:
        return
    _reduce_chunks_kernel[(num_experts * triton.cdiv(columns, _REDUCE_BLOCK),)](
        partials, y, offsets, columns,
        E=num_experts, E_POW2=padded_experts(num_experts), CHUNK=chunk, BLOCK=_REDUCE_BLOCK,
    )  # fmt: skip


def expert_gemm_weights(
    a: Tensor, b: Tensor, dw: Tensor | None, dbias: Tensor | None, grouping: Grouping, *, chunk: int, config: Config,
    split: bool, weights: Tensor | None = None, gather_a: bool = False, gather_b: bool = False,
) -> None:  # fmt: skip
    """Launch: dw[e] = a.T @ b and dbias[e] = sum of a, over the rows of each expert.

    Args:
        a: (rows, M) in row order, or (T, M) with `gather_a`; likewise b (rows or T, N).
        dw: (E, M, N), or (num_chunks, M, N) float32 partials with `split`; likewise dbias (E or num_chunks, M).
            Either may be None.
        weights: (T, top_k) contiguous; each row's share in dbias. dw's must be in `b` already.
    """
    columns_a, num_experts = a.shape[1], grouping.num_experts
    columns_b = 1 if dw is None else b.shape[1]  # the sums alone need one tile of columns
    chunks = num_chunks(grouping.num_rows, num_experts, chunk)
    tiles = triton.cdiv(columns_a, config.BLOCK_M) * triton.cdiv(columns_b, config.BLOCK_N)
    if tiles == 0:
        return
    _expert_gemm_weights_kernel[(chunks * tiles,)](
        a, *a.stride(),
        b, *b.stride(),
        dw, dbias, weights,
        grouping.offsets, grouping.row_to_token,
        columns_a, columns_b, grouping.top_k,
        E=num_experts, E_POW2=padded_experts(num_experts), CHUNK=chunk, SPLIT=split,
        GATHER_A=gather_a, GATHER_B=gather_b,
        HAS_DW=dw is not None, HAS_BIAS=dbias is not None, HAS_WEIGHTS=weights is not None,
        EVEN=columns_a % config.BLOCK_M == 0 and columns_b % config.BLOCK_N == 0,
        PRECISION="tf32" if precision_of(a.dtype) == "tf32" else "ieee",
        UPCAST=INTERPRETED and a.element_size() == 2,
        **config.options(),
    )  # fmt: skip
