"""The named terms of a loss: what they weigh, their sum, and what the log says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.distill.progress import TermMeter
from moebert_kernels.distill.teacher import LABEL_KEYS
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig

TASK, BALANCE = "task", "balance"


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
