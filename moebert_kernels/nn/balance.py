"""The balance loss of learned routers: over one batch, or over all micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def balance_loss(probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """E * sum_e(mean probability of e * fraction routed to e): 1 if balanced, E if all go to one (Switch, 2101.03961).

    Args:
        probabilities: (..., E) float.
        expert_ids: (...), values in [0, E).
        counted: (...) bool, True for what enters the means. None: all.

    Returns:
        A scalar, dtype of `probabilities`; 0 if nothing is counted. Differentiable in `probabilities`.
    """
    summed, tokens = _sums(probabilities, expert_ids, counted)
    number = tokens.sum().clamp(min=1)
    return probabilities.shape[-1] * (summed / number * (tokens / number)).sum()


def sequence_balance_loss(probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over the sequences of their own balance losses, as GShard has it; shapes (B, T, E), (B, T), (B, T)."""
    if len(expert_ids) == 0:
        return probabilities.sum()
    if counted is None:
        return torch.vmap(balance_loss)(probabilities, expert_ids).mean()
    return torch.vmap(balance_loss)(probabilities, expert_ids, counted).mean()


def _sums(probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of every expert its probabilities' sum, and how many were routed to it; (E,) in the dtype of `probabilities`."""
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
        self.window: BalanceWindow | None = None

    def forward(self, probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None = None) -> Tensor:
        """The loss of a batch, (); within a `BalanceWindow` its part of the window's. Arguments as `balance_loss`."""
        if self.window is not None:
            return self.window.loss(self, probabilities, expert_ids, counted)
        return (sequence_balance_loss if self.per_sequence else balance_loss)(probabilities, expert_ids, counted)


class BalanceWindow:
    """The balance losses of all routers of a model over micro-batches that run one after another.

    The loss is a product of two means over tokens, hence no mean of the micro-batches' own losses. But what it needs of
    the other micro-batches has no gradient: how many tokens each expert got. So the routers count in a first pass, and
    in the second each micro-batch has a loss of its own again:

        window = BalanceWindow(model)
        with torch.no_grad(), window.counting(device, sequences):  # of all batches together
            for batch in batches if window.needs_pass else []:
                model(**batch)
        for batch, share in zip(batches, shares):  # of the step's loss
            with window.part(share):
                (share * model(**batch).loss).backward()

    Attributes:
        needs_pass: whether a loss is over tokens. One that is a mean over sequences is told their number.
    """

    def __init__(self, model: nn.Module) -> None:
        self._balances = [module for module in model.modules() if isinstance(module, Balance)]
        self.needs_pass = not all(balance.per_sequence for balance in self._balances)
        self._seen: dict[Balance, Tensor] = {}
        self._share: float | None = None  # None: counting

    @contextmanager
    def counting(
        self, device: torch.device, sequences: int, reduce: Callable[[Tensor], Tensor] = lambda counts: counts
    ) -> Iterator[None]:
        """Forget what was counted and count anew; `reduce` adds up what several processes have counted."""
        sizes, self._share = [balance.num_counts for balance in self._balances], None
        self._seen = dict(zip(self._balances, torch.zeros(sum(sizes), device=device).split(sizes), strict=True))
        for balance in self._balances:
            if balance.per_sequence:
                self._seen[balance] += sequences
        with self._installed():
            yield
        counts = reduce(torch.cat(list(self._seen.values())))
        self._seen = dict(zip(self._balances, counts.split(sizes), strict=True))

    @contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Losses such that their sum over the micro-batches, times `share` each, is the window's."""
        self._share = share
        with self._installed():
            yield

    @contextmanager
    def _installed(self) -> Iterator[None]:
        for balance in self._balances:
            balance.window = self
        try:
            yield
        finally:
            for balance in self._balances:
                balance.window = None

    def loss(self, balance: Balance, probabilities: Tensor, expert_ids: Tensor, counted: Tensor | None) -> Tensor:
        """What `Balance` gives here."""
        if balance.per_sequence:
            summed = sequence_balance_loss(probabilities, expert_ids, counted) * len(expert_ids)
            return summed if self._share is None else summed / (self._seen[balance][0] * self._share)
        summed, tokens = _sums(probabilities, expert_ids, counted)
        if self._share is None:
            self._seen[balance] += tokens.detach()
            return summed.sum()
        counts = self._seen[balance]
        number = counts.sum().clamp(min=1)
        return probabilities.shape[-1] * (summed / (number * self._share) * (counts / number)).sum()
