"""The masks of `moebert_kernels.dropout` in Triton: the same counter, the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from moebert_kernels import dropout

_ROUNDS: tl.constexpr = tl.constexpr(dropout.ROUNDS)


@triton.jit
def keep_tile(Seed, rows, first_column, threshold, COLUMNS: tl.constexpr, STREAM: tl.constexpr):
    """(BLOCK, COLUMNS) bool: which elements survive.

    rows: (BLOCK,) int64, of the counter. first_column and COLUMNS: multiples of 8, so that one Philox call serves 8.
    """
    seed = tl.load(Seed).to(tl.uint64, bitcast=True)
    block = (first_column // 8 + tl.arange(0, COLUMNS // 8))[None, :].to(tl.uint32)
    row = rows[:, None].to(tl.uint64)
    zero = (row * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        block + zero, row.to(tl.uint32) + block * 0, (row >> 32).to(tl.uint32) + block * 0, zero + block * 0 + STREAM,
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32), n_rounds=_ROUNDS,
    )  # fmt: skip
    # column % 8 = 4 * (high bit of the word's index) + 2 * (its low bit) + half
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    bits = tl.reshape(tl.join(low, high), (rows.shape[0], COLUMNS))
    return bits.to(tl.int32) >= threshold
