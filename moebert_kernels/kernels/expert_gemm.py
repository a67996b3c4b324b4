"""Grouped GEMM over ragged groups of rows, in Triton.

One program computes one (BLOCK_M, BLOCK_N) tile of Y and never crosses an expert boundary:

    Y[to(r)] = (A[from(r)] @ W[e].T + bias[e]) * weight[r] + residual[r]        r in a row tile of expert e

from(r) is r or, with GATHER, the token of row r; to(r) is r or, with SCATTER, its assignment. Rows without an expert
are tiles of their own that write zeros (or SKIPPED's rows), so every element of Y is written by this kernel. Programs
with the same rows are neighbours: A's rows come from HBM once, the weights of few experts stay in the L2.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.config import (
    Config,
    Device,
    Kind,
    candidates,
    pick_config,
    precision_of,
    programs_per_multiprocessor,
    slices_of,
)
from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import (
    MAPS,
    ceil_div,
    column_slices,
    num_expert_tiles,
    num_row_tiles,
    padded_experts,
    row_tile,
)

INTERPRETED = triton.knobs.runtime.interpret


def dot_options(a: Tensor, columns: int, depth: int, config: Config) -> dict[str, Any]:
    """Constants of the main loop. The interpreter multiplies the raw bits of bfloat16, so there it is upcast first."""
    return {
        "EVEN": columns % config.BLOCK_N == 0 and depth % config.BLOCK_K == 0,
        "PRECISION": "tf32" if precision_of(a.dtype) == "tf32" else "ieee",
        "UPCAST": INTERPRETED and a.element_size() == 2,
    }


@triton.jit
def dot_rows(
    a_ptrs, stride_ak,  # (BLOCK_M, BLOCK_K) pointers to the first columns of the rows
    w_ptrs, stride_wk, mask_n,  # (BLOCK_K, BLOCK_N), (BLOCK_N,)
    acc, K,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc += A @ W.T over K columns. Without EVEN, loads are masked."""
    offs_k = tl.arange(0, BLOCK_K)
    for k in range(0, K, BLOCK_K):
        if EVEN:
            a, w = tl.load(a_ptrs), tl.load(w_ptrs)
        else:
            inside = offs_k < K - k
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None] & mask_n[None, :], other=0.0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        w_ptrs += BLOCK_K * stride_wk
    return acc


@triton.jit
def weight_blocks(
    W, stride_we, stride_w, N, K,  # (E, N, K), or (E, K, N) with TRANSPOSED
    E: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The descriptor of weights, for `dot_blocks`."""
    if TRANSPOSED:
        blocks = tl.make_tensor_descriptor(W, [E, K, N], [stride_we, stride_w, 1], [1, BLOCK_K, BLOCK_N])
    else:
        blocks = tl.make_tensor_descriptor(W, [E, N, K], [stride_we, stride_w, 1], [1, BLOCK_N, BLOCK_K])
    return blocks


@triton.jit
def dot_blocks(
    a_blocks, w_blocks, row0, owner, first_n, K,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) of A @ W[owner].T over K columns, both read by descriptors.

    These read zeros outside of a tensor. Inside they may read the rows of the next expert; nothing of these is stored.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = a_blocks.load([row0, k])
        if TRANSPOSED:
            w = w_blocks.load([owner, k, first_n]).reshape(BLOCK_K, BLOCK_N)
        else:
            w = w_blocks.load([owner, first_n, k]).reshape(BLOCK_N, BLOCK_K).T
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(a, w, acc)
    return acc


@triton.jit
def _finish_slice(
    acc, expert, owner, row, assignment, mask_m, offs_n, N,
    Y, stride_ym, Bias, stride_be, stride_bn, Weights, Residual, stride_rm, Skipped, stride_sm, stride_sn,
    E: tl.constexpr, SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SKIPPED: tl.constexpr,
):  # fmt: skip
    """The epilogue of some columns of a tile, and their store. Of rows past the last, `row` is any of the tile."""
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    column = offs_n.to(tl.int64)
    if HAS_BIAS:
        bias = tl.load(Bias + owner * stride_be + column * stride_bn, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if HAS_WEIGHTS:
        acc *= tl.load(Weights + assignment, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        read = mask & (expert != E)  # nobody may have written the residual of skipped rows
        residual = tl.load(Residual + row[:, None] * stride_rm + offs_n[None, :], mask=read, other=0.0)
        acc += residual.to(tl.float32)
    if expert == E:
        acc = tl.zeros(acc.shape, tl.float32)
        if HAS_SKIPPED:
            skipped_ptrs = Skipped + assignment[:, None] * stride_sm + column[None, :] * stride_sn
            acc = tl.load(skipped_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_row = assignment if SCATTER else row
    tl.store(Y + y_row[:, None] * stride_ym + offs_n[None, :], acc.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=MAPS)
def _expert_gemm_kernel(
    A, stride_am, stride_ak,  # (rows or T, K)
    W, stride_we, stride_wn, stride_wk,  # (E, N, K)
    Y, stride_ym,  # (rows, N)
    Bias, stride_be, stride_bn,  # (E, N) or null
    Weights,  # (rows,) by assignment, or null
    Residual, stride_rm,  # (rows, N) by row, or null
    Skipped, stride_sm, stride_sn,  # (rows, N) by assignment, or null
    Offsets, RowToToken,  # (E + 1,), (rows,) int32
    rows, N, K, TOP_K,
    E: tl.constexpr, E_POW2: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SKIPPED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    expert, row0, end = row_tile(Offsets, tl.program_id(0) // tiles_n, rows, E, E_POW2, BLOCK_M)
    if expert > E:
        return
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    row = row0 + tl.arange(0, BLOCK_M)
    mask_m = row < end
    mask_n = offs_n < N
    assignment = tl.load(RowToToken + row, mask=mask_m, other=0).to(tl.int64)
    row = tl.where(mask_m, row, row0).to(tl.int64)  # loads past the end are of the first row; nothing is stored there

    # rows without an expert have nothing to sum
    depth = tl.where(expert < E, K, 0)
    owner = tl.minimum(expert, E - 1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    column = offs_n.to(tl.int64)
    a_row = assignment // TOP_K if GATHER else row
    acc = dot_rows(
        A + a_row[:, None] * stride_am + offs_k[None, :] * stride_ak, stride_ak,
        W + owner * stride_we + column[None, :] * stride_wn + offs_k[:, None] * stride_wk, stride_wk,
        mask_n, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), depth, BLOCK_K, EVEN, PRECISION, UPCAST,
    )  # fmt: skip

    slices = column_slices(acc, SLICES)
    for i in tl.static_range(SLICES):
        _finish_slice(
            slices[i], expert, owner, row, assignment, mask_m,
            first_n + i * (BLOCK_N // SLICES) + tl.arange(0, BLOCK_N // SLICES), N,
            Y, stride_ym, Bias, stride_be, stride_bn, Weights, Residual, stride_rm, Skipped, stride_sm, stride_sn,
            E, SCATTER, HAS_BIAS, HAS_WEIGHTS, HAS_RESIDUAL, HAS_SKIPPED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=MAPS)
def _expert_gemm_descriptors_kernel(
    A, stride_am,  # (rows, K)
    W, stride_we, stride_w,  # (E, N, K), or (E, K, N) with TRANSPOSED
    Y, stride_ym,
    Bias, stride_be, stride_bn,
    Weights,
    Residual, stride_rm,
    Skipped, stride_sm, stride_sn,
    Offsets, RowToToken,
    rows, N,
    K: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SKIPPED: tl.constexpr,
    UPCAST: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_expert_gemm_kernel` without GATHER, by the tensor memory accelerator and with programs that take many tiles."""
    a_blocks = tl.make_tensor_descriptor(A, [rows, K], [stride_am, 1], [BLOCK_M, BLOCK_K])
    w_blocks = weight_blocks(W, stride_we, stride_w, N, K, E, TRANSPOSED, BLOCK_N, BLOCK_K)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = num_expert_tiles(Offsets, E, E_POW2, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        expert, row0, end = row_tile(Offsets, tile // tiles_n, rows, E, E_POW2, BLOCK_M)
        first_n = tile % tiles_n * BLOCK_N
        acc = dot_blocks(
            a_blocks, w_blocks, row0, expert, first_n, K, TRANSPOSED, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
        row = row0 + tl.arange(0, BLOCK_M)
        mask_m = row < end
        assignment = tl.load(RowToToken + row, mask=mask_m, other=0).to(tl.int64)
        row = tl.where(mask_m, row, row0).to(tl.int64)
        slices = column_slices(acc, SLICES)
        for i in tl.static_range(SLICES):
            _finish_slice(
                slices[i], -1, expert.to(tl.int64), row, assignment, mask_m,
                first_n + i * (BLOCK_N // SLICES) + tl.arange(0, BLOCK_N // SLICES), N,
                Y, stride_ym, Bias, stride_be, stride_bn, Weights, Residual, stride_rm, Skipped, stride_sm, stride_sn,
                E, SCATTER, HAS_BIAS, HAS_WEIGHTS, HAS_RESIDUAL, HAS_SKIPPED,
            )  # fmt: skip
    # rows without an expert: nothing to sum
    first_row = tl.load(Offsets + E)
    for tile in range(tl.program_id(0), tl.cdiv(rows - first_row, BLOCK_M) * tiles_n, tl.num_programs(0)):
        row = first_row + tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (column < N)[None, :]
        assignment = tl.load(RowToToken + row, mask=row < rows, other=0).to(tl.int64)
        y = tl.zeros((BLOCK_M, BLOCK_N), Y.dtype.element_ty)
        if HAS_SKIPPED:
            skipped_ptrs = Skipped + assignment[:, None] * stride_sm + column.to(tl.int64)[None, :] * stride_sn
            y = tl.load(skipped_ptrs, mask=mask, other=0.0).to(Y.dtype.element_ty)
        y_row = assignment if SCATTER else row.to(tl.int64)
        tl.store(Y + y_row[:, None] * stride_ym + column[None, :], y, mask=mask)


def expert_gemm(
    a: Tensor, w: Tensor, y: Tensor, grouping: Grouping, *, bias: Tensor | None = None, weights: Tensor | None = None,
    residual: Tensor | None = None, skipped: Tensor | None = None, gather: bool = False, scatter: bool = False,
    config: Config | None = None, descriptors: bool | None = None,
) -> None:  # fmt: skip
    """Launch: y = a @ w[e].T + bias[e], times the routing weight, plus the residual; arguments are checked by the op.

    Args:
        a: (rows, K) in row order, or (T, K) with `gather`.
        w: (E, N, K), any strides.
        y: (rows, N) contiguous; in row order, or with `scatter` in assignment order.
        weights: (T, top_k) contiguous routing weights.
        residual: (rows, N) contiguous, in row order; nothing is read for rows without an expert.
        skipped: (rows, N), in assignment order: the result where no expert is, instead of zero.
        descriptors: whether TMA reads a and w; None: on sm_90 where it can.
    """
    rows, (num_experts, columns, depth) = grouping.num_rows, w.shape
    if rows == 0 or columns == 0:
        return
    kind: Kind = "rows" if residual is None else "residual"
    device = Device.of(a.device)
    tile = config or pick_config(kind, rows, num_experts, columns, depth, a.dtype, device)
    tiles = num_row_tiles(rows, num_experts, tile.BLOCK_M) * ceil_div(columns, tile.BLOCK_N)
    if descriptors is None:
        descriptors = not gather and can_be_described(a, w, tile, device)
    arguments = (
        y, y.stride(0),
        bias, *((0, 0) if bias is None else bias.stride()),
        weights,
        residual, 0 if residual is None else residual.stride(0),
        skipped, *((0, 0) if skipped is None else skipped.stride()),
        grouping.offsets, grouping.row_to_assignment,
        rows, columns,
    )  # fmt: skip
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts), "SCATTER": scatter,
        "HAS_BIAS": bias is not None, "HAS_WEIGHTS": weights is not None,
        "HAS_RESIDUAL": residual is not None, "HAS_SKIPPED": skipped is not None,
        "SLICES": slices_of(tile, False) if a.element_size() == 2 else 1,  # in tf32 slices spill on sm_100
    }  # fmt: skip
    if descriptors:
        operands, options = described(a, w, tile)
        grid = (min(tiles, programs_of(tile, "descriptors", device)),)
        launch(_expert_gemm_descriptors_kernel, grid, (*operands, *arguments), constants | options)
    else:
        constants |= {"GATHER": gather, **dot_options(a, columns, depth, tile), **tile.options()}
        operands = (a, *a.stride(), w, *w.stride())
        launch(_expert_gemm_kernel, (tiles,), (*operands, *arguments, depth, grouping.top_k), constants)


def can_be_described(a: Tensor, w: Tensor, tile: Config, device: Device) -> bool:
    """Whether TMA reads a (rows, K) and w (E, N, K) on this device, for tiles of many rows.

    It wants 16 bits, adjacent columns of a and of w or its transpose, and rows that begin at multiples of 16 bytes,
    each at another one (no expanded tensors). Where the environment has MOEBERT_KERNELS_DESCRIPTORS=0, pointers do.
    """
    refused = os.environ.get("MOEBERT_KERNELS_DESCRIPTORS") == "0" or w.shape[2] == 0
    if refused or tile not in candidates("descriptors", precision_of(a.dtype), device.arch):
        return False
    across = w.stride(1) if w.stride(2) == 1 else w.stride(2)
    steps = (a.stride(0), w.stride(0), across)
    begins = (a.data_ptr() // 2, w.data_ptr() // 2)
    adjacent = a.stride(1) == 1 and 1 in w.stride()[1:]
    return adjacent and all(steps) and all(step % 8 == 0 for step in (*steps, *begins))


def described(a: Tensor, w: Tensor, tile: Config) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and constants of kernels that read a and w by descriptors."""
    transposed = w.stride(2) != 1
    upcast = INTERPRETED and a.element_size() == 2
    options = {"K": a.shape[1], "TRANSPOSED": transposed, "UPCAST": upcast, **tile.options()}
    return (a, a.stride(0), w, w.stride(0), w.stride(2 if transposed else 1)), options


def programs_of(tile: Config, kind: Kind, device: Device) -> int:
    """How many programs of a kernel run at once."""
    return device.multiprocessors * max(1, programs_per_multiprocessor(tile, kind, "half", device))
