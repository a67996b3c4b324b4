"""Un-permute, dropout, residual and per-expert LayerNorm as one pass over the tokens, forward and backward.

    z = x + dropout(ffn)      n = (z - mean) / sqrt(var + eps)      y = p * (n * weight[e] + bias[e])
    dz = LayerNorm'(p * dy)   dffn = dropout'(dz)                   dweight[e] = sum p * dy * n   dbias[e] = sum p * dy

Forward reads the feed-forward's rows through the permutation and writes tokens: 3 T H elements of traffic. Backward
walks rows in fixed chunks that never cross an expert, keeps the chunk's sums for the norm's parameters in registers,
and leaves them as partials that `add_chunks` adds in order. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels import dropout
from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.column_sums import SUMS_CHUNK
from moebert_kernels.kernels.dropout import keep_tile
from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import MAPS, ceil_div, expert_of_rows, next_power_of_2, padded_experts, row_chunk

_OUTPUT_STREAM: tl.constexpr = tl.constexpr(dropout.OUTPUT_STREAM)


@triton.jit
def _normalised(z, mask, H, eps):
    """Rows with mean 0 and variance 1, and 1 / standard deviation; zero outside the mask."""
    mean = tl.sum(z, 1) / H
    centred = tl.where(mask, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / H + eps)
    return tl.where(mask, centred * rstd[:, None], 0.0), rstd  # with an eps of 0 a row past the end has 0 * inf


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=MAPS)
def _add_norm_kernel(
    X, stride_xt, stride_xh,  # (T, H)
    Ffn,  # (T, H) contiguous
    NormWeight, stride_we, stride_wh,  # (E, H)
    NormBias, stride_be, stride_bh,  # (E, H)
    Weights,  # (T,) or null
    Y,  # (T, H) contiguous
    Seed, Offsets, TokenToRow,
    T, H, eps, threshold, scale,
    E: tl.constexpr, E_POW2: tl.constexpr, DROPOUT: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    X_BY_ROW: tl.constexpr, FFN_BY_ROW: tl.constexpr, Y_BY_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_H)
    wide = column.to(tl.int64)  # where x is stored by columns, a column times its stride may pass 2^31
    row = tl.load(TokenToRow + token, mask=token < T, other=0).to(tl.int64)
    expert = expert_of_rows(Offsets, row, E, E_POW2).to(tl.int64)
    mask = (token < T)[:, None] & (column < H)[None, :]
    at_x = row if X_BY_ROW else token
    at_ffn = row if FFN_BY_ROW else token
    at_y = row if Y_BY_ROW else token
    routed = mask & (expert < E)[:, None]
    x = tl.load(X + at_x[:, None] * stride_xt + wide[None, :] * stride_xh, mask=mask, other=0.0)
    ffn = tl.load(Ffn + at_ffn[:, None] * H + column[None, :], mask=routed, other=0.0).to(tl.float32)
    if DROPOUT:
        ffn = tl.where(keep_tile(Seed, token, 0, threshold, BLOCK_H, _OUTPUT_STREAM), ffn * scale, 0.0)
    normed, _ = _normalised(x.to(tl.float32) + ffn, mask, H, eps)
    weight = tl.load(NormWeight + expert[:, None] * stride_we + column[None, :] * stride_wh, mask=routed, other=0.0)
    bias = tl.load(NormBias + expert[:, None] * stride_be + column[None, :] * stride_bh, mask=routed, other=0.0)
    y = normed * weight.to(tl.float32) + bias.to(tl.float32)
    if HAS_WEIGHTS:
        y *= tl.load(Weights + token, mask=token < T, other=0.0).to(tl.float32)[:, None]
    y = tl.where(routed, y.to(Y.dtype.element_ty), x.to(Y.dtype.element_ty))
    tl.store(Y + at_y[:, None] * H + column[None, :], y, mask=mask)


@triton.jit(do_not_specialize_on_alignment=MAPS)
def _add_norm_backward_kernel(
    DY, stride_yt, stride_yh,  # (T, H)
    X, stride_xt, stride_xh,  # (T, H)
    Ffn,  # (T, H) contiguous
    NormWeight, stride_we, stride_wh,  # (E, H)
    NormBias, stride_be, stride_bh,  # (E, H)
    Weights,  # (T,) or null
    DZ, DFfn,  # (T, H) contiguous; the second may be null
    Sums, stride_sums,  # (chunks, 2 H or 3 H or more) float32: of the gradients of the norm's weight and bias, of DFfn
    DWeights,  # (T,) or null
    Seed, Offsets, RowToToken,
    H, eps, threshold, scale,
    E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, STORE_DFFN: tl.constexpr, STORE_DWEIGHTS: tl.constexpr, SUM_DFFN: tl.constexpr,
    X_BY_ROW: tl.constexpr, FFN_BY_ROW: tl.constexpr, DY_BY_ROW: tl.constexpr, DZ_BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    expert, row0, end = row_chunk(Offsets, chunk, E, E_POW2, CHUNK)
    if expert >= E:
        return
    column = tl.arange(0, BLOCK_H)
    wide = column.to(tl.int64)
    inside = column < H
    owner = expert.to(tl.int64)
    weight = tl.load(NormWeight + owner * stride_we + column * stride_wh, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(NormBias + owner * stride_be + column * stride_bh, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_H,), tl.float32)
    dbias = tl.zeros((BLOCK_H,), tl.float32)
    dffn = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(row0, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask_r = row < end
        mask = mask_r[:, None] & inside[None, :]
        token = tl.load(RowToToken + row, mask=mask_r, other=0).to(tl.int64)
        row = row.to(tl.int64)
        at_x = row if X_BY_ROW else token
        at_ffn = row if FFN_BY_ROW else token
        at_dy = row if DY_BY_ROW else token
        at_dz = row if DZ_BY_ROW else token
        x = tl.load(X + at_x[:, None] * stride_xt + wide[None, :] * stride_xh, mask=mask, other=0.0)
        ffn = tl.load(Ffn + at_ffn[:, None] * H + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = keep_tile(Seed, token, 0, threshold, BLOCK_H, _OUTPUT_STREAM)
            ffn = tl.where(keep, ffn * scale, 0.0)
        normed, rstd = _normalised(x.to(tl.float32) + ffn, mask, H, eps)
        dy = tl.load(DY + at_dy[:, None] * stride_yt + wide[None, :] * stride_yh, mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        if STORE_DWEIGHTS:
            dp = tl.sum(dy * (normed * weight[None, :] + bias[None, :]), 1)
            tl.store(DWeights + token, dp.to(DWeights.dtype.element_ty), mask=mask_r)
        if HAS_WEIGHTS:
            dy *= tl.load(Weights + token, mask=mask_r, other=0.0).to(tl.float32)[:, None]
        dweight += tl.sum(dy * normed, 0)
        dbias += tl.sum(dy, 0)
        dnormed = dy * weight[None, :]
        mean = tl.sum(dnormed, 1) / H
        along = tl.sum(dnormed * normed, 1) / H
        dz = (dnormed - mean[:, None] - normed * along[:, None]) * rstd[:, None]
        tl.store(DZ + at_dz[:, None] * H + column[None, :], dz.to(DZ.dtype.element_ty), mask=mask)
        if DROPOUT:
            dz = tl.where(keep, dz * scale, 0.0)
        if SUM_DFFN:
            dffn += tl.sum(tl.where(mask, dz, 0.0), 0)
        if STORE_DFFN:
            tl.store(DFfn + at_dz[:, None] * H + column[None, :], dz.to(DFfn.dtype.element_ty), mask=mask)
    sums = Sums + chunk.to(tl.int64) * stride_sums + column
    tl.store(sums, dweight, mask=inside)
    tl.store(sums + H, dbias, mask=inside)
    if SUM_DFFN:
        tl.store(sums + 2 * H, dffn, mask=inside)


def _row_options(columns: int) -> dict[str, int]:
    """A program holds whole rows: several narrow ones or a wide one."""
    block = max(16, next_power_of_2(columns))
    return {"BLOCK_H": block, "num_warps": 4 if block <= 4096 else 8 if block <= 16384 else 16}


def add_norm(
    x: Tensor, ffn: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: Tensor | None, y: Tensor,
    grouping: Grouping, eps: float, dropout_p: float, seed: Tensor | None, *, by_row: Sequence[str] = ("ffn",),
) -> None:  # fmt: skip
    """Launch: y from x and the feed-forward's outputs, all (T, H); y = x where no expert is.

    by_row: which of "x", "ffn" and "y" are in row order; the others are in token order.
    """
    (tokens, columns), num_experts = x.shape, grouping.num_experts
    if x.numel() == 0:
        return
    options = _row_options(columns)
    block = max(1, min(4, 4096 // options["BLOCK_H"]))
    arguments = (
        x, *x.stride(),
        ffn,
        norm_weight, *norm_weight.stride(),
        norm_bias, *norm_bias.stride(),
        weights, y, seed, grouping.offsets, grouping.assignment_to_row,
        tokens, columns, eps, dropout.threshold(dropout_p), dropout.scale(dropout_p),
    )  # fmt: skip
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts), "DROPOUT": dropout_p > 0 and seed is not None,
        "HAS_WEIGHTS": weights is not None,
        "X_BY_ROW": "x" in by_row, "FFN_BY_ROW": "ffn" in by_row, "Y_BY_ROW": "y" in by_row,
        "BLOCK_T": block, **options,
    }  # fmt: skip
    launch(_add_norm_kernel, (ceil_div(tokens, block),), arguments, constants)


def add_norm_backward(
    dy: Tensor, x: Tensor, ffn: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: Tensor | None,
    dz: Tensor, dffn: Tensor | None, sums: Tensor, dweights: Tensor | None,
    grouping: Grouping, eps: float, dropout_p: float, seed: Tensor | None, *, sum_dffn: bool,
    by_row: Sequence[str] = ("ffn", "dz"),
) -> None:  # fmt: skip
    """Launch: dz and dffn (T, H), dweights (T,) and the first columns of sums (num_chunks(.., SUMS_CHUNK), W) float32.

    The sums are of the gradients of the norm's weight and bias and, with `sum_dffn`, of dffn: H columns each.
    Nothing is written for tokens without an expert.
    by_row: which of "x", "ffn", "dy" and "dz" (with dffn) are in row order; the others are in token order.
    """
    columns, num_experts = x.shape[1], grouping.num_experts
    options = _row_options(columns)
    arguments = (
        dy, *dy.stride(),
        x, *x.stride(),
        ffn,
        norm_weight, *norm_weight.stride(),
        norm_bias, *norm_bias.stride(),
        weights, dz, dffn, sums, sums.stride(0), dweights, seed, grouping.offsets, grouping.row_to_assignment,
        columns, eps, dropout.threshold(dropout_p), dropout.scale(dropout_p),
    )  # fmt: skip
    constants = {
        "E": num_experts, "E_POW2": padded_experts(num_experts), "CHUNK": SUMS_CHUNK,
        "DROPOUT": dropout_p > 0 and seed is not None, "HAS_WEIGHTS": weights is not None,
        "STORE_DFFN": dffn is not None, "STORE_DWEIGHTS": dweights is not None, "SUM_DFFN": sum_dffn,
        "X_BY_ROW": "x" in by_row, "FFN_BY_ROW": "ffn" in by_row,
        "DY_BY_ROW": "dy" in by_row, "DZ_BY_ROW": "dz" in by_row,
        "BLOCK_R": max(1, min(4, 2048 // options["BLOCK_H"])), **options,
    }  # fmt: skip
    launch(_add_norm_backward_kernel, (sums.shape[0],), arguments, constants)
