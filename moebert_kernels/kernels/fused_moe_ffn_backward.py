"""The expert feed-forward's backward: the gradient of its pre-activations, and what follows from it and from h.

    dh = dy[token] @ w2[e]                       dh_pre = weight * dropout'(dh) * act'(h_pre)
    a = weight * dropout(act(h_pre))             dp = <dh, a / weight>                          one kernel

The kernel recomputes the activation in its epilogue and writes `a` for dw2 on the way, so no element-wise kernel runs.
dh_pre's sums over rows, for db1, are a pass of their own: in this epilogue they were 600 more instructions and 22 more
registers, which left a multiprocessor to one program of 128 x 128.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels import dropout
from moebert_kernels.activation import is_gated
from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.activation import activate, activate_grad
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
from moebert_kernels.kernels.fused_moe_ffn import HIDDEN_STREAM, gated_options
from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import (
    MAPS,
    ceil_div,
    column_slices,
    expert_of_rows,
    num_expert_tiles,
    num_row_tiles,
    padded_experts,
    row_tile,
)


@triton.jit
def _hidden_backward_slice(
    dh, weight, assignment, row0, mask_m, first_n,  # (BLOCK_M, COLUMNS) and what belongs to its rows and columns
    HPre, DHPre, A, Seed, I, threshold, scale, HALF: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, STORE_PRE: tl.constexpr, STORE_A: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store some columns of a tile's dh_pre and a. Returns their part of <dh, h>, (BLOCK_M,)."""
    offs_n = first_n + tl.arange(0, COLUMNS)
    mask = mask_m[:, None] & (offs_n < I)[None, :]
    local = tl.arange(0, BLOCK_M)[:, None]  # one wide base and narrow offsets: half the registers of wide pointers
    pre_width = 2 * I if GATED else I
    pre_base, pre_offsets = row0.to(tl.int64) * pre_width, local * pre_width + offs_n[None, :]
    pre_ptrs = HPre + pre_base + pre_offsets
    pre = tl.load(pre_ptrs, mask=mask, other=0.0).to(tl.float32)
    h = activate(pre, ACTIVATION, HALF)
    if GATED:
        gate_h = h
        up = tl.load(pre_ptrs + I, mask=mask, other=0.0).to(tl.float32)
        h *= up
    if DROPOUT:
        keep = keep_tile(Seed, assignment, first_n, threshold, COLUMNS, HIDDEN_STREAM)
        h = tl.where(keep, h * scale, 0.0)
    part = tl.sum(tl.where(mask, dh * h, 0.0), 1)
    if HAS_WEIGHTS:
        h *= weight[:, None]
        dh *= weight[:, None]
    if STORE_A:
        tl.store(A + row0.to(tl.int64) * I + (local * I + offs_n[None, :]), h.to(A.dtype.element_ty), mask=mask)
    if STORE_PRE:
        if DROPOUT:
            dh = tl.where(keep, dh * scale, 0.0)
        dpre_ptrs = DHPre + pre_base + pre_offsets
        if GATED:
            tl.store(dpre_ptrs + I, (dh * gate_h).to(DHPre.dtype.element_ty), mask=mask)
            dh *= up
        tl.store(dpre_ptrs, (dh * activate_grad(pre, ACTIVATION, HALF)).to(DHPre.dtype.element_ty), mask=mask)
    return part


@triton.jit
def _finish_tile(
    dh, assignment, row0, row, mask_m, tile_n, tiles_n, HALF: tl.constexpr,
    HPre, DHPre, A, Weights, DWeights, Seed, I, threshold, scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, STORE_PRE: tl.constexpr, STORE_A: tl.constexpr, STORE_DWEIGHTS: tl.constexpr,
    SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile of dh, in slices, and its stores."""
    weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(Weights + assignment, mask=mask_m, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK_M,), tl.float32)
    first = tile_n * BLOCK_N
    slices = column_slices(dh, SLICES)
    for i in tl.static_range(SLICES):
        part += _hidden_backward_slice(
            slices[i], weight, assignment, row0, mask_m, first + i * (BLOCK_N // SLICES),
            HPre, DHPre, A, Seed, I, threshold, scale, HALF,
            ACTIVATION, GATED, DROPOUT, HAS_WEIGHTS, STORE_PRE, STORE_A, BLOCK_M, BLOCK_N // SLICES,
        )  # fmt: skip
    if STORE_DWEIGHTS:
        tl.store(DWeights + row * tiles_n + tile_n, part, mask=mask_m)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=MAPS)
def _hidden_backward_kernel(
    DY, stride_ym, stride_yk,  # (T or rows, K)
    W2, stride_we, stride_wn, stride_wk,  # (E, I, K): w2 transposed
    HPre, DHPre, A,  # (rows, I or 2I), (rows, I or 2I), (rows, I), contiguous; the last two may be null
    Weights,  # (rows,) by assignment, or null
    DWeights,  # (rows, tiles of I) float32 or null: this tile's part of <dh, h>
    Seed,  # () int64 or null
    Offsets, RowToToken,
    rows, I, K, TOP_K, threshold, scale,
    E: tl.constexpr, E_POW2: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, GATHER: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, STORE_PRE: tl.constexpr, STORE_A: tl.constexpr, STORE_DWEIGHTS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(I, BLOCK_N)
    expert, row0, end = row_tile(Offsets, tl.program_id(0) // tiles_n, rows, E, E_POW2, BLOCK_M)
    if expert >= E:
        return
    tile_n = tl.program_id(0) % tiles_n
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = row0 + tl.arange(0, BLOCK_M)
    mask_m = row < end
    mask_n = offs_n < I
    assignment = tl.load(RowToToken + row, mask=mask_m, other=0).to(tl.int64)
    row = tl.where(mask_m, row, row0).to(tl.int64)
    column = offs_n.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    y_row = assignment // TOP_K if GATHER else row
    dh = dot_rows(
        DY + y_row[:, None] * stride_ym + offs_k[None, :] * stride_yk, stride_yk,
        W2 + expert.to(tl.int64) * stride_we + column[None, :] * stride_wn + offs_k[:, None] * stride_wk, stride_wk,
        mask_n, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), K, BLOCK_K, EVEN, PRECISION, UPCAST,
    )  # fmt: skip

    _finish_tile(
        dh, assignment, row0, row, mask_m, tile_n, tiles_n, DY.dtype.element_ty != tl.float32,
        HPre, DHPre, A, Weights, DWeights, Seed, I, threshold, scale,
        ACTIVATION, GATED, DROPOUT, HAS_WEIGHTS, STORE_PRE, STORE_A, STORE_DWEIGHTS, SLICES, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=MAPS)
def _hidden_backward_descriptors_kernel(
    DY, stride_ym,  # (rows, K)
    W2, stride_we, stride_w,  # (E, I, K), or (E, K, I) with TRANSPOSED
    HPre, DHPre, A, Weights, DWeights, Seed, Offsets, RowToToken,
    rows, I, threshold, scale,
    K: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, STORE_PRE: tl.constexpr, STORE_A: tl.constexpr, STORE_DWEIGHTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_hidden_backward_kernel` without GATHER, by the tensor memory accelerator."""
    y_blocks = tl.make_tensor_descriptor(DY, [rows, K], [stride_ym, 1], [BLOCK_M, BLOCK_K])
    w_blocks = weight_blocks(W2, stride_we, stride_w, I, K, E, TRANSPOSED, BLOCK_N, BLOCK_K)
    tiles_n = tl.cdiv(I, BLOCK_N)
    tiles = num_expert_tiles(Offsets, E, E_POW2, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        expert, row0, end = row_tile(Offsets, tile // tiles_n, rows, E, E_POW2, BLOCK_M)
        tile_n = tile % tiles_n
        dh = dot_blocks(
            y_blocks, w_blocks, row0, expert, tile_n * BLOCK_N, K, TRANSPOSED, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
        row = row0 + tl.arange(0, BLOCK_M)
        mask_m = row < end
        assignment = tl.load(RowToToken + row, mask=mask_m, other=0).to(tl.int64)
        _finish_tile(
            dh, assignment, row0, row.to(tl.int64), mask_m, tile_n, tiles_n, DY.dtype.element_ty != tl.float32,
            HPre, DHPre, A, Weights, DWeights, Seed, I, threshold, scale,
            ACTIVATION, GATED, DROPOUT, HAS_WEIGHTS, STORE_PRE, STORE_A, STORE_DWEIGHTS, SLICES, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=MAPS)
def _routing_weights_grad_kernel(
    Parts,  # (rows, PARTS) float32, contiguous
    DY, stride_yt, stride_yk,  # (T, N)
    B2, stride_be, stride_bn,  # (E, N) or null
    DWeights,  # (rows,) by assignment
    Offsets, RowToToken,
    rows, N, PARTS, TOP_K,
    E: tl.constexpr, E_POW2: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = expert_of_rows(Offsets, row, E, E_POW2).to(tl.int64)
    routed = (row < rows) & (expert < E)
    assignment = tl.load(RowToToken + row, mask=row < rows, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in range(0, PARTS):
        total += tl.load(Parts + row * PARTS + part, mask=routed, other=0.0)
    if HAS_BIAS:
        for n in range(0, N, BLOCK_N):
            column = (n + tl.arange(0, BLOCK_N)).to(tl.int64)  # by columns, a column times its stride may pass 2^31
            mask = routed[:, None] & (column < N)[None, :]
            dy = tl.load(
                DY + (assignment // TOP_K)[:, None] * stride_yt + column[None, :] * stride_yk, mask=mask, other=0.0
            )
            bias = tl.load(B2 + expert[:, None] * stride_be + column[None, :] * stride_bn, mask=mask, other=0.0)
            total += tl.sum(dy.to(tl.float32) * bias.to(tl.float32), 1)
    tl.store(DWeights + assignment, total.to(DWeights.dtype.element_ty), mask=row < rows)


def hidden_backward_config(
    dy: Tensor, w2: Tensor, grouping: Grouping, activation: str, hidden_dropout_p: float
) -> Config:  # fmt: skip
    """What `hidden_backward` runs with; its tiles decide the shape of `dweights`."""
    num_experts, depth, columns = w2.shape
    kind: Kind = "gated_backward" if hidden_dropout_p > 0 or is_gated(activation) else "backward"
    return pick_config(kind, grouping.num_rows, num_experts, columns, depth, dy.dtype, Device.of(dy.device))


def hidden_backward(
    dy: Tensor, w2: Tensor, h_pre: Tensor, dh_pre: Tensor | None, a: Tensor | None, weights: Tensor | None,
    dweights: Tensor | None, grouping: Grouping, activation: str, hidden_dropout_p: float, seed: Tensor | None,
    *, gather: bool, config: Config, descriptors: bool | None = None,
) -> None:  # fmt: skip
    """Launch: dh_pre (rows, I or 2I), a (rows, I) and dweights (rows, tiles of I), whichever is wanted.

    dy is (T, H), or (rows, H) in row order without `gather`. Rows without an expert are not written.
    descriptors: whether TMA reads dy and w2; None: where it can, without gates and dropout.
    """
    (num_experts, depth, columns), rows = w2.shape, grouping.num_rows
    if rows == 0 or columns == 0:
        return
    dropped = hidden_dropout_p > 0 and seed is not None
    tiles = num_row_tiles(rows, num_experts, config.BLOCK_M) * ceil_div(columns, config.BLOCK_N)
    device, gated, w = Device.of(dy.device), is_gated(activation), w2.transpose(1, 2)
    if descriptors is None:
        descriptors = not (gather or dropped or gated) and can_be_described(dy, w, config, device)
    maps, sizes = (grouping.offsets, grouping.row_to_assignment), (rows, columns)
    drop = (dropout.threshold(hidden_dropout_p), dropout.scale(hidden_dropout_p))
    outputs = (h_pre, dh_pre, a, weights, dweights, seed)
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts),
        **gated_options(activation), "DROPOUT": dropped, "HAS_WEIGHTS": weights is not None,
        "STORE_PRE": dh_pre is not None, "STORE_A": a is not None, "STORE_DWEIGHTS": dweights is not None,
        "SLICES": slices_of(config, dropped or gated),
    }  # fmt: skip
    if descriptors:
        operands, options = described(dy, w, config)
        grid = (min(tiles, programs_of(config, "backward_descriptors", device)),)
        arguments = (*operands, *outputs, *maps, *sizes, *drop)
        launch(_hidden_backward_descriptors_kernel, grid, arguments, constants | options)
    else:
        arguments = (dy, *dy.stride(), w2, *w.stride(), *outputs, *maps, *sizes, depth, grouping.top_k, *drop)
        options = {"GATHER": gather, **dot_options(dy, columns, depth, config), **config.options()}
        launch(_hidden_backward_kernel, (tiles,), arguments, constants | options)


def routing_weights_grad(parts: Tensor, dy: Tensor, b2: Tensor | None, dweights: Tensor, grouping: Grouping) -> None:
    """Launch: dweights (T, top_k) = <dy, w2 h + b2> from the parts of <dh, h>; zero for skipped assignments."""
    rows, num_experts = grouping.num_rows, grouping.num_experts
    if rows == 0:
        return
    block = 16
    arguments = (
        parts,
        dy, *dy.stride(),
        b2, *((0, 0) if b2 is None else b2.stride()),
        dweights,
        grouping.offsets, grouping.row_to_assignment,
        rows, dy.shape[1], parts.shape[1], grouping.top_k,
    )  # fmt: skip
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts), "HAS_BIAS": b2 is not None, "BLOCK_M": block,
        "BLOCK_N": 128,
    }  # fmt: skip
    launch(_routing_weights_grad_kernel, (ceil_div(rows, block),), arguments, constants)
