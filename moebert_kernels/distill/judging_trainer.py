"""What a trainer computes of a batch: the terms in training, and in an evaluation the loss and the predictions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from moebert_kernels.distill.embedding import EmbeddingObjective
from moebert_kernels.distill.objectives import task_loss
from moebert_kernels.distill.terms import BALANCE, TASK, Terms, has_labels
from moebert_kernels.layers import balance_losses, summed_losses


class JudgingTrainer(Trainer):
    """`Trainer` with a loss of named terms; `MoETrainer` sets its attributes and trains."""

    args: Any  # MoETrainingArguments
    objective: Any  # an Objective, or None
    teacher: Any  # a Teacher, or None
    _losses: Terms
    _causal: bool
    _keys: list[str]  # of a batch that the student's forward takes
    _takes_labels: bool  # the student's forward
    _theirs: Any  # what the teacher gives for the micro-batch, where it was asked before
    _judging_teacher: Any  # which is asked for what is evaluated; a cache may have only the training data
    _predicts = False

    def _judged(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss of a batch that is evaluated: of its labels, or where it has none the objective's."""
        if self._has_labels(inputs):
            with balance_losses():  # which a model adds to its own loss otherwise
                outputs = model(**self._inputs(inputs))
            return task_loss(outputs, dict(inputs), self._preset, self._causal), outputs
        terms, outputs = self._terms(model, inputs, with_task=False)
        return torch.stack([self._losses.weight(name) * term for name, term in sorted(terms.items())]).sum(), outputs

    def _terms(self, model: nn.Module, inputs: Mapping[str, Any], with_task: bool) -> tuple[dict[str, Tensor], Any]:
        """The named, unweighted terms of a batch, each (), and the student's outputs."""
        objective, batch = self.objective, dict(inputs)
        recording = nullcontext() if objective is None else objective.recording()
        states = {} if objective is None else {"output_hidden_states": True}
        with recording, balance_losses() as losses:
            outputs = model(**self._inputs(inputs), **states)
        terms = {}
        if with_task:
            smoothing = self.args.label_smoothing_factor
            terms[TASK] = task_loss(outputs, batch, self._preset, self._causal, smoothing)
        if self._losses.weights[BALANCE] and losses:
            terms[BALANCE] = summed_losses(losses)
        if objective is not None:
            with torch.no_grad():
                teacher = self.teacher if model.training else self._judging_teacher
                theirs = teacher(batch) if self._theirs is None else self._theirs
            terms |= objective(outputs, theirs, batch)
        return terms, outputs

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """As `Trainer.prediction_step`; the objective judges what has no labels, and embeddings are predictions."""
        if self._has_labels(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.objective is None:
            return super().prediction_step(model, self._inputs(inputs), prediction_loss_only, ignore_keys)
        inputs, loss = self._prepare_inputs(inputs), None
        embeds = isinstance(self.objective, EmbeddingObjective)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self._predicts:
                outputs = model(**self._inputs(inputs), **({"output_hidden_states": True} if embeds else {}))
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                loss = loss.detach()
        if prediction_loss_only:
            return loss, None, None
        if embeds:
            return loss, self.objective.embed(outputs, dict(inputs)), None
        ends = (outputs.get("start_logits"), outputs.get("end_logits"))  # which questions have instead
        return loss, outputs.get("logits", ends), None

    def predict(self, *args: Any, **options: Any) -> Any:
        """As `Trainer.predict`: data without labels has no loss, so no teacher is asked."""
        self._predicts = True
        try:
            return super().predict(*args, **options)
        finally:
            self._predicts = False

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        self._losses.judge(self.state.global_step)  # not the metrics of a broken run
        return super().evaluate(*args, **options)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """In the data's order always: predictions belong to its rows."""
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "sequential"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def _has_labels(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a batch has labels for the student; `Trainer` keeps a column `label` for an encoder too."""
        return self._takes_labels and has_labels(inputs)

    @property
    def _preset(self) -> Any:
        return "default" if self.objective is None else self.objective.preset

    def _inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model's forward takes."""
        return {key: inputs[key] for key in self._keys if key in inputs}
