"""Metrics of a task, as `Trainer` asks for them: `compute_metrics`, and what of the logits it needs to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction

from moebert_kernels.convert.sample_loss import IGNORED, next_token_labels
from moebert_kernels.data.metrics import Metrics, Window, answers_from_spans, compute_metrics
from moebert_kernels.data.tasks import Task
from moebert_kernels.errors import UserError


def judge(task: Task, rows: Any = None, columns: Any = None) -> dict[str, Any]:
    """Arguments of a `Trainer` for one split, `Trainer(..., **judge(task))`, which give the task's metrics by name.

    Args:
        task: any but those that are answered by generating text.
        rows, columns: of questions, the split and what `tokenized` made of it, in whose order they are judged.

    Raises:
        UserError: questions without their split.
    """
    if task.kind == "lm":
        return {"compute_metrics": _perplexity, "preprocess_logits_for_metrics": label_losses}
    if task.kind == "qa" and (rows is None or columns is None):
        raise UserError("judge: expected the split and its columns for questions, got none")

    def metrics(given: EvalPrediction) -> Metrics:
        if task.kind == "qa":
            texts = question_answers(task, rows, columns, *given.predictions[:2])
            return compute_metrics(task, texts, [held["text"] for held in rows["answers"]])
        # an encoder-decoder's first output of several
        logits = np.asarray(given.predictions[0] if isinstance(given.predictions, tuple) else given.predictions)
        answers = logits.reshape(-1) if task.kind == "regression" else logits.argmax(-1)
        return compute_metrics(task, answers.tolist(), list(given.label_ids))

    return {"compute_metrics": metrics}


def label_losses(logits: Any, labels: Tensor) -> Tensor:
    """(B, T) the loss at each position, -1 where no label follows: what a perplexity needs of logits (B, T, V)."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    shifted = next_token_labels(labels)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten(), reduction="none", ignore_index=IGNORED)
    return torch.where(shifted == IGNORED, -1.0, losses.view_as(shifted))


def _perplexity(given: EvalPrediction) -> Metrics:
    losses = np.asarray(given.predictions, dtype=np.float64)
    found = perplexity([losses[losses >= 0]])  # padding between batches is -100
    return {"perplexity": found["perplexity"], "loss_by_label": found["loss"]}


def perplexity(losses: Sequence[np.ndarray]) -> Metrics:
    """The mean of all these losses by label, in nats, and its exponential; summed in float64."""
    loss = float(np.concatenate(losses).astype(np.float64).mean())
    return {"perplexity": math.exp(loss) if loss < 700.0 else math.inf, "loss": loss}


def question_answers(task: Task, rows: Any, columns: Any, starts: Sequence[Any], ends: Sequence[Any]) -> list[str]:
    """The answer to each question, "" for none, from the logits (T,) of each window, padded or not."""
    windows = [
        Window(row, np.array(offsets, dtype=np.int32))
        for row, offsets in zip(columns["row"], columns["offset_mapping"], strict=True)
    ]
    starts, ends = (
        [logits[: len(window.offsets)] for logits, window in zip(part, windows, strict=True)] for part in (starts, ends)
    )
    no_answers = task.name != "squad"
    return answers_from_spans(windows, starts, ends, rows["context"], may_have_no_answer=no_answers)
