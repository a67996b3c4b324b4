"""Predictions of a model on a tokenised split, and what they are worth."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from moebert_kernels.data.metrics import answers_from_spans, compute_metrics
from moebert_kernels.data.tasks import Task
from moebert_kernels.distill.config import Metrics
from moebert_kernels.distill.features import Features, ordered_batches
from moebert_kernels.distill.teacher import LABEL_KEYS, forward_keys

if TYPE_CHECKING:
    from datasets import Dataset


class Evaluator:
    """Judges models on one split; calling it with a model gives the task's metrics. `fingerprint` names the split.

    Args:
        task: what the predictions are.
        data: the split, with the columns that `load_task` gives.
        features: the split as `tokenize` gives it.
        batch_size: sequences at once.
        pad_to: pad to this length, for a model that routes padding as published. None: to the longest of a batch.
        progress: show a bar.
    """

    def __init__(
        self,
        task: Task,
        data: Dataset,
        features: Features,
        batch_size: int = 64,
        pad_to: int | None = None,
        progress: bool = False,
    ):
        self.task, self.features, self.batch_size, self.pad_to = task, features, batch_size, pad_to
        self.progress = progress
        contexts: list[str] = []
        if task.kind == "qa":
            contexts = self.contexts = list(data["context"])
            self.references: list[Any] = [answers["text"] for answers in data["answers"]]
        else:
            self.references = list(data["label"])
        facts = (task.kind, task.metrics, features.fingerprint, pad_to, self.references, contexts)
        self.fingerprint = sha256(repr(facts).encode()).hexdigest()[:32]

    def __call__(self, model: nn.Module) -> Metrics:
        return compute_metrics(self.task, self.predict(model), self.references)

    @torch.no_grad()
    def predict(self, model: nn.Module) -> list[Any]:
        """A class number, a score or an answer for each row of the split; the model's mode is left as it was."""
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        keys = [key for key in forward_keys(model) if key not in LABEL_KEYS]
        outputs: list[Any] = [None] * len(self.features)
        for indices in tqdm(
            ordered_batches(self.features, self.batch_size), desc="evaluating", disable=not self.progress, leave=False
        ):
            batch = self.features.collate(indices, self.pad_to)
            output = model(**{key: batch[key].to(device) for key in keys if key in batch})
            if self.task.kind == "qa":
                starts, ends = output.start_logits.float().cpu().numpy(), output.end_logits.float().cpu().numpy()
                for row, index in enumerate(indices):
                    length = len(self.features.input_ids[index])
                    outputs[index] = (starts[row, :length], ends[row, :length])
            else:
                logits = output.logits.float().cpu().numpy()
                for row, index in enumerate(indices):
                    outputs[index] = logits[row]
        model.train(training)
        return self._decode(outputs)

    def _decode(self, outputs: list[Any]) -> list[Any]:
        if self.task.kind == "qa":
            starts, ends = ([pair[i] for pair in outputs] for i in (0, 1))
            may_have_no_answer = self.task.name != "squad"
            windows = self.features.windows or []
            return answers_from_spans(windows, starts, ends, self.contexts, may_have_no_answer=may_have_no_answer)
        logits = np.stack(outputs)
        if self.task.kind == "regression":
            return [float(value) for value in logits[:, 0]]
        return [int(value) for value in logits.argmax(-1)]
