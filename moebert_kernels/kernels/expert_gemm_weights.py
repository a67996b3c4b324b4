"""Weight gradients: sums over each expert's rows, of one or two problems in one launch.

    dW[e] = sum_r A[from_a(r)].T * B[from_b(r)]

A tile of dW[e] takes as many steps as its expert has blocks of rows. With few experts there are too few tiles for a
GPU, and the largest expert decides the time. So all steps of all tiles stand in one order (expert, problem, tile,
step), and each program takes an equal run of it ("stream-K", arXiv 2301.03598): the work is even whatever the routing.
A program stores a tile that is wholly its own; of a tile that it shares it stores a float32 partial, at most two of
them, and a second kernel adds a tile's partials in the order of the programs: the same bits every time. An expert
without rows has one empty step per tile, which writes its zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.config import Config, precision_of
from moebert_kernels.kernels.expert_gemm import INTERPRETED
from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import MAPS, ceil_div, num_chunks, padded_experts

_REDUCE_BLOCK = 1024


class Product(NamedTuple):
    """dw (E, M, N) = a.T @ b over each expert's rows."""

    a: Tensor  # (rows, M) in row order, or (T, M) with `gather_a`
    b: Tensor  # (rows, N) in row order, or (T, N) with `gather_b`
    dw: Tensor  # contiguous
    gather_a: bool = False
    gather_b: bool = False

    def tiles(self, config: Config) -> int:
        columns_a, columns_b = self.dw.shape[1:]
        return ceil_div(columns_a, config.BLOCK_M) * ceil_div(columns_b, config.BLOCK_N)


@triton.jit
def _steps_of_experts(Offsets, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK_K: tl.constexpr):
    """Expert numbers, first rows, ends, and steps of a tile of each expert, (E_POW2,)."""
    e = tl.arange(0, E_POW2)
    first = tl.load(Offsets + e, mask=e < E, other=0)
    end = tl.load(Offsets + e + 1, mask=e < E, other=0)
    steps = tl.where(e < E, tl.maximum((end - first + BLOCK_K - 1) // BLOCK_K, 1), 0)
    return e, first, end, steps.to(tl.int64)


@triton.jit(do_not_specialize_on_alignment=MAPS)
def _expert_gemm_weights_kernel(
    A0, stride_a0, B0, stride_b0, DW0, M0, N0,  # columns of A and B are adjacent
    A1, stride_a1, B1, stride_b1, DW1, M1, N1,  # of the second product, or null
    Partials,  # (2 * programs, BLOCK_M, BLOCK_N) float32
    Offsets, RowToToken,  # (E + 1,), (rows,) int32
    TOP_K,
    E: tl.constexpr, E_POW2: tl.constexpr, TWO: tl.constexpr,
    GATHER_A0: tl.constexpr, GATHER_B0: tl.constexpr, GATHER_A1: tl.constexpr, GATHER_B1: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles0 = tl.cdiv(M0, BLOCK_M) * tl.cdiv(N0, BLOCK_N)
    tiles = tiles0
    if TWO:
        tiles += tl.cdiv(M1, BLOCK_M) * tl.cdiv(N1, BLOCK_N)
    e, first_rows, end_rows, steps_of = _steps_of_experts(Offsets, E, E_POW2, BLOCK_K)
    units_to = tl.cumsum(steps_of * tiles, 0)
    total = tl.sum(steps_of, 0) * tiles
    program = tl.program_id(0).to(tl.int64)
    programs = tl.minimum(tl.num_programs(0), total)  # the host knew an upper bound; the others do nothing
    unit = total * program // programs
    last = tl.minimum(total * (program + 1) // programs, total)
    while unit < last:
        expert = tl.sum((units_to <= unit).to(tl.int32), 0)
        own = e == expert
        steps = tl.sum(tl.where(own, steps_of, 0), 0)
        within = unit - tl.sum(tl.where(own, units_to, 0), 0) + steps * tiles
        step = within % steps
        count = tl.minimum(steps - step, last - unit)
        tile = (within // steps).to(tl.int32)
        end = tl.sum(tl.where(own, end_rows, 0), 0)
        begin = tl.sum(tl.where(own, first_rows, 0), 0) + step.to(tl.int32) * BLOCK_K
        stop = tl.minimum(begin + count.to(tl.int32) * BLOCK_K, end)

        a_base, b_base, dw, stride_a, stride_b, M, N = A0, B0, DW0, stride_a0, stride_b0, M0, N0
        if TWO:
            second = tile >= tiles0
            tile = tl.where(second, tile - tiles0, tile)
            a_base, b_base, dw = tl.where(second, A1, A0), tl.where(second, B1, B0), tl.where(second, DW1, DW0)
            stride_a, stride_b = tl.where(second, stride_a1, stride_a0), tl.where(second, stride_b1, stride_b0)
            M, N = tl.where(second, M1, M0), tl.where(second, N1, N0)
        tiles_n = tl.cdiv(N, BLOCK_N)
        offs_m = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for row0 in range(begin, stop, BLOCK_K):
            row = row0 + tl.arange(0, BLOCK_K)
            inside = row < end
            row_a, row_b = row.to(tl.int64), row.to(tl.int64)
            if GATHER_A0 or GATHER_B0 or GATHER_A1 or GATHER_B1:
                token = (tl.load(RowToToken + row, mask=inside, other=0) // TOP_K).to(tl.int64)
                if TWO:
                    row_a = tl.where(tl.where(second, GATHER_A1, GATHER_A0), token, row_a)
                    row_b = tl.where(tl.where(second, GATHER_B1, GATHER_B0), token, row_b)
                else:
                    row_a = token if GATHER_A0 else row_a
                    row_b = token if GATHER_B0 else row_b
            mask_a = inside[:, None] if EVEN else inside[:, None] & (offs_m < M)[None, :]
            mask_b = inside[:, None] if EVEN else inside[:, None] & (offs_n < N)[None, :]
            a = tl.load(a_base + row_a[:, None] * stride_a + offs_m[None, :], mask=mask_a, other=0.0)
            b = tl.load(b_base + row_b[:, None] * stride_b + offs_n[None, :], mask=mask_b, other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

        if count == steps:
            target = dw + expert.to(tl.int64) * M * N + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
            tl.store(target, acc.to(DW0.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
        else:
            slot = 2 * program + (step == 0).to(tl.int64)
            at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            tl.store(Partials + slot * (BLOCK_M * BLOCK_N) + at, acc)
        unit += count


@triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=MAPS)
def _add_partials_kernel(
    Partials,  # (2 * programs, BLOCK_M, BLOCK_N) float32
    DW0, M0, N0, DW1, M1, N1, Offsets, programs,
    E: tl.constexpr, E_POW2: tl.constexpr, TWO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a tile that programs share, a part: the sum of what they stored."""
    tiles0 = tl.cdiv(M0, BLOCK_M) * tl.cdiv(N0, BLOCK_N)
    tiles = tiles0
    if TWO:
        tiles += tl.cdiv(M1, BLOCK_M) * tl.cdiv(N1, BLOCK_N)
    e, _, _, steps_of = _steps_of_experts(Offsets, E, E_POW2, BLOCK_K)
    total = tl.sum(steps_of, 0) * tiles
    programs = tl.minimum(programs, total)  # that have steps
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    steps = tl.sum(tl.where(e == expert, steps_of, 0), 0)
    unit = tl.sum(tl.where(e < expert, steps_of, 0), 0) * tiles + steps * tile
    first = ((unit + 1) * programs - 1) // total  # the program whose run holds the unit
    last = ((unit + steps) * programs - 1) // total
    if first == last:
        return
    dw, M, N = DW0, M0, N0
    if TWO:
        second = tile >= tiles0
        tile = tl.where(second, tile - tiles0, tile)
        dw, M, N = tl.where(second, DW1, DW0), tl.where(second, M1, M0), tl.where(second, N1, N0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # the first program's run ends in the tile, the others' begin in it
    sums = tl.load(Partials + (2 * first + 1) * (BLOCK_M * BLOCK_N) + at)
    for program in range(first + 1, last + 1):
        sums += tl.load(Partials + 2 * program * (BLOCK_M * BLOCK_N) + at)
    tiles_n = tl.cdiv(N, BLOCK_N)
    m, n = tile // tiles_n * BLOCK_M + at // BLOCK_N, tile % tiles_n * BLOCK_N + at % BLOCK_N
    target = dw + expert.to(tl.int64) * M * N + m.to(tl.int64) * N + n
    tl.store(target, sums.to(DW0.dtype.element_ty), mask=(m < M) & (n < N))


def num_programs(products: Sequence[Product], grouping: Grouping, config: Config, slots: int) -> int:
    """As many as run at once (`slots`), but no more than there can be steps."""
    tiles = sum(product.tiles(config) for product in products)
    return min(slots, tiles * num_chunks(grouping.num_rows, grouping.num_experts, config.BLOCK_K))


def expert_gemm_weights(products: Sequence[Product], partials: Tensor, grouping: Grouping, *, config: Config) -> None:
    """Launch twice: dw of one or two products over the rows of each expert.

    Args:
        products: operands with adjacent columns, all of one dtype.
        partials: (2 * `num_programs`, BLOCK_M, BLOCK_N) float32, of scratch.
    """
    tiles = sum(product.tiles(config) for product in products)
    if tiles == 0:
        return
    first, second = products[0], products[-1]
    num_experts, top_k, programs = grouping.num_experts, grouping.top_k, partials.shape[0] // 2
    precision = precision_of(first.a.dtype)
    sizes = {"E": num_experts, "E_POW2": padded_experts(num_experts), "TWO": len(products) > 1}
    arguments = (
        first.a, first.a.stride(0), first.b, first.b.stride(0), first.dw, *first.dw.shape[1:],
        second.a, second.a.stride(0), second.b, second.b.stride(0), second.dw, *second.dw.shape[1:],
        partials, grouping.offsets, grouping.row_to_assignment, top_k,
    )  # fmt: skip
    even = all(p.dw.shape[1] % config.BLOCK_M == 0 and p.dw.shape[2] % config.BLOCK_N == 0 for p in products)
    constants = {
        **sizes,
        "GATHER_A0": first.gather_a, "GATHER_B0": first.gather_b,
        "GATHER_A1": second.gather_a, "GATHER_B1": second.gather_b,
        "EVEN": even, "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "UPCAST": INTERPRETED and first.a.element_size() == 2, **config.options(),
    }  # fmt: skip
    launch(_expert_gemm_weights_kernel, (programs,), arguments, constants)
    elements = config.BLOCK_M * config.BLOCK_N
    block = min(_REDUCE_BLOCK, elements)
    arguments = (
        partials, first.dw, *first.dw.shape[1:], second.dw, *second.dw.shape[1:], grouping.offsets, programs
    )  # fmt: skip
    blocks = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K, "BLOCK": block}
    launch(_add_partials_kernel, (num_experts * tiles, elements // block), arguments, sizes | blocks)
