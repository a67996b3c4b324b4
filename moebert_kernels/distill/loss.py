"""The loss of a run: the named terms of a batch, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moebert_kernels.distill.config import Batch, FitConfig
from moebert_kernels.distill.discriminator import TERM as ADVERSARIAL
from moebert_kernels.distill.objectives import Objective, Preset, is_causal, task_loss
from moebert_kernels.distill.teacher import LiveTeacher, Teacher, forward_keys
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.errors import UserError
from moebert_kernels.layers import balance_losses, moe_config, summed_losses
from moebert_kernels.nn import BalanceWindow


class Loss:
    """Terms of a student, its labels and its teacher.

    Args:
        student: on the accelerator's device.
        objective, teacher: as for `fit`; both or neither.

    Attributes:
        teacher: what gives a batch's teacher outputs.
        trained: the student, together with the objective's maps if it has any: they share the student's optimizer, and
            are never saved with it.
        maps, adversary: the objective's.
        weighted: the terms that count, in a fixed order; None until the first batch told.

    Raises:
        UserError: student, teacher and objective do not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective | None,
        teacher: nn.Module | TeacherCache | None,
        config: FitConfig,
        accelerator: Accelerator,
    ):
        self._student, self._objective, self._config = student, objective, config
        self.teacher: Teacher | None = None if objective is None else self._prepared(teacher, accelerator)
        self._preset: Preset = "default" if objective is None else objective.preset
        self.maps = None if objective is None else objective.maps
        self.adversary = None if objective is None else objective.adversary
        self.trained = student if self.maps is None else nn.ModuleDict({"student": student, "maps": self.maps})
        self.causal = is_causal(student)
        # a causal model's loss is not its own (task_loss): with the labels it would compute a second one in vain
        self._forward_keys = [key for key in forward_keys(student) if not (self.causal and key == "labels")]
        moe = moe_config(student.config)
        self._weights = {"balance": 0.0 if moe is None else moe.balance_weight, **config.weights}
        if self._weights["balance"] and not (moe is not None and moe.is_learned):
            raise UserError(
                f"balance: expected the weight 0 for a {type(student).__name__} without gates, whose balance would be a"
                f" loss, got {self._weights['balance']}"
            )
        self._balance = BalanceWindow(student) if self._weights["balance"] else None
        self._device = accelerator.device
        self.weighted: list[str] | None = None

    def _prepared(self, source: Any, accelerator: Accelerator) -> Any:
        """What gives the teacher's outputs, when the objective has accepted it and made what it trains."""
        teacher = source
        if isinstance(source, nn.Module):
            dropout, autocast = self._config.teacher_dropout, accelerator.autocast
            teacher = LiveTeacher(source, accelerator.device, dropout=dropout, autocast=autocast)
        self._objective.check(self._student, teacher.info)
        self._objective.build(self._student, teacher.info, self._config.seed)
        if self._objective.relation_layer is not None:
            teacher.record(self._objective.relation_layer)
        return teacher

    def summary(self) -> str:
        """A line for people: which of the teacher's states the student's follow."""
        config: Any = self._student.config
        return self._objective.summary(config.get_text_config().num_hidden_layers, self.teacher.info.num_layers)

    def parameters_beside(self) -> list[nn.Parameter]:
        """What is trained with the student and no part of it."""
        return [] if self.maps is None else list(self.maps.parameters())

    def count(self, batches: Sequence[Batch], reduce: Callable[[Tensor], Tensor]) -> None:
        """See how the gates share out this process's micro-batches of a step, in a pass without gradients.

        Their balance loss is a product of two means over all tokens of the step. Models without one need no such pass.
        """
        if self._balance is None:
            return
        sequences = sum(len(batch["input_ids"]) for batch in batches)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), self._balance.counting(self._device, sequences, reduce), torch.random.fork_rng(devices):
            for batch in batches if self._balance.needs_pass else ():
                self._student(**self._inputs(batch))  # draws what the pass to come draws, if the teacher draws nothing

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {key: batch[key].to(self._device) for key in self._forward_keys if key in batch}

    def part(self, share: float) -> AbstractContextManager[None]:
        """For the forward and backward of a micro-batch with that weight in its step, which `count` has seen."""
        return self._balance.part(share) if self._balance is not None and 0 < share < 1 else nullcontext()

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The named, unweighted terms of a batch, each (); `model` is the student, as the accelerator wraps it."""
        recording = nullcontext() if self._objective is None else self._objective.recording()
        with recording, balance_losses() as losses:  # which `outputs.loss` is without
            outputs = model(**self._inputs(batch), output_hidden_states=self._objective is not None)
        terms = {}
        if self._weights.get("task", 1.0):
            terms["task"] = task_loss(outputs, batch, self._preset, self.causal, self._config.label_smoothing)
        if self._weights["balance"]:
            terms["balance"] = summed_losses(losses)
        if self._objective is not None:
            terms |= self._objective(outputs, self.teacher(batch), batch)
        if self.weighted is None:
            self.weighted = self._names_that_count(terms)
        return terms

    def total(self, terms: Mapping[str, Tensor], share: float) -> Tensor:
        """Their weighted sum (), when so much of the run is done."""
        return torch.stack([self._weight(name, share) * terms[name] for name in self.weighted]).sum()

    def _weight(self, name: str, share: float) -> float:
        factor = self.adversary.factor(share) if name == ADVERSARIAL else 1.0
        return factor * self._weights.get(name, 1.0)

    def _names_that_count(self, terms: Mapping[str, Tensor]) -> list[str]:
        """The names of the terms with a weight, sorted, so that sums round alike in every process.

        Raises:
            UserError: a weight for a term that does not exist, no term with a weight, or a term without a gradient.
        """
        unknown = sorted(set(self._config.weights) - {*terms, "task", "balance"})
        if unknown:
            raise UserError(f"weights: expected names among {', '.join(sorted(terms))}, got {unknown[0]!r}")
        weighted = [name for name in sorted(terms) if self._weights.get(name, 1.0)]
        if not weighted:
            raise UserError("weights: expected a loss term with a weight above 0, got none")
        for name in weighted:
            if not terms[name].requires_grad:
                raise UserError(f"{name}: expected a loss that depends on what is trained, got a constant")
        return weighted
