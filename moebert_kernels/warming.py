"""Compile before the first request: which lengths to run for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from moebert_kernels.kernels.config import Config, Pick, noted_picks, pick

_EVERY = 1024  # all lengths up to it are looked at, and beyond it every multiple of
_STEP = 64


def warmup(run: Callable[[int], object], tokens: tuple[int, int]) -> list[int]:
    """Run `run(T)` at the few lengths T that make the ops compile all that they launch for any length.

    What an op compiles follows from the layouts and dtypes of its arguments and from the tile sizes, which it chooses
    by the number of tokens. So the lengths that run are the ends of the range, the powers of two in it, and those that
    bring a tile of their own. Triton keeps what it compiled on disk: the next process only loads it.

    Args:
        run: what a request or a training step does with T tokens, e.g.
            `lambda T: model(input_ids=torch.zeros(1, T, dtype=torch.long, device="cuda"))`, under the same autocast and
            gradient mode. What it changes (gradients, random numbers) stays changed. Where it can only have more tokens
            than T, as with whole sequences, it runs the next possible number.
        tokens: the least and the most tokens.

    Returns:
        The lengths that ran.

    Raises:
        ValueError: tokens are no two integers of at least 1 in ascending order.
    """
    if not _is_range(tokens):
        raise ValueError(f"tokens: expected the least and the most, integers of at least 1, got {tokens!r}")
    low, high = tokens
    ran: list[int] = []
    asked: set[Pick] = set()
    with noted_picks() as picks:
        for length in sorted({low, high, *(2**i for i in range(low.bit_length(), high.bit_length()))}, reverse=True):
            picks.clear()
            run(length)
            ran.append(length)
            asked |= {found._replace(rows=Fraction(found.rows, length)) for found in picks}
        seen = {tile for length in ran for tile in _tiles(asked, length)}
        for length in _lengths(low, high):
            if not seen.issuperset(tiles := _tiles(asked, length)):
                seen |= tiles
                run(length)
                ran.append(length)
    return ran


def _is_range(tokens: Any) -> bool:
    ends = isinstance(tokens, tuple) and len(tokens) == 2 and all(type(end) is int for end in tokens)
    return ends and 1 <= tokens[0] <= tokens[1]


def _lengths(low: int, high: int) -> Iterator[int]:
    yield from range(low, min(high, _EVERY) + 1)
    yield from range(max(low, _EVERY) // _STEP * _STEP + _STEP, high + 1, _STEP)


def _tiles(asked: set[Pick], length: int) -> set[tuple[Pick, Config]]:
    return {(found, pick(found._replace(rows=int(found.rows * length)))) for found in asked}
