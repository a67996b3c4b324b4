"""Random inputs of a target's device and dtype: normal values, and expert ids as unequal as real text makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.measuring import Target
from benchmarks.real_text import expert_shares


class Draws:
    """Tensors drawn on the target's device, the same each time."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.generator = torch.Generator(target.device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.target.device)
        return (drawn * scale + shift).to(self.target.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.target.device)

    def expert_ids(self, T: int, E: int) -> Tensor:
        """(T,) ids with the shares that real text gives the experts of a hash table, equal ones if E is not 4.

        The first E tokens meet all experts: the hardest case for few tokens, since all weights are read.
        """
        shares = torch.tensor(expert_shares() if E == 4 else [1 / E] * E, device=self.target.device)
        first = torch.randperm(E, generator=self.generator, device=self.target.device)
        rest = torch.multinomial(shares, T, replacement=True, generator=self.generator)
        return torch.cat([first, rest])[:T]

    def top_k_ids(self, T: int, E: int, top_k: int) -> Tensor:
        """(T, top_k) different experts for each token, all equally likely."""
        return torch.rand(T, E, generator=self.generator, device=self.target.device).topk(top_k).indices

    def ffn_weights(self, *lead: int, H: int, width: int, rows: int | None = None, bias: bool = True) -> list[Tensor]:
        """w1 (*lead, rows, H), b1, w2 (*lead, H, width), b2; no biases if not `bias`. `rows`: by default `width`."""
        rows = rows or width
        w1, b1 = self.normal(*lead, rows, H, scale=H**-0.5), self.normal(*lead, rows, scale=0.1)
        w2, b2 = self.normal(*lead, H, width, scale=width**-0.5), self.normal(*lead, H, scale=0.1)
        return [w1, b1, w2, b2] if bias else [w1, w2]

    def norm_weights(self, *lead: int, H: int) -> list[Tensor]:
        return [self.normal(*lead, H, scale=0.1, shift=1.0), self.normal(*lead, H, scale=0.1)]
