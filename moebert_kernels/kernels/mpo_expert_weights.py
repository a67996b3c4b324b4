"""Expert weights from a shared central tensor, in Triton: W_e = L_e C R_e^T with W's order of rows and columns.

For a slice x = (i, j) of the central tensor C (D, i, j, D'), L_e (I J, D) C_x (D, D') R_e^T (D', K Q) is a block of W_e
whose element (I J, K Q) belongs in row (I, i, K) and column (J, j, Q). One program makes (BLOCK_A, BLOCK_B) elements of
it: block by block of D, C_x R_e^T is summed over D', and L_e times that is added up. Nothing between the two products
goes to memory, and the store puts every element where W has it. Programs of an expert without rows write zeros.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.kernels.config import Precision, precision_of
from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import MAPS, ceil_div, next_power_of_2

INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class FoldConfig:
    """Tile of a block of W_e, steps over D and D', and the launch."""

    BLOCK_A: int
    BLOCK_B: int
    BLOCK_D: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def name(self) -> str:
        return "x".join(str(value) for value in astuple(self))


# BLOCK_A is the most: all rows of L_e, if they are no more, so that C_x R_e^T is computed once.
CONFIGS: dict[Precision, FoldConfig] = {
    "half": FoldConfig(256, 128, 64, 32, 8, 4),
    "tf32": FoldConfig(256, 64, 32, 32, 8, 3),
    "ieee": FoldConfig(256, 32, 32, 32, 8, 2),
}
PERMUTE_ROWS, PERMUTE_COLUMNS = 32, 64  # of the copy's tiles


def pick_config(left_rows: int, right_rows: int, precision: Precision) -> FoldConfig:
    """The precision's configuration, with a tile no larger than the block it is for."""
    config = CONFIGS[precision]
    rows, columns = (max(16, next_power_of_2(size)) for size in (left_rows, right_rows))
    return replace(config, BLOCK_A=min(config.BLOCK_A, rows), BLOCK_B=min(config.BLOCK_B, columns))


@triton.jit
def _place(a, b, x, J, K, Q, MIDDLE_ROWS, MIDDLE_COLUMNS):
    """Where W_e (flat) has element (a, b) = (I J, K Q) of slice x = (i, j)."""
    columns = J * MIDDLE_COLUMNS * Q
    row = ((a // J * MIDDLE_ROWS + x // MIDDLE_COLUMNS) * K)[:, None] + (b // Q)[None, :]
    column = ((a % J * MIDDLE_COLUMNS + x % MIDDLE_COLUMNS) * Q)[:, None] + (b % Q)[None, :]
    return row * columns + column


@triton.jit
def _if_used(size, Offsets, expert):
    """`size` if the grouping gives the expert rows, or there is no grouping; else 0."""
    if Offsets is not None:
        size = tl.where(tl.load(Offsets + expert + 1) > tl.load(Offsets + expert), size, 0)
    return size


@triton.jit(do_not_specialize_on_alignment=MAPS)
def _fold_kernel(
    L, C, R, W, Offsets,  # (E, A, D), (D, slices, D_NEXT), (E, B, D_NEXT), (E, out, in), (E + 1,) or null
    A, B, D, D_NEXT, J, K, Q, MIDDLE_ROWS, MIDDLE_COLUMNS,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    tiles_a, tiles_b = tl.cdiv(A, BLOCK_A), tl.cdiv(B, BLOCK_B)
    tile = tl.program_id(0) % (tiles_a * tiles_b)
    x = tl.program_id(0) // (tiles_a * tiles_b)
    slices = MIDDLE_ROWS * MIDDLE_COLUMNS
    a = tile // tiles_b * BLOCK_A + tl.arange(0, BLOCK_A)
    b = tile % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_d, offs_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    # rows past the last are the last one again: what they make is not stored
    l_ptrs = L + expert.to(tl.int64) * A * D + tl.minimum(a, A - 1)[:, None] * D + offs_d[None, :]
    r_rows = R + expert.to(tl.int64) * B * D_NEXT + tl.minimum(b, B - 1)[None, :] * D_NEXT + offs_k[:, None]
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for d in range(0, _if_used(D, Offsets, expert), BLOCK_D):
        c_ptrs = C + ((d + offs_d)[:, None] * slices + x) * D_NEXT + offs_k[None, :]
        r_ptrs = r_rows
        inside_d = d + offs_d < D
        product = tl.zeros((BLOCK_D, BLOCK_B), tl.float32)
        for k in range(0, D_NEXT, BLOCK_K):
            if EVEN:
                c, r = tl.load(c_ptrs), tl.load(r_ptrs)
            else:
                inside_k = k + offs_k < D_NEXT
                c = tl.load(c_ptrs, mask=inside_d[:, None] & inside_k[None, :], other=0.0)
                r = tl.load(r_ptrs, mask=inside_k[:, None], other=0.0)
            if UPCAST:
                c, r = c.to(tl.float32), r.to(tl.float32)
            product = tl.dot(c, r, product, input_precision=PRECISION)
            c_ptrs += BLOCK_K
            r_ptrs += BLOCK_K
        left = tl.load(l_ptrs) if EVEN else tl.load(l_ptrs, mask=inside_d[None, :], other=0.0)
        rounded = product.to(W.dtype.element_ty)
        if UPCAST:
            left, rounded = left.to(tl.float32), rounded.to(tl.float32)
        acc = tl.dot(left, rounded, acc, input_precision=PRECISION)
        l_ptrs += BLOCK_D
    w_ptrs = W + expert.to(tl.int64) * A * B * slices + _place(a, b, x, J, K, Q, MIDDLE_ROWS, MIDDLE_COLUMNS)
    tl.store(w_ptrs, acc.to(W.dtype.element_ty), mask=(a < A)[:, None] & (b < B)[None, :])


@triton.jit(do_not_specialize_on_alignment=MAPS)
def _permute_kernel(
    W, P, Offsets,  # (E, out, in), (E, A * slices, B), (E + 1,) or null
    A, B, J, K, Q, MIDDLE_ROWS, MIDDLE_COLUMNS,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    tiles_b = tl.cdiv(B, BLOCK_B)
    slices = MIDDLE_ROWS * MIDDLE_COLUMNS
    rows = tl.program_id(0) // tiles_b * BLOCK_A + tl.arange(0, BLOCK_A)  # slices of one row of L_e are neighbours
    b = tl.program_id(0) % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    first = expert.to(tl.int64) * A * B * slices
    place = _place(rows // slices, b, rows % slices, J, K, Q, MIDDLE_ROWS, MIDDLE_COLUMNS)
    used = _if_used(A * slices, Offsets, expert)
    values = tl.load(W + first + place, mask=(rows < used)[:, None] & (b < B)[None, :], other=0.0)
    mask = (rows < A * slices)[:, None] & (b < B)[None, :]
    tl.store(P + first + rows[:, None] * B + b[None, :], values, mask=mask)


def fold(
    left: Tensor, central: Tensor, right: Tensor, w: Tensor, offsets: Tensor | None, left_columns: int,
    right_columns: int, config: FoldConfig | None = None,
) -> None:  # fmt: skip
    """Launch: w = L C R^T of every expert that has rows, and zeros of the others; all contiguous, checked by the op.

    Args:
        left: (E, I J, D), rows sorted by row factor first; `left_columns` is J.
        central: (D, i, j, D').
        right: (E, K Q, D'), likewise; `right_columns` is Q.
        w: (E, I i K, J j Q).
        offsets: (E + 1,) int32; None: all experts have rows.
    """
    (num_experts, rows, bond), (_, columns, next_bond) = left.shape, right.shape
    precision = precision_of(central.dtype)
    if config is None:
        config = pick_config(rows, columns, precision)
    tiles = ceil_div(rows, config.BLOCK_A) * ceil_div(columns, config.BLOCK_B)
    arguments = (
        left, central, right, w, offsets,
        rows, columns, bond, next_bond, left_columns, columns // right_columns, right_columns, *central.shape[1:3],
    )  # fmt: skip
    constants = {
        "EVEN": bond % config.BLOCK_D == 0 and next_bond % config.BLOCK_K == 0,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "UPCAST": INTERPRETED and central.element_size() == 2,
        **asdict(config),
    }
    launch(_fold_kernel, (tiles * central.shape[1] * central.shape[2], num_experts), arguments, constants)


def permute(
    w: Tensor, permuted: Tensor, offsets: Tensor | None, central_rows: int, central_columns: int, left_columns: int,
    right_columns: int,
) -> None:  # fmt: skip
    """Launch: w (E, I i K, J j Q) as (E, I J i j, K Q), both contiguous; zeros for experts without rows."""
    num_experts, rows, columns = permuted.shape
    slices = central_rows * central_columns
    tiles = ceil_div(rows, PERMUTE_ROWS) * ceil_div(columns, PERMUTE_COLUMNS)
    arguments = (
        w, permuted, offsets,
        rows // slices, columns, left_columns, columns // right_columns, right_columns, central_rows, central_columns,
    )  # fmt: skip
    constants = {"BLOCK_A": PERMUTE_ROWS, "BLOCK_B": PERMUTE_COLUMNS, "num_warps": 4}
    launch(_permute_kernel, (tiles, num_experts), arguments, constants)
