"""How programs find their work without the host reading `offsets`: row tiles and row chunks that never cross an expert.

Every program scans the E + 1 offsets itself: one load, as reading a stored map would be, and no map is written, kept
or passed along (docs/design/0005).
"""

from __future__ import annotations

import triton
import triton.language as tl


# Not triton.cdiv and triton.next_power_of_2, which take 10 us each on the host.
def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def num_row_tiles(rows: int, num_experts: int, block: int) -> int:
    """The most tiles of `block` rows that E experts and the skipped rows can have together, whatever the routing."""
    return rows // block + num_experts + 1


def num_chunks(rows: int, num_experts: int, chunk: int) -> int:
    """The most chunks that E experts can have together; an expert without rows has one, to write its zeros."""
    return rows // chunk + num_experts


def padded_experts(num_experts: int) -> int:
    """Room for the offsets: E experts and the skipped rows, a power of two."""
    return next_power_of_2(num_experts + 1)


# Parameters that kernels call so begin anywhere: a layer's offsets and rows lie behind those of others. A kernel that
# knew where they are aligned would be compiled twice, and gain nothing, as an expert's rows begin anywhere too.
MAPS = ("Offsets", "RowToToken", "TokenToRow")


@triton.jit
def row_tile(Offsets, tile, rows, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK: tl.constexpr):
    """Expert, first row and the end of the expert's rows. Expert E: rows that no expert has; above: no such tile."""
    e = tl.arange(0, E_POW2)
    first = tl.load(Offsets + e, mask=e <= E, other=rows)
    end = tl.load(Offsets + e + 1, mask=e < E, other=rows)
    tiles = (end - first + BLOCK - 1) // BLOCK
    before_next = tl.cumsum(tiles, 0)
    expert = tl.sum((before_next <= tile).to(tl.int32), 0)
    mine = e == expert
    row = tl.sum(tl.where(mine, first - (before_next - tiles) * BLOCK, 0), 0) + tile * BLOCK
    return expert, row, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def num_expert_tiles(Offsets, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK: tl.constexpr):
    """Row tiles of all experts: those of `row_tile` before the ones of rows that no expert has."""
    e = tl.arange(0, E_POW2)
    rows = tl.load(Offsets + e + 1, mask=e < E, other=0) - tl.load(Offsets + e, mask=e < E, other=0)
    return tl.sum((rows + BLOCK - 1) // BLOCK, 0)


@triton.jit
def row_chunk(Offsets, chunk, E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr):
    """Expert, first row and row past the last of chunk `chunk`; an expert that is not below E: no such chunk."""
    e = tl.arange(0, E_POW2)
    first = tl.load(Offsets + e, mask=e < E, other=0)
    end = tl.load(Offsets + e + 1, mask=e < E, other=0)
    chunks = tl.where(e < E, tl.maximum((end - first + CHUNK - 1) // CHUNK, 1), 0)
    before_next = tl.cumsum(chunks, 0)
    expert = tl.sum((before_next <= chunk).to(tl.int32), 0)
    mine = e == expert
    row = tl.sum(tl.where(mine, first - (before_next - chunks) * CHUNK, 0), 0) + chunk * CHUNK
    return expert, row, tl.minimum(row + CHUNK, tl.sum(tl.where(mine, end, 0), 0))


@triton.jit
def chunks_of(Offsets, expert, E: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr):
    """First chunk of an expert, and the one past its last."""
    e = tl.arange(0, E_POW2)
    first = tl.load(Offsets + e, mask=e < E, other=0)
    end = tl.load(Offsets + e + 1, mask=e < E, other=0)
    chunks = tl.where(e < E, tl.maximum((end - first + CHUNK - 1) // CHUNK, 1), 0)
    before = tl.sum(tl.where(e < expert, chunks, 0), 0)
    return before, before + tl.sum(tl.where(e == expert, chunks, 0), 0)


@triton.jit
def expert_of_rows(Offsets, rows, E: tl.constexpr, E_POW2: tl.constexpr):
    """Expert of each row of a block; E for rows that no expert has."""
    e = tl.arange(0, E_POW2)
    end = tl.load(Offsets + e + 1, mask=e < E, other=0)
    passed = (rows[:, None] >= end[None, :]) & (e < E)[None, :]
    return tl.sum(passed.to(tl.int32), 1)


@triton.jit
def _column_halves(tile):
    by_half = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(by_half, (0, 2, 1)))


@triton.jit
def column_slices(tile, SLICES: tl.constexpr):
    """1, 2 or 4 equal parts of a tile's columns. A thread of a matrix product's tile holds columns of each."""
    if SLICES == 1:
        slices = (tile,)
    elif SLICES == 2:
        slices = _column_halves(tile)
    else:
        tl.static_assert(SLICES == 4)
        left, right = _column_halves(tile)
        first, second = _column_halves(left)
        third, last = _column_halves(right)
        slices = (first, second, third, last)  # type: ignore[assignment]
    return slices
