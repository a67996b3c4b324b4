"""Grouped GEMM over ragged groups of rows, in Triton.

One program computes one (BLOCK_M, BLOCK_N) tile of Y and never crosses an expert boundary:

    Y[to(r)] = (A[from(r)] @ W[e].T + bias[e]) * weight[r] + residual[r]        r in a row tile of expert e

from(r) is r or, with GATHER, the token of row r; to(r) is r or, with SCATTER, its assignment. Rows without an expert
are tiles of their own that write zeros (or SKIPPED's rows), so every element of Y is written by this kernel. Programs
with the same rows are neighbours: A's rows come from HBM once, the weights of few experts stay in the L2.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.config import Config, Device, Kind, pick_config, precision_of
from moebert_kernels.kernels.launch import Launcher, layout
from moebert_kernels.kernels.tiles import ceil_div, num_row_tiles, padded_experts, row_tile

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


@triton.jit(do_not_specialize=["rows"])
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
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    expert, row0, end = row_tile(Offsets, tl.program_id(0) // tiles_n, rows, E, E_POW2, BLOCK_M)
    if expert > E:
        return
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = row0 + tl.arange(0, BLOCK_M)
    mask_m = row < end
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
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

    if HAS_BIAS:
        bias = tl.load(Bias + owner * stride_be + column * stride_bn, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if HAS_WEIGHTS:
        acc *= tl.load(Weights + assignment, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        residual = tl.load(Residual + row[:, None] * stride_rm + offs_n[None, :], mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    if expert == E:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_SKIPPED:
            skipped_ptrs = Skipped + assignment[:, None] * stride_sm + column[None, :] * stride_sn
            acc = tl.load(skipped_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_row = assignment if SCATTER else row
    tl.store(Y + y_row[:, None] * stride_ym + offs_n[None, :], acc.to(Y.dtype.element_ty), mask=mask)


def expert_gemm(
    a: Tensor, w: Tensor, y: Tensor, grouping: Grouping, *, bias: Tensor | None = None, weights: Tensor | None = None,
    residual: Tensor | None = None, skipped: Tensor | None = None, gather: bool = False, scatter: bool = False,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Launch: y = a @ w[e].T + bias[e], times the routing weight, plus the residual; arguments are checked by the op.

    Args:
        a: (rows, K) in row order, or (T, K) with `gather`.
        w: (E, N, K), any strides.
        y: (rows, N) contiguous; in row order, or with `scatter` in assignment order.
        weights: (T, top_k) contiguous routing weights.
        residual: (rows, N) contiguous, in row order; nothing is read for rows without an expert.
        skipped: (rows, N), in assignment order: the result where no expert is, instead of zero.
    """
    rows, (num_experts, columns, depth) = grouping.num_rows, w.shape
    if rows == 0 or columns == 0:
        return
    top_k, precision = grouping.top_k, precision_of(a.dtype)

    def plan() -> tuple[tuple[int, ...], tuple[object, ...], dict[str, Any]]:
        kind: Kind = "rows" if residual is None else "residual"
        tile = config or pick_config(kind, rows, num_experts, columns, depth, a.dtype, Device.of(a.device))
        tiles = num_row_tiles(rows, num_experts, tile.BLOCK_M) * ceil_div(columns, tile.BLOCK_N)
        arguments = (
            a, *a.stride(),
            w, *w.stride(),
            y, y.stride(0),
            bias, *((0, 0) if bias is None else bias.stride()),
            weights,
            residual, 0 if residual is None else residual.stride(0),
            skipped, *((0, 0) if skipped is None else skipped.stride()),
            grouping.offsets, grouping.row_to_assignment,
            rows, columns, depth, top_k,
        )  # fmt: skip
        constants = {
            "E": num_experts, "E_POW2": padded_experts(num_experts), "GATHER": gather, "SCATTER": scatter,
            "HAS_BIAS": bias is not None, "HAS_WEIGHTS": weights is not None,
            "HAS_RESIDUAL": residual is not None, "HAS_SKIPPED": skipped is not None,
            **dot_options(a, columns, depth, tile), **tile.options(),
        }  # fmt: skip
        return (tiles,), arguments, constants

    _launch(
        (
            rows, top_k, w.shape, layout(w), layout(a), y.dtype, layout(bias), weights is not None and weights.dtype,
            layout(residual), layout(skipped), gather, scatter, config, precision,
        ),
        (a, w, y, bias, weights, residual, skipped, grouping.offsets, grouping.row_to_assignment),
        plan,
    )  # fmt: skip


_launch = Launcher(_expert_gemm_kernel)
