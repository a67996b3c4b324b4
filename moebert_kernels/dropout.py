"""Dropout masks from a counter: the same (seed, row, column) gives the same bit in every backend, in any order.

Philox4x32 with 7 rounds (Salmon et al., SC'11: the fewest that pass BigCrush). One call serves 8 neighbouring columns
with 16 bits each, so p is a multiple of 2^-16:

    counter = (column // 8, row, row >> 32, stream)    key = (seed, seed >> 32)
    bits    = 16-bit half `column % 2` (low first) of word `column % 8 // 2`
    keep    = bits >= round(p * 65536);  kept values are scaled by 65536 / (65536 - round(p * 65536))
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
HIDDEN_STREAM = 0  # after the activation; rows are assignments, columns are 0..I-1
OUTPUT_STREAM = 1  # before the residual; rows are tokens, columns are 0..H-1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The number of 16-bit values that mean "drop"."""
    return round(p * 65536)


def scale(p: float) -> float:
    """The factor on kept values; exactly unbiased for the p that `threshold` can hold."""
    return 65536 / (65536 - threshold(p))


def draw_seed(device: torch.device) -> Tensor:
    """() int64, from torch's generator of `device`: no host synchronisation."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # 32-bit words live in int64. c1 and c3 may carry garbage above bit 31: they are only xor-ed, then masked.
    keys = [seed & _MASK32, (seed >> 32) & _MASK32]
    for i in range(ROUNDS):
        k0, k1 = ((key + i * weyl) & _MASK32 for key, weyl in zip(keys, _WEYL, strict=True))
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) ^ (c1 ^ k0)).bitwise_and_(_MASK32), p1
        c2, c3 = ((p0 >> 32) ^ (c3 ^ k1)).bitwise_and_(_MASK32), p0
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, rows: Tensor, columns: int, p: float, stream: int) -> Tensor:
    """Which elements survive dropout.

    Args:
        seed: () int64.
        rows: (N,) integer. Row index of the counter: tokens or assignments.
        columns: number of columns.
        p: probability of dropping, 0 <= p < 1.
        stream: HIDDEN_STREAM or OUTPUT_STREAM.

    Returns:
        (N, columns) bool.
    """
    blocks = torch.arange((columns + 7) // 8, device=rows.device)[None, :]
    row = rows.long()[:, None]
    words = _philox(blocks, row & _MASK32, row >> 32, torch.full_like(blocks, stream), seed.to(rows.device))
    keep = torch.empty(rows.shape[0], blocks.shape[1], 8, dtype=torch.bool, device=rows.device)
    drop_below = threshold(p)
    for i, word in enumerate(words):
        torch.ge(word & 0xFFFF, drop_below, out=keep[:, :, 2 * i])
        torch.ge((word >> 16) & 0xFFFF, drop_below, out=keep[:, :, 2 * i + 1])
    return keep.flatten(1)[:, :columns]
