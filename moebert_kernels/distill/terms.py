"""The named terms of a loss: what they weigh, their sum, and what the log says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.distill.teacher import LABEL_KEYS
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig

TASK, BALANCE = "task", "balance"
GRACE_STEPS = 20  # a student that starts as its teacher's copy may have a zero term at first, but not for long


class TermMeter:
    """Means of named terms over the sequences (or labels) seen since the last report; on the device until then.

    Args:
        reduce: sums a tensor over the processes of a distributed run.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] = lambda x: x):
        self._reduce = reduce
        self._names: list[str] = []
        self._sums: Tensor | None = None  # one sum per name, then the weight
        self._finite: Tensor | None = None  # per name, in the first batch in which one was not
        self._contributed: set[str] = set()

    def add(self, terms: Mapping[str, Tensor], weight: int) -> None:
        """Count a batch of `weight` sequences or labels; each term is its mean over them."""
        values = torch.stack([term.detach().float() for term in terms.values()])
        finite = values.isfinite()
        if self._sums is not None and self._finite is not None:
            finite = torch.where(self._finite.all(), finite, self._finite)
        self._finite = finite
        values = torch.cat([values * weight, values.new_full((1,), float(weight))])
        if self._sums is None:
            self._names, self._sums = list(terms), values
        else:
            self._sums += values

    def means(self, step: int, weighted: Iterable[str], last: bool = False) -> dict[str, float]:
        """The means so far, judged; the only place that waits for the device.

        `weighted` names the terms that must contribute; the others are reported only.

        Raises:
            UserError: a term is not finite, or one in `weighted` has been zero for GRACE_STEPS steps or until the
                `last` one.
        """
        if self._sums is None:
            return {}
        *sums, weight = self._reduce(self._sums.clone()).tolist()
        means = {name: total / weight for name, total in zip(self._names, sums, strict=True)}
        broken = {name: mean for name, mean in means.items() if not math.isfinite(mean)}
        if broken:  # one that breaks breaks the others in the next step
            first = self._reduce((~self._finite).float()).tolist() if self._finite is not None else []
            name = next((name for name, count in zip(self._names, first, strict=False) if count), min(broken))
            raise UserError(f"{name}: expected a finite loss, got {means[name]} at or shortly before step {step}")
        self._contributed |= {name for name, mean in means.items() if mean != 0.0}
        if last or step >= GRACE_STEPS:
            self.check_contributions(step, weighted)
        return means

    def check_contributions(self, step: int, weighted: Iterable[str]) -> None:
        """Raise UserError if a term in `weighted` has been exactly zero in everything that was judged."""
        silent = sorted(set(weighted) - self._contributed)
        if silent:
            raise UserError(f"{silent[0]}: expected a loss that contributes, got exactly 0 in all of {step} steps")

    def reset(self) -> None:
        """Start the next report's means."""
        self._sums = None

    def state(self) -> dict[str, Any]:
        """JSON-able, exact."""
        sums = None if self._sums is None else self._reduce(self._sums.clone()).tolist()
        return {"names": self._names, "sums": sums, "contributed": sorted(self._contributed)}

    def load_state(self, state: Mapping[str, Any], device: torch.device, rank: int) -> None:
        self._names, self._contributed = list(state["names"]), set(state["contributed"])
        self._sums = self._finite = None
        if state["sums"] is not None:  # the sum over all processes goes on in the first
            self._sums = torch.tensor(state["sums"], dtype=torch.float32, device=device) * (rank == 0)


class Terms:
    """Weighs, adds up and watches the terms of one run.

    Args:
        given: weights by name. A term that is not named has weight 1, "balance" that of the experts.
        experts: of the model; None of a dense one.
        has_teacher: then "task", unless it is named, is a term where the data has labels alone.
        reduce: sums over the processes.

    Raises:
        UserError: a weight for the balance of a model without gates.
    """

    def __init__(
        self,
        given: Mapping[str, float],
        experts: MoEConfig | None,
        has_teacher: bool,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        learned = experts is not None and experts.is_learned
        self._given, self._has_teacher = dict(given), has_teacher
        self.weights = {BALANCE: experts.balance_weight if learned else 0.0, **given}
        if self.weights[BALANCE] and not learned:
            raise UserError(
                "balance: expected the weight 0 for a model without gates, whose balance would be a loss, got"
                f" {self.weights[BALANCE]}"
            )
        self.meter = TermMeter(reduce)
        self._counted: list[str] | None = None  # the terms that have a weight; the first batch tells

    def has_task(self, batch: Mapping[str, Any]) -> bool:
        """Whether the labels are a term."""
        if TASK in self._given or not self._has_teacher:
            return bool(self.weights.get(TASK, 1.0))
        return any(key in batch for key in LABEL_KEYS)

    def weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)

    def total(self, terms: Mapping[str, Tensor], factors: Mapping[str, float] | None = None) -> Tensor:
        """The weighted sum (); `factors` multiply weights, by the name of the term.

        Terms are added in the order of their names, so that sums round alike in every process.

        Raises:
            UserError: a weight for a term that does not exist, no term with a weight, or a term without a gradient.
        """
        if self._counted is None:
            self._counted = self._terms_that_count(terms)
        factors = factors or {}
        return torch.stack([factors.get(name, 1.0) * self.weight(name) * terms[name] for name in self._counted]).sum()

    def _terms_that_count(self, terms: Mapping[str, Tensor]) -> list[str]:
        unknown = sorted(set(self._given) - {*terms, TASK, BALANCE})
        if unknown:
            raise UserError(f"loss_weights: expected names among {', '.join(sorted(terms))}, got {unknown[0]!r}")
        counted = [name for name in sorted(terms) if self.weight(name)]
        if not counted:
            raise UserError("loss_weights: expected a loss term with a weight above 0, got none")
        for name in counted:
            if not terms[name].requires_grad:
                raise UserError(f"{name}: expected a loss that depends on what is trained, got a constant")
        return counted

    def judge(self, step: int, last: bool = False) -> dict[str, float]:
        """Means of the terms, unweighted, since the last report.

        Args:
            last: of the run; a term that has contributed nothing in all of it is an error then.

        Raises:
            UserError: one of them is not finite, or contributes nothing.
        """
        if self._counted is None:
            return {}
        means = self.meter.means(step, self._counted, last=last)
        if last:
            self.meter.check_contributions(step, self._counted)
        return means
