"""The named terms of a loss: what they weigh, their sum, and what the log says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebert_kernels.convert.sample_loss import LABEL_KEYS
from moebert_kernels.distill.settings import nearest
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig

if TYPE_CHECKING:
    from moebert_kernels.distill.objectives import Objective

TASK, BALANCE = "task", "balance"
GRACE_STEPS = 20  # a student that starts as its teacher's copy may have a zero term at first, but not for long


def has_labels(batch: Mapping[str, Any]) -> bool:
    return any(key in batch for key in LABEL_KEYS)


class Terms:
    """Weighs, adds up and watches the terms of one run.

    Args:
        given: weights by name. A term that is not named has weight 1, "balance" that of the experts.
        experts: of the model; None of a dense one.
        objective: with one "task", unless it is named, is a term where the data has labels alone.
        reduce: sums over the processes.

    Raises:
        UserError: a weight for the balance of a model without gates, or for a term that the objective does not have; no
            term with a weight.
    """

    def __init__(
        self,
        given: Mapping[str, float],
        experts: MoEConfig | None,
        objective: Objective | None,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        learned = experts is not None and experts.is_learned
        self._given, self._has_teacher, self._reduce = dict(given), objective is not None, reduce
        self.weights = {BALANCE: experts.balance_weight if learned else 0.0, **given}
        if self.weights[BALANCE] and not learned:
            raise UserError(
                "balance: expected the weight 0 for a model without gates, whose balance would be a loss, got"
                f" {self.weights[BALANCE]}"
            )
        of_objective = () if objective is None else objective.terms
        if of_objective is not None:  # else the first batch tells
            self._check_names({*of_objective, TASK, *[BALANCE] * learned})
        self._counted: list[str] | None = None  # the terms that have a weight; the first batch tells
        # since the last report, on the device: one sum per name, then the weight
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._finite: Tensor | None = None  # per name, in the first batch in which one was not
        self._contributed: set[str] = set()

    def has_task(self, batch: Mapping[str, Any]) -> bool:
        """Whether the labels are a term."""
        if TASK in self._given or not self._has_teacher:
            return bool(self.weights.get(TASK, 1.0))
        return has_labels(batch)

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
        counted = self._check_names(terms)
        for name in counted:
            if not terms[name].requires_grad:
                raise UserError(f"{name}: expected a loss that depends on what is trained, got a constant")
        return counted

    def _check_names(self, terms: Iterable[str]) -> list[str]:
        """Those of the terms that have a weight."""
        known = sorted(terms)
        unknown = sorted(set(self._given) - {*known, TASK, BALANCE})
        if unknown:
            near = nearest(unknown[0], known)
            raise UserError(f"loss_weights: expected names among {', '.join(known)}, got {unknown[0]!r}{near}")
        counted = [name for name in known if self.weight(name)]
        if not counted:
            raise UserError("loss_weights: expected a loss term with a weight above 0, got none")
        return counted

    def add(self, names: list[str], values: Tensor, count: int) -> None:
        """Note the terms' values (n,) float32 of a batch of `count` sequences or labels, over which they are means."""
        finite = values.isfinite()
        if self._sums is not None and self._finite is not None:
            finite = torch.where(self._finite.all(), finite, self._finite)
        self._finite = finite
        values = torch.cat([values * count, values.new_full((1,), float(count))])
        if self._sums is None:
            self._names, self._sums = names, values
        else:
            self._sums += values

    def judge(self, step: int, last: bool = False) -> dict[str, float]:
        """Means of the terms, unweighted, since the last report; the only place that waits for the device.

        Args:
            last: of the run; a term that has contributed nothing in all of it is an error then.

        Raises:
            UserError: one of them is not finite, or one that has a weight was zero for GRACE_STEPS steps or until the
                `last` one.
        """
        if self._counted is None:
            return {}
        means: dict[str, float] = {}
        if self._sums is not None:
            *sums, count = self._reduce(self._sums.clone()).tolist()
            means = {name: total / count for name, total in zip(self._names, sums, strict=True)}
            broken = [name for name, mean in means.items() if not math.isfinite(mean)]
            if broken:  # one that breaks breaks the others in the next step
                first = self._reduce((~self._finite).float()).tolist() if self._finite is not None else []
                name = next((name for name, count in zip(self._names, first, strict=False) if count), min(broken))
                raise UserError(f"{name}: expected a finite loss, got {means[name]} at or shortly before step {step}")
            self._contributed |= {name for name, mean in means.items() if mean != 0.0}
        silent = sorted(set(self._counted) - self._contributed)
        if silent and (last or (means and step >= GRACE_STEPS)):
            raise UserError(f"{silent[0]}: expected a loss that contributes, got exactly 0 in all of {step} steps")
        return means

    def reset(self) -> None:
        """Start the next report's means."""
        self._sums = None

    def state(self) -> dict[str, Any]:
        """What was noted, JSON-able, exact."""
        sums = None if self._sums is None else self._reduce(self._sums.clone()).tolist()
        return {"names": self._names, "sums": sums, "contributed": sorted(self._contributed)}

    def load_state(self, state: Mapping[str, Any], device: torch.device, rank: int) -> None:
        self._names, self._contributed = list(state["names"]), set(state["contributed"])
        self._sums = self._finite = None
        if state["sums"] is not None:  # the sum over all processes goes on in the first
            self._sums = torch.tensor(state["sums"], dtype=torch.float32, device=device) * (rank == 0)
