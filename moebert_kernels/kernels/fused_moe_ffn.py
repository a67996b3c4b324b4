"""The expert feed-forward's own kernels, in Triton; its plain GEMMs are `expert_gemm`'s.

    forward    h_pre = x[token] @ w1[e].T + b1[e]           h = dropout(act(h_pre))              one kernel
    backward   dh = dy[token] @ w2[e]                       dh_pre = weight * dropout'(dh) * act'(h_pre)
               a = weight * dropout(act(h_pre))             dp = <dh, a / weight>                one kernel

Only h_pre is kept between the two: the backward kernel recomputes the activation in its epilogue and writes `a` for dw2
on the way, so no element-wise kernel runs. Gated activations keep two accumulators, for the gate's and the other rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels import dropout
from moebert_kernels.activation import GATED, is_gated
from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.activation import activate, activate_grad
from moebert_kernels.kernels.config import Config, Device, pick_config
from moebert_kernels.kernels.dropout import keep_tile
from moebert_kernels.kernels.expert_gemm import dot_options, dot_rows
from moebert_kernels.kernels.tiles import column_slices, expert_of_rows, num_row_tiles, padded_experts, row_tile

_HIDDEN_STREAM: tl.constexpr = tl.constexpr(dropout.HIDDEN_STREAM)

# Elements of a tile per thread: of a whole tile where the epilogue has gates or masks besides, and of the part of it
# that goes through the epilogue at a time. With more, ptxas spills or leaves a multiprocessor to one program
# (benchmarks/results/triton-resources.json).
_GATED_ACCUMULATORS = 32
_SLICE_ELEMENTS = {False: 16, True: 8}


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
    E: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    STORE_H: tl.constexpr, STORE_PRE: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store some columns of a tile's h and h_pre."""
    offs_n = first_n + tl.arange(0, COLUMNS)
    mask_n = offs_n < I
    mask = mask_m[:, None] & mask_n[None, :]
    local = tl.arange(0, BLOCK_M)[:, None]  # one wide base and narrow offsets: half the registers of wide pointers
    if HAS_BIAS:
        owner = tl.minimum(expert, E - 1).to(tl.int64)
        bias_ptrs = B1 + owner * stride_be + offs_n.to(tl.int64) * stride_bn
        acc += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptrs + tl.cast(I, tl.int64) * stride_bn, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if expert == E:
        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        if GATED:
            up = acc
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
            keep = keep_tile(Seed, assignment, first_n, threshold, COLUMNS, _HIDDEN_STREAM)
            h = tl.where(keep, h * scale, 0.0)
        tl.store(H + row0.to(tl.int64) * I + (local * I + offs_n[None, :]), h.to(H.dtype.element_ty), mask=mask)


@triton.jit
def _hidden_kernel(
    X, stride_xm, stride_xk,  # (T, K)
    W1, stride_we, stride_wn, stride_wk,  # (E, I or 2I, K)
    B1, stride_be, stride_bn,  # (E, I or 2I) or null
    H, HPre,  # (rows, I), (rows, I or 2I) contiguous, or null
    Seed,  # () int64 or null
    Offsets, RowToToken,
    rows, I, K, TOP_K, threshold, scale,
    E: tl.constexpr, E_POW2: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    STORE_H: tl.constexpr, STORE_PRE: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(I, BLOCK_N)
    expert, row0, end = row_tile(Offsets, tl.program_id(0) // tiles_n, rows, E, E_POW2, BLOCK_M)
    if expert > E:
        return
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    row = row0 + tl.arange(0, BLOCK_M)
    mask_m = row < end
    mask_n = offs_n < I
    assignment = tl.load(RowToToken + row, mask=mask_m, other=0).to(tl.int64)
    depth = tl.where(expert < E, K, 0)  # rows without an expert: nothing to sum, zeros to write
    owner = tl.minimum(expert, E - 1).to(tl.int64)
    column = offs_n.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = X + (assignment // TOP_K)[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = W1 + owner * stride_we + column[None, :] * stride_wn + offs_k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_ptrs = w_ptrs + tl.cast(I, tl.int64) * stride_wn
        acc, up = _dot_rows_pair(
            x_ptrs, stride_xk, w_ptrs, up_ptrs, stride_wk, mask_n, acc, acc, depth, BLOCK_K, EVEN, PRECISION, UPCAST
        )
    else:
        acc = dot_rows(x_ptrs, stride_xk, w_ptrs, stride_wk, mask_n, acc, depth, BLOCK_K, EVEN, PRECISION, UPCAST)
    gates = column_slices(acc, SLICES)
    ups = column_slices(up, SLICES) if GATED else gates
    for i in tl.static_range(SLICES):
        _hidden_slice(
            gates[i], ups[i], expert, assignment, row0, mask_m, first_n + i * (BLOCK_N // SLICES),
            B1, stride_be, stride_bn, H, HPre, Seed, I, threshold, scale, X.dtype.element_ty != tl.float32,
            E, ACTIVATION, GATED, HAS_BIAS, DROPOUT, STORE_H, STORE_PRE, BLOCK_M, BLOCK_N // SLICES,
        )  # fmt: skip


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
        keep = keep_tile(Seed, assignment, first_n, threshold, COLUMNS, _HIDDEN_STREAM)
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

    weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(Weights + assignment, mask=mask_m, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK_M,), tl.float32)
    first = tile_n * BLOCK_N
    half: tl.constexpr = DY.dtype.element_ty != tl.float32
    slices = column_slices(dh, SLICES)
    for i in tl.static_range(SLICES):
        part += _hidden_backward_slice(
            slices[i], weight, assignment, row0, mask_m, first + i * (BLOCK_N // SLICES),
            HPre, DHPre, A, Seed, I, threshold, scale, half,
            ACTIVATION, GATED, DROPOUT, HAS_WEIGHTS, STORE_PRE, STORE_A, BLOCK_M, BLOCK_N // SLICES,
        )  # fmt: skip
    if STORE_DWEIGHTS:
        tl.store(DWeights + row * tiles_n + tile_n, part, mask=mask_m)


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


@triton.jit
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
    expert = expert_of_rows(Offsets, row, E, E_POW2)
    routed = (row < rows) & (expert < E)
    assignment = tl.load(RowToToken + row, mask=row < rows, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in range(0, PARTS):
        total += tl.load(Parts + row * PARTS + part, mask=routed, other=0.0)
    if HAS_BIAS:
        for n in range(0, N, BLOCK_N):
            column = n + tl.arange(0, BLOCK_N)
            mask = routed[:, None] & (column < N)[None, :]
            dy = tl.load(
                DY + (assignment // TOP_K)[:, None] * stride_yt + column[None, :] * stride_yk, mask=mask, other=0.0
            )
            bias = tl.load(B2 + expert[:, None] * stride_be + column[None, :] * stride_bn, mask=mask, other=0.0)
            total += tl.sum(dy.to(tl.float32) * bias.to(tl.float32), 1)
    tl.store(DWeights + assignment, total.to(DWeights.dtype.element_ty), mask=row < rows)


def _slices(config: Config, gated: bool) -> int:
    """How many parts of a tile's columns go through the epilogue one after the other."""
    elements = config.BLOCK_M * config.BLOCK_N // (32 * config.num_warps)
    return max(1, min(4, elements // _SLICE_ELEMENTS[gated], config.BLOCK_N // 16))


def _gated_options(activation: str) -> dict[str, object]:
    return {"ACTIVATION": GATED.get(activation, activation), "GATED": is_gated(activation)}


def _dropout_arguments(p: float, seed: Tensor | None) -> tuple[tuple[int, float], bool]:
    return (dropout.threshold(p), dropout.scale(p)), p > 0 and seed is not None


def hidden(
    x: Tensor, w1: Tensor, b1: Tensor | None, h: Tensor | None, h_pre: Tensor | None, grouping: Grouping,
    activation: str, hidden_dropout_p: float, seed: Tensor | None, config: Config | None = None,
) -> None:  # fmt: skip
    """Launch: h (rows, I) and h_pre (rows, I or 2I), whichever is wanted; zero in rows without an expert."""
    (num_experts, width, depth), rows = w1.shape, grouping.num_rows
    gated = is_gated(activation)
    columns = width // 2 if gated else width
    if rows == 0 or columns == 0:
        return
    if config is None:
        config = pick_config("rows", rows, num_experts, columns, depth, x.dtype, Device.of(x.device))
    if gated:
        config = config.narrowed(_GATED_ACCUMULATORS)
    (threshold, scale), dropped = _dropout_arguments(hidden_dropout_p, seed)
    tiles = num_row_tiles(rows, num_experts, config.BLOCK_M) * triton.cdiv(columns, config.BLOCK_N)
    _hidden_kernel[(tiles,)](
        x, *x.stride(),
        w1, *w1.stride(),
        b1, *((0, 0) if b1 is None else b1.stride()),
        h, h_pre, seed,
        grouping.offsets, grouping.row_to_token,
        rows, columns, depth, grouping.top_k, threshold, scale,
        E=num_experts, E_POW2=padded_experts(num_experts),
        **_gated_options(activation), HAS_BIAS=b1 is not None, DROPOUT=dropped,
        STORE_H=h is not None, STORE_PRE=h_pre is not None,
        **dot_options(x, columns, depth, config), SLICES=_slices(config, gated or dropped), **config.options(),
    )  # fmt: skip


def hidden_backward_config(
    dy: Tensor, w2: Tensor, grouping: Grouping, activation: str, hidden_dropout_p: float, config: Config | None = None
) -> Config:  # fmt: skip
    """What `hidden_backward` runs with; its tiles decide the shape of `dweights`."""
    num_experts, depth, columns = w2.shape
    if config is None:
        config = pick_config("rows", grouping.num_rows, num_experts, columns, depth, dy.dtype, Device.of(dy.device))
    plain = hidden_dropout_p == 0 and not is_gated(activation)
    return config if plain else config.narrowed(_GATED_ACCUMULATORS)


def hidden_backward(
    dy: Tensor, w2: Tensor, h_pre: Tensor, dh_pre: Tensor | None, a: Tensor | None, weights: Tensor | None,
    dweights: Tensor | None, grouping: Grouping, activation: str, hidden_dropout_p: float, seed: Tensor | None,
    *, gather: bool, config: Config,
) -> None:  # fmt: skip
    """Launch: dh_pre (rows, I or 2I), a (rows, I) and dweights (rows, tiles of I), whichever is wanted.

    dy is (T, H), or (rows, H) in row order without `gather`. Rows without an expert are not written.
    """
    (num_experts, depth, columns), rows = w2.shape, grouping.num_rows
    if rows == 0 or columns == 0:
        return
    (threshold, scale), dropped = _dropout_arguments(hidden_dropout_p, seed)
    tiles = num_row_tiles(rows, num_experts, config.BLOCK_M) * triton.cdiv(columns, config.BLOCK_N)
    _hidden_backward_kernel[(tiles,)](
        dy, *dy.stride(),
        w2, *w2.transpose(1, 2).stride(),
        h_pre, dh_pre, a,
        weights, dweights, seed,
        grouping.offsets, grouping.row_to_token,
        rows, columns, depth, grouping.top_k, threshold, scale,
        E=num_experts, E_POW2=padded_experts(num_experts),
        **_gated_options(activation), DROPOUT=dropped, GATHER=gather, HAS_WEIGHTS=weights is not None,
        STORE_PRE=dh_pre is not None, STORE_A=a is not None, STORE_DWEIGHTS=dweights is not None,
        SLICES=_slices(config, dropped or is_gated(activation)),
        **dot_options(dy, columns, depth, config), **config.options(),
    )  # fmt: skip


def combine(rows: Tensor, y: Tensor, top_k: int) -> None:
    """Launch: y (T, N) = the sum of each token's assignments in rows (T * top_k, N), in their order."""
    tokens, columns = y.shape
    if y.numel():
        block = min(1024, triton.next_power_of_2(columns))
        _combine_kernel[(tokens * triton.cdiv(columns, block),)](rows, y, columns, top_k, BLOCK=block)


def routing_weights_grad(parts: Tensor, dy: Tensor, b2: Tensor | None, dweights: Tensor, grouping: Grouping) -> None:
    """Launch: dweights (T, top_k) = <dy, w2 h + b2> from the parts of <dh, h>; zero for skipped assignments."""
    rows, num_experts = grouping.num_rows, grouping.num_experts
    if rows == 0:
        return
    block = 16
    _routing_weights_grad_kernel[(triton.cdiv(rows, block),)](
        parts,
        dy, *dy.stride(),
        b2, *((0, 0) if b2 is None else b2.stride()),
        dweights,
        grouping.offsets, grouping.row_to_token,
        rows, dy.shape[1], parts.shape[1], grouping.top_k,
        E=num_experts, E_POW2=padded_experts(num_experts), HAS_BIAS=b2 is not None, BLOCK_M=block, BLOCK_N=128,
    )  # fmt: skip
