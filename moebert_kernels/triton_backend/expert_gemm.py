"""Grouped GEMM: one launch forward; backward one for dx and one or two for dw and db."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.config import Device, pick_chunk, pick_config
from moebert_kernels.kernels.expert_gemm import expert_gemm
from moebert_kernels.kernels.expert_gemm_weights import expert_gemm_weights, reduce_chunks
from moebert_kernels.kernels.fused_moe_ffn import combine
from moebert_kernels.kernels.tiles import num_chunks


def forward(x: Tensor, w: Tensor, bias: Tensor | None, grouping: Grouping, gather: bool) -> Tensor:
    """Rows (num_rows, N); zero past the routed ones."""
    y = x.new_empty(grouping.num_rows, w.shape[1])
    expert_gemm(x, w, y, grouping, bias=bias, gather=gather)
    return y


def backward(
    dy: Tensor, x: Tensor, w: Tensor, grouping: Grouping, gather: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db); an entry is None where `needs` says so. dx has the order of x."""
    dx = None
    if needs[0] and gather:
        dx = rows_times_weights(dy, w.transpose(1, 2), grouping)
    elif needs[0]:
        dx = forward(dy, w.transpose(1, 2), None, grouping, gather=False)
    dw, db = weight_gradients(dy, x, grouping, needs[1], needs[2], gather_b=gather)
    return dx, dw, db


def rows_times_weights(
    rows: Tensor, w: Tensor, grouping: Grouping, bias: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Rows (num_rows, K) times w (E, N, K) -> tokens (T, N), weighted and summed over a token's experts."""
    by_assignment = rows.new_empty(grouping.num_rows, w.shape[1])
    expert_gemm(rows, w, by_assignment, grouping, bias=bias, weights=weights, scatter=True)
    if grouping.top_k == 1:
        return by_assignment
    y = rows.new_empty(grouping.num_tokens, w.shape[1])
    combine(by_assignment, y, grouping.top_k)
    return y


def weight_gradients(
    a: Tensor, b: Tensor, grouping: Grouping, need_dw: bool, need_db: bool, *,
    weights: Tensor | None = None, gather_a: bool = False, gather_b: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dw (E, M, N) = a.T @ b and db (E, M) = sum of weights * a, over each expert's rows; zero where it has none."""
    if not (need_dw or need_db):
        return None, None
    rows, num_experts, (depth_a, depth_b) = grouping.num_rows, grouping.num_experts, (a.shape[1], b.shape[1])
    device = Device.of(a.device)
    config = pick_config("weights", rows, num_experts, depth_a, depth_b, a.dtype, device)
    tiles = math.ceil(depth_a / config.BLOCK_M) * math.ceil(depth_b / config.BLOCK_N)
    chunk = pick_chunk(rows, tiles, device)
    split = rows > chunk

    slots = num_chunks(rows, num_experts, chunk) if split else num_experts
    partial_dtype = torch.float32 if split else a.dtype
    dw = a.new_empty(slots, depth_a, depth_b, dtype=partial_dtype) if need_dw else None
    db = a.new_empty(slots, depth_a, dtype=partial_dtype) if need_db else None
    expert_gemm_weights(
        a, b, dw, db, grouping, chunk=chunk, config=config, split=split,
        weights=weights, gather_a=gather_a, gather_b=gather_b,
    )  # fmt: skip
    if split:
        dw, db = (None if t is None else sum_chunks(t, grouping, chunk, a.dtype) for t in (dw, db))
    return dw, db


def sum_chunks(partials: Tensor, grouping: Grouping, chunk: int, dtype: torch.dtype) -> Tensor:
    """(chunks, ...) -> (E, ...)."""
    total = partials.new_empty(grouping.num_experts, *partials.shape[1:], dtype=dtype)
    reduce_chunks(partials, total, grouping.offsets, chunk)
    return total
