"""The balance loss of learned routers: over one batch, or over all micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moebert_kernels.nn.context import hold


def balance_loss(probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """E * sum_e(mean probability of e * fraction routed to e): 1 if balanced, E if all go to one (Switch, 2101.03961).

    Args:
        probabilities: (..., E) float.
        expert_ids: (...), values in [0, E).
        counted: (...) bool, True for tokens that enter the means. None: all do.

    Returns:
        A scalar, dtype of `probabilities`; 0 if nothing is counted. Differentiable in `probabilities`.
    """
    summed, tokens = _sums(probabilities, expert_ids, counted)
    number = tokens.sum().clamp(min=1)
    return probabilities.shape[-1] * (summed / number * (tokens / number)).sum()


def sequence_balance_loss(probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean of the sequences' own balance losses, as in GShard; shapes (B, T, E), (B, T), (B, T)."""
    if expert_ids.shape[0] == 0:  # a symbol in torch.export, which len is not
        return probabilities.sum()
    if counted is None:
        return torch.vmap(balance_loss)(probabilities, expert_ids).mean()
    return torch.vmap(balance_loss)(probabilities, expert_ids, counted).mean()


def _sums(probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each expert, the sum of its probabilities and the number of its tokens; (E,), dtype of `probabilities`."""
    chosen = expert_ids.unsqueeze(-1) == torch.arange(probabilities.shape[-1], device=expert_ids.device)
    chosen = chosen.to(probabilities.dtype)
    over = tuple(range(expert_ids.ndim))
    if counted is None:
        return probabilities.sum(over), chosen.sum(over)
    weight = counted.to(probabilities.dtype).unsqueeze(-1)
    return (probabilities * weight).sum(over), (chosen * weight).sum(over)


class Balance(nn.Module):
    """A router's balance loss. Without parameters: a module for `BalanceWindow` to find.

    Args:
        num_experts: E.
        per_sequence: the mean over the sequences of their own losses.
    """

    def __init__(self, num_experts: int, per_sequence: bool = False) -> None:
        super().__init__()
        self.per_sequence = per_sequence
        self.num_counts = 1 if per_sequence else num_experts  # of sequences, or of each expert's tokens
        self.part: _Part | None = None  # while a `BalanceWindow` is open

    def forward(self, probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None = None) -> Tensor:
        """The loss of a batch, (); within a `BalanceWindow` its part of the window's. Arguments as `balance_loss`."""
        part = hold(self, self.part)
        if part is not None:
            return self._part_of_window(part, probabilities, expert_ids, counted)
        return (sequence_balance_loss if self.per_sequence else balance_loss)(probabilities, expert_ids, counted)

    def _part_of_window(self, part: _Part, probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None) -> Tensor:
        counts, share = part.counts.to(probabilities.device), part.share
        if self.per_sequence:
            summed = sequence_balance_loss(probabilities, expert_ids, counted) * expert_ids.shape[0]
            return summed if share is None else summed / (counts[0] * share)
        summed, tokens = _sums(probabilities, expert_ids, counted)
        if share is None:
            part.counts.add_(tokens.detach().to(part.counts))
            return summed.sum()
        number = counts.sum().clamp(min=1)
        return probabilities.shape[-1] * (summed / (number * share) * (counts / number)).sum()


class _Part(NamedTuple):
    """What a window tells a router: the counts, and the share of the micro-batch, or None while it counts."""

    counts: Tensor
    share: float | Tensor | None


class BalanceWindow:
    """The balance losses of all routers of a model over micro-batches that run one after another.

    The loss is a product of two means over tokens, so it is not a mean of the micro-batches' own losses. What it needs
    from the other micro-batches, the number of tokens of each expert, has no gradient. So the routers count in a first
    pass, and in the second pass each micro-batch has a loss of its own:

        window = BalanceWindow(model)
        with torch.no_grad(), window.counting(device, sequences):  # of all batches together
            for batch in batches if window.needs_pass else []:
                model(**batch)
        for batch, share in zip(batches, shares):  # of the step's loss
            with window.part(share):
                (share * model(**batch).loss).backward()

    Attributes:
        needs_pass: whether a router's loss is over tokens. A mean over sequences needs only their number.
    """

    def __init__(self, model: nn.Module) -> None:
        self._balances = [module for module in model.modules() if isinstance(module, Balance)]
        self.needs_pass = not all(balance.per_sequence for balance in self._balances)
        self._sizes = [balance.num_counts for balance in self._balances]
        self._flat: Tensor | None = None  # always the same memory, where CUDA graphs read it
        self._counts: tuple[Tensor, ...] = ()

    @contextmanager
    def counting(
        self, device: torch.device, sequences: int, reduce: Callable[[Tensor], Tensor] = lambda counts: counts
    ) -> Iterator[None]:
        """Forget what was counted and count anew; `reduce` adds up what several processes have counted."""
        if self._flat is None:
            self._flat = torch.zeros(sum(self._sizes), device=device)
        self._counts = self._flat.zero_().split(self._sizes)
        for balance, counts in zip(self._balances, self._counts, strict=True):
            if balance.per_sequence:
                counts += sequences
        with self._open(None):
            yield
        self._flat.copy_(reduce(self._flat))

    @contextmanager
    def part(self, share: float | Tensor) -> Iterator[None]:
        """Losses such that their sum over the micro-batches, times `share` each, is the window's."""
        with self._open(share):
            yield

    @contextmanager
    def _open(self, share: float | Tensor | None) -> Iterator[None]:
        for balance, counts in zip(self._balances, self._counts, strict=True):
            balance.part = _Part(counts, share)
        try:
            yield
        finally:
            for balance in self._balances:
                balance.part = None
