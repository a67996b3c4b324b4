"""Distillation of models that predict tokens: causal language models, and text to text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.convert.sample_loss import IGNORED, is_causal, next_token_labels
from moebert_kernels.data.split import Batch
from moebert_kernels.distill.objectives import BY_SEQUENCE, Objective, check_sizes, label_weights
from moebert_kernels.distill.teacher import TeacherInfo
from moebert_kernels.errors import UserError
from moebert_kernels.graphs import is_capturing


class TokenObjective(Objective):
    """The symmetric KL divergence of student and teacher at each labelled token ("prediction").

    A mean over all labels for causal models, else over each sequence's labels, then over the sequences, as `task_loss`.

    Args:
        causal: labels are of the position itself (False), or of the one after it (True), as transformers has them.
    """

    terms = ("prediction",)

    def __init__(self, causal: bool):
        self.causal = causal

    def identity(self) -> dict[str, object]:
        return {"causal": self.causal}

    def check(self, student: nn.Module, teacher: TeacherInfo) -> None:
        if (name := type(student).__name__).endswith(BY_SEQUENCE):
            raise UserError(f"objective: expected a model that predicts something of each token, got a {name}")
        check_sizes(student.config, teacher, "vocab_size")
        if teacher.stored_as is not None:
            raise UserError("teacher: expected a model, got cached outputs, which hold no predictions by token")
        if is_causal(student) != self.causal:
            raise UserError(f"causal: expected {is_causal(student)} for a {type(student).__name__}, got {self.causal}")

    def __call__(self, student_outputs: Any, teacher_outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The term {"prediction": ()} of a batch with `labels` (B, T), from `logits` (B, T, V) of both."""
        labels = next_token_labels(batch["labels"]) if self.causal else batch["labels"]
        # a CUDA graph has no shapes that values decide; elsewhere logits of few labels take little memory
        at = slice(None) if is_capturing() else labels != IGNORED
        log_p, log_q = (
            outputs.logits[at].to(torch.promote_types(outputs.logits.dtype, torch.float32)).log_softmax(-1)
            for outputs in (student_outputs, teacher_outputs)
        )
        divergence = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
        return {"prediction": (divergence * label_weights(labels, self.causal)[at]).sum()}
