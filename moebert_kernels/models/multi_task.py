"""One task-routed encoder with a head for each task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebert_kernels.errors import UserError
from moebert_kernels.models.configuration import MoEBertConfig
from moebert_kernels.models.heads import MoEBertForSequenceClassification
from moebert_kernels.models.outputs import MoEBertSequenceClassifierOutput


class MoEBertForMultiTaskClassification(MoEBertForSequenceClassification):
    """Classification, and regression for tasks without classes, of several tasks: `config.task_labels` says which.

    The heads are rows of one `classifier`, in the order of `config.tasks`; pooler (RoBERTa's: the head's first layer)
    and encoder are common to all.
    """

    def __init__(self, config: MoEBertConfig) -> None:
        if not config.is_task_routed or config.task_labels is None:
            raise UserError("task_labels: expected the labels of each task, with router='task', got none")
        super().__init__(config)

    def rows_of(self, task_id: int) -> slice:
        """Which rows of the classifier are a task's head."""
        counts = self.config.outputs_per_task
        start = sum(counts[:task_id])
        return slice(start, start + counts[task_id])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | int | None = None,
    ) -> MoEBertSequenceClassifierOutput | tuple[Any, ...]:
        """As MoEBertForSequenceClassification, for the tasks that `task_ids` name; see MoEBertModel.

        Args:
            labels: (B,) class numbers, or scores where the task has no classes; in a batch of several tasks any dtype.

        Returns:
            Logits (B, C) with C the classes of the batch's task. In a batch of several tasks C is that of the task with
            most classes, and what a sequence's task lacks is the dtype's lowest number. The loss is a mean over B.
        """
        like = input_ids if input_ids is not None else inputs_embeds
        if like is None:
            raise UserError("input_ids: expected token ids or inputs_embeds, got neither")
        task_ids = self._one_if_all_are(self.moebert.task_id if task_ids is None else task_ids)
        checked = self.moebert.checked_task_ids(task_ids, like)
        encoded = self.moebert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, True, task_ids if isinstance(task_ids, int) else checked,
        )  # fmt: skip
        logits = self._logits(encoded)
        if isinstance(task_ids, int):
            logits = logits[:, self.rows_of(task_ids)].contiguous()
        else:
            logits = self._of_tasks(logits, checked)
        loss = None
        if labels is not None:
            is_score = torch.tensor([not self.config.task_labels[name] for name in self.config.tasks])
            task_loss = _losses(logits, labels, is_score.to(checked.device)[checked]).mean()
            loss = self._total(task_loss, encoded)
        return self._output(loss, logits, encoded, return_dict)

    def _one_if_all_are(self, task_ids: Tensor | int | None) -> Tensor | int | None:
        """The only task of a batch as an int. While torch compiles, a tensor is taken for several."""
        if task_ids is None or isinstance(task_ids, int) or torch.compiler.is_compiling():
            return task_ids
        found = set(task_ids.flatten().tolist()) if not task_ids.is_floating_point() else set()
        return found.pop() if len(found) == 1 else task_ids

    def _of_tasks(self, logits: Tensor, task_ids: Tensor) -> Tensor:
        """From all tasks' logits (B, sum of C) those of each sequence's own task, (B, largest C)."""
        per_task = self.config.outputs_per_task
        counts = torch.tensor(per_task, device=logits.device)
        starts = counts.cumsum(0) - counts
        column = torch.arange(max(per_task), device=logits.device)
        exists = column < counts[task_ids, None]
        columns = (starts[task_ids, None] + column).where(exists, 0)
        return logits.gather(1, columns).masked_fill(~exists, torch.finfo(logits.dtype).min)


def _losses(logits: Tensor, labels: Tensor, is_score: Tensor) -> Tensor:
    """Of each sequence the squared error of its first logit, or the cross-entropy; (B,), in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    squared = (logits[:, 0] - labels).square()
    classes = labels.to(torch.int64).masked_fill(is_score, 0)
    return squared.where(is_score, F.cross_entropy(logits, classes, reduction="none"))
