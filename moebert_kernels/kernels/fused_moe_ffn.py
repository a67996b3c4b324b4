"""The expert feed-forward's own kernels, in Triton; its plain GEMMs are `expert_gemm`'s.

    h_pre = x[token] @ w1[e].T + b1[e]           h = dropout(act(h_pre))              one kernel

Only h_pre is kept for backward (`fused_moe_ffn_backward`). Gated activations keep two accumulators, for the gate's and
the other rows. An epilogue takes the columns of a tile in slices, so that little lives beside the accumulators.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels import dropout
from moebert_kernels.activation import GATED, is_gated
from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.activation import activate
from moebert_kernels.kernels.config import Config, Device, Kind, pick_config, slices_of
from moebert_kernels.kernels.dropout import keep_tile
from moebert_kernels.kernels.expert_gemm import (
    can_be_described,
    described,
    dot_blocks,
    dot_options,
    dot_rows,
    programs_of,
    weight_blocks,
)
from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import (
    MAPS,
    ceil_div,
    column_slices,
    next_power_of_2,
    num_expert_tiles,
    num_row_tiles,
    padded_experts,
    row_tile,
)

HIDDEN_STREAM: tl.constexpr = tl.constexpr(dropout.HIDDEN_STREAM)


@triton.jit
def _dot_rows_pair(
    a_ptrs, stride_ak, gate_ptrs, up_ptrs, stride_wk, mask_n,
    gate, up, K,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`dot_rows` with two weights at once."""
    offs_k = tl.arange(0, BLOCK_K)
    for k in range(0, K, BLOCK_K):
        if EVEN:
            a, w_gate, w_up = tl.load(a_ptrs), tl.load(gate_ptrs), tl.load(up_ptrs)
        else:
            inside = offs_k < K - k
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            mask = inside[:, None] & mask_n[None, :]
            w_gate = tl.load(gate_ptrs, mask=mask, other=0.0)
            w_up = tl.load(up_ptrs, mask=mask, other=0.0)
        if UPCAST:
            a, w_gate, w_up = a.to(tl.float32), w_gate.to(tl.float32), w_up.to(tl.float32)
        gate = tl.dot(a, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(a, w_up, up, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        gate_ptrs += BLOCK_K * stride_wk
        up_ptrs += BLOCK_K * stride_wk
    return gate, up


@triton.jit
def _hidden_slice(
    acc, up, expert, assignment, row0, mask_m, first_n,  # (BLOCK_M, COLUMNS) and what belongs to its rows and columns
    B1, stride_be, stride_bn, H, HPre, Seed, I, threshold, scale, HALF: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    STORE_H: tl.constexpr, STORE_PRE: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store some columns of a tile's h and h_pre."""
    offs_n = first_n + tl.arange(0, COLUMNS)
    mask_n = offs_n < I
    mask = mask_m[:, None] & mask_n[None, :]
    local = tl.arange(0, BLOCK_M)[:, None]  # one wide base and narrow offsets: half the registers of wide pointers
    if HAS_BIAS:
        bias_ptrs = B1 + expert.to(tl.int64) * stride_be + offs_n.to(tl.int64) * stride_bn
        acc += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptrs + tl.cast(I, tl.int64) * stride_bn, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if STORE_PRE:
        pre_width = 2 * I if GATED else I
        pre_ptrs = HPre + row0.to(tl.int64) * pre_width + (local * pre_width + offs_n[None, :])
        tl.store(pre_ptrs, acc.to(HPre.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(pre_ptrs + I, up.to(HPre.dtype.element_ty), mask=mask)
    if STORE_H:
        h = activate(acc, ACTIVATION, HALF)
        if GATED:
            h *= up
        if DROPOUT:
            keep = keep_tile(Seed, assignment, first_n, threshold, COLUMNS, HIDDEN_STREAM)
            h = tl.where(keep, h * scale, 0.0)
        tl.store(H + row0.to(tl.int64) * I + (local * I + offs_n[None, :]), h.to(H.dtype.element_ty), mask=mask)


@triton.jit
def _finish_tile(
    acc, up, expert, assignment, row0, mask_m, first_n, HALF: tl.constexpr,
    B1, stride_be, stride_bn, H, HPre, Seed, I, threshold, scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    STORE_H: tl.constexpr, STORE_PRE: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, in slices, and its stores. Without GATED, `up` is not used."""
    gates = column_slices(acc, SLICES)
    ups = column_slices(up, SLICES) if GATED else gates
    for i in tl.static_range(SLICES):
        _hidden_slice(
            gates[i], ups[i], expert, assignment, row0, mask_m, first_n + i * (BLOCK_N // SLICES),
            B1, stride_be, stride_bn, H, HPre, Seed, I, threshold, scale, HALF,
            ACTIVATION, GATED, HAS_BIAS, DROPOUT, STORE_H, STORE_PRE, BLOCK_M, BLOCK_N // SLICES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=MAPS)
def _hidden_kernel(
    X, stride_xm, stride_xk,  # (T, K), or (rows, K) without GATHER
    W1, stride_we, stride_wn, stride_wk,  # (E, I or 2I, K)
    B1, stride_be, stride_bn,  # (E, I or 2I) or null
    H, HPre,  # (rows, I), (rows, I or 2I) contiguous, or null
    Seed,  # () int64 or null
    Offsets, RowToToken,
    rows, I, K, TOP_K, threshold, scale,
    E: tl.constexpr, E_POW2: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    STORE_H: tl.constexpr, STORE_PRE: tl.constexpr, GATHER: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(I, BLOCK_N)
    expert, row0, end = row_tile(Offsets, tl.program_id(0) // tiles_n, rows, E, E_POW2, BLOCK_M)
    if expert >= E:  # nobody reads rows without an expert
        return
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    row = row0 + tl.arange(0, BLOCK_M)
    mask_m = row < end
    mask_n = offs_n < I
    assignment = tl.load(RowToToken + row, mask=mask_m, other=0).to(tl.int64)
    owner = expert.to(tl.int64)
    column = offs_n.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    x_row = assignment // TOP_K if GATHER else tl.where(mask_m, row, row0).to(tl.int64)
    x_ptrs = X + x_row[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = W1 + owner * stride_we + column[None, :] * stride_wn + offs_k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_ptrs = w_ptrs + tl.cast(I, tl.int64) * stride_wn
        acc, up = _dot_rows_pair(
            x_ptrs, stride_xk, w_ptrs, up_ptrs, stride_wk, mask_n, acc, acc, K, BLOCK_K, EVEN, PRECISION, UPCAST
        )
    else:
        acc = dot_rows(x_ptrs, stride_xk, w_ptrs, stride_wk, mask_n, acc, K, BLOCK_K, EVEN, PRECISION, UPCAST)
        up = acc
    _finish_tile(
        acc, up, expert, assignment, row0, mask_m, first_n, X.dtype.element_ty != tl.float32,
        B1, stride_be, stride_bn, H, HPre, Seed, I, threshold, scale,
        ACTIVATION, GATED, HAS_BIAS, DROPOUT, STORE_H, STORE_PRE, SLICES, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=MAPS)
def _hidden_descriptors_kernel(
    X, stride_xm,  # (rows, K)
    W1, stride_we, stride_w,  # (E, I, K), or (E, K, I) with TRANSPOSED
    B1, stride_be, stride_bn,
    H, HPre, Seed, Offsets, RowToToken,
    rows, I, threshold, scale,
    K: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    STORE_H: tl.constexpr, STORE_PRE: tl.constexpr, SLICES: tl.constexpr,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_hidden_kernel` without GATHER and gates, by the tensor memory accelerator."""
    x_blocks = tl.make_tensor_descriptor(X, [rows, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    w_blocks = weight_blocks(W1, stride_we, stride_w, I, K, E, TRANSPOSED, BLOCK_N, BLOCK_K)
    tiles_n = tl.cdiv(I, BLOCK_N)
    tiles = num_expert_tiles(Offsets, E, E_POW2, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        expert, row0, end = row_tile(Offsets, tile // tiles_n, rows, E, E_POW2, BLOCK_M)
        first_n = tile % tiles_n * BLOCK_N
        acc = dot_blocks(
            x_blocks, w_blocks, row0, expert, first_n, K, TRANSPOSED, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
        row = row0 + tl.arange(0, BLOCK_M)
        mask_m = row < end
        assignment = tl.load(RowToToken + row, mask=mask_m, other=0).to(tl.int64)
        _finish_tile(
            acc, acc, expert, assignment, row0, mask_m, first_n, X.dtype.element_ty != tl.float32,
            B1, stride_be, stride_bn, H, HPre, Seed, I, threshold, scale,
            ACTIVATION, GATED, HAS_BIAS, DROPOUT, STORE_H, STORE_PRE, SLICES, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _combine_kernel(
    Rows,  # (T * TOP_K, N) by assignment, contiguous
    Y,  # (T, N) contiguous
    N, TOP_K,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    rows = Rows + token * TOP_K * N + column
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, TOP_K):
        total += tl.load(rows, mask=column < N, other=0.0).to(tl.float32)
        rows += N
    tl.store(Y + token * N + column, total.to(Y.dtype.element_ty), mask=column < N)


def gated_options(activation: str) -> dict[str, Any]:
    return {"ACTIVATION": GATED.get(activation, activation), "GATED": is_gated(activation)}


def hidden(
    x: Tensor, w1: Tensor, b1: Tensor | None, h: Tensor | None, h_pre: Tensor | None, grouping: Grouping,
    activation: str, hidden_dropout_p: float, seed: Tensor | None, config: Config | None = None, *, gather: bool = True,
    descriptors: bool | None = None,
) -> None:  # fmt: skip
    """Launch: h (rows, I) and h_pre (rows, I or 2I), whichever is wanted. Rows without an expert are not written.

    x is (T, K), or (rows, K) in row order without `gather`.
    descriptors: whether TMA reads x and w1; None: where it can, without gates and dropout.
    """
    (num_experts, width, depth), rows = w1.shape, grouping.num_rows
    gated = is_gated(activation)
    columns = width // 2 if gated else width
    if rows == 0 or columns == 0:
        return
    dropped = hidden_dropout_p > 0 and seed is not None
    kind: Kind = "gated" if gated else "hidden"
    device = Device.of(x.device)
    tile = config or pick_config(kind, rows, num_experts, columns, depth, x.dtype, device)
    tiles = num_row_tiles(rows, num_experts, tile.BLOCK_M) * ceil_div(columns, tile.BLOCK_N)
    if descriptors is None:
        descriptors = not (gather or gated or dropped) and can_be_described(x, w1, tile, device)
    maps, sizes = (grouping.offsets, grouping.row_to_assignment), (rows, columns)
    drop = (dropout.threshold(hidden_dropout_p), dropout.scale(hidden_dropout_p))
    outputs = (b1, *((0, 0) if b1 is None else b1.stride()), h, h_pre, seed)
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts),
        **gated_options(activation), "HAS_BIAS": b1 is not None, "DROPOUT": dropped,
        "STORE_H": h is not None, "STORE_PRE": h_pre is not None, "SLICES": slices_of(tile, gated or dropped),
    }  # fmt: skip
    if descriptors:
        operands, options = described(x, w1, tile)
        grid = (min(tiles, programs_of(tile, "hidden_descriptors", device)),)
        arguments = (*operands, *outputs, *maps, *sizes, *drop)
        launch(_hidden_descriptors_kernel, grid, arguments, constants | options)
    else:
        arguments = (x, *x.stride(), w1, *w1.stride(), *outputs, *maps, *sizes, depth, grouping.top_k, *drop)
        options = {"GATHER": gather, **dot_options(x, columns, depth, tile), **tile.options()}
        launch(_hidden_kernel, (tiles,), arguments, constants | options)


def combine(rows: Tensor, y: Tensor, top_k: int) -> None:
    """Launch: y (T, N) = the sum of each token's assignments in rows (T * top_k, N), in their order."""
    tokens, columns = y.shape
    if y.numel():
        block = min(1024, next_power_of_2(columns))
        launch(_combine_kernel, (tokens * ceil_div(columns, block),), (rows, y, columns, top_k), {"BLOCK": block})
