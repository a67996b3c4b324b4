"""Grouped GEMM: one launch forward; backward one for dx and two each for dw and db."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.column_sums import SUMS_CHUNK, Summand, add_chunks, column_sums
from moebert_kernels.kernels.config import (
    Config,
    Device,
    Precision,
    pick_config,
    precision_of,
    programs_per_multiprocessor,
)
from moebert_kernels.kernels.expert_gemm import expert_gemm
from moebert_kernels.kernels.expert_gemm_weights import Product, expert_gemm_weights
from moebert_kernels.kernels.fused_moe_ffn import combine
from moebert_kernels.kernels.launch import empty, made, recorded
from moebert_kernels.kernels.tiles import ceil_div, num_chunks


@recorded
def forward(x: Tensor, w: Tensor, bias: Tensor | None, grouping: Grouping, gather: bool) -> Tensor:
    """Rows (num_rows, N); zero past the routed ones."""
    y = empty(x, grouping.num_rows, w.shape[1])
    expert_gemm(x, w, y, grouping, bias=bias, gather=gather)
    return y


@recorded
def backward(
    dy: Tensor, x: Tensor, w: Tensor, grouping: Grouping, gather: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db); an entry is None where `needs` says so. dx has the order of x."""
    dx = None
    if needs[0] and gather:
        dx = rows_times_weights(dy, w.transpose(1, 2), grouping)
    elif needs[0]:
        dx = forward(dy, w.transpose(1, 2), None, grouping, gather=False)
    dw = weight_gradients([(dy, x, False, gather)], grouping)[0] if needs[1] else None
    return dx, dw, bias_gradients([Summand(dy)], grouping)[0] if needs[2] else None


def rows_times_weights(
    rows: Tensor, w: Tensor, grouping: Grouping, bias: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Rows (num_rows, K) times w (E, N, K) -> tokens (T, N), weighted and summed over a token's experts."""
    by_assignment = empty(rows, grouping.num_rows, w.shape[1])
    expert_gemm(rows, w, by_assignment, grouping, bias=bias, weights=weights, scatter=True)
    if grouping.top_k == 1:
        return by_assignment
    y = empty(rows, grouping.num_tokens, w.shape[1])
    combine(by_assignment, y, grouping.top_k)
    return y


def weight_gradients(pairs: Sequence[tuple[Tensor, Tensor, bool, bool]], grouping: Grouping) -> list[Tensor]:
    """dw (E, M, N) = a.T @ b over each expert's rows, of one or two (a, b, gather_a, gather_b); zero where it has none.

    All tensors of one dtype. One launch for both products, and one that adds the partial sums.
    """
    num_experts, a = grouping.num_experts, pairs[0][0]
    gathers = any(pair[2] or pair[3] for pair in pairs)
    sizes = tuple((a.shape[1], b.shape[1]) for a, b, *_ in pairs)
    device = Device.of(a.device)
    config = pick_config("weights", grouping.num_rows, num_experts, *sizes[0], a.dtype, device)
    if gathers:
        config = config.gathering()
    programs = _programs(config, grouping.num_rows, num_experts, sizes, precision_of(a.dtype), device)
    partials = empty(a, 2 * programs, config.BLOCK_M, config.BLOCK_N, dtype=torch.float32)
    products = [
        Product(_adjacent(a), _adjacent(b), empty(a, num_experts, m, n), gather_a, gather_b)
        for (a, b, gather_a, gather_b), (m, n) in zip(pairs, sizes, strict=True)
    ]
    expert_gemm_weights(products, partials, grouping, config=config)
    return [product.dw for product in products]


def _programs(
    config: Config, rows: int, num_experts: int, sizes: Sequence[tuple[int, int]], precision: Precision, device: Device
) -> int:
    """How many programs share the steps: as many as run at once, but no more than there can be steps."""
    tiles = sum(ceil_div(m, config.BLOCK_M) * ceil_div(n, config.BLOCK_N) for m, n in sizes)
    slots = device.multiprocessors * max(1, programs_per_multiprocessor(config, "weights", precision, device))
    return min(slots, tiles * num_chunks(rows, num_experts, config.BLOCK_K))


def _adjacent(rows: Tensor) -> Tensor:
    """With neighbouring columns in neighbouring places."""
    return rows if rows.stride(1) == 1 else made(Tensor.contiguous, rows)


def sums_of_chunks(like: Tensor, grouping: Grouping, columns: int) -> Tensor:
    """Scratch (chunks, columns) float32 for sums of SUMS_CHUNK rows each."""
    return empty(like, num_chunks(grouping.num_rows, grouping.num_experts, SUMS_CHUNK), columns, dtype=torch.float32)


def bias_gradients(
    summands: Sequence[Summand], grouping: Grouping, begun: Tensor | None = None,
    others: Sequence[tuple[Tensor | None, int]] = (),
) -> list[Tensor]:  # fmt: skip
    """db (E, N) = sum of weights * a over each expert's rows, of up to two summands; zero where it has none.

    Two launches: the second also adds what other kernels left in the first columns of `begun`, for `others`. `begun`
    has the columns of `others` and of the summands, and no more.
    """
    summands = [summand._replace(a=_adjacent(summand.a)) for summand in summands]
    widths = [summand.a.shape[1] for summand in summands]
    before = sum(columns for _, columns in others)
    sums = sums_of_chunks(summands[0].a, grouping, sum(widths)) if begun is None else begun
    if summands:
        column_sums(summands, sums[:, before:], grouping)
    db = [empty(summand.a, grouping.num_experts, columns) for summand, columns in zip(summands, widths, strict=True)]
    add_chunks(sums, (*others, *zip(db, widths, strict=True)), grouping.offsets, SUMS_CHUNK)
    return db
