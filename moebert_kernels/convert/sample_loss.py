"""The loss of every sample of a batch, as importance scores need it: one number per sample, nothing shared."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebert_kernels.errors import UserError

LABEL_KEYS = ("labels", "start_positions", "end_positions")
IGNORED = -100  # the label of a token without one, as transformers marks it


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unread_labels(model: nn.Module) -> tuple[str, ...]:
    """The labels that a forward without a loss does not need; a decoder reads their tokens."""
    config: Any = getattr(model, "config", None)
    return () if getattr(config, "is_encoder_decoder", False) else LABEL_KEYS


def is_causal(model: nn.Module) -> bool:
    """Whether the model's logits at a position predict the token after it, while labels are not shifted."""
    generates: Any = getattr(model, "can_generate", None)
    return generates is not None and bool(generates()) and unread_labels(model) == LABEL_KEYS


def next_token_labels(labels: Tensor) -> Tensor:
    """(B, T) labels where a causal model's logits predict them: one position to the left, none at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def sample_loss(outputs: Any, batch: Mapping[str, Tensor], config: Any = None, causal: bool = False) -> Tensor:
    """Return (B,) float32: the task loss of each sample.

    Question answering: (CE of the start + CE of the end) / 2 over the tokens that are no padding, a position outside of
    them being ignored. Logits (B, C): cross-entropy, the squared error if there is one label or `config.problem_type`
    is "regression", binary cross-entropy for several labels each. Logits (B, T, C) (masked words, token labels): the
    mean cross-entropy over the sample's labelled tokens, so that a sample's loss does not depend on its neighbours in
    the batch. With `causal` logits predict the token after theirs (`is_causal`).

    Raises:
        UserError: labels are missing, of a shape that does not fit, or outside the classes.
    """
    if getattr(outputs, "start_logits", None) is not None:
        ends = ((outputs.start_logits, "start_positions"), (outputs.end_logits, "end_positions"))
        mask = batch.get("attention_mask")
        start, end = (position_loss(logits, _labels(batch, name), mask) for logits, name in ends)
        return (start + end) / 2
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise UserError("model: expected a task head with logits, got a bare encoder")
    labels = _labels(batch, "labels")
    if logits.ndim == 3:
        return _token_loss(logits.float(), labels, causal)
    return _sequence_loss(logits.float(), labels, getattr(config, "problem_type", None))


def _labels(batch: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in batch:
        raise UserError(f"batches: expected {name!r} in every batch, got {', '.join(sorted(batch)) or 'nothing'}")
    return batch[name]


def position_loss(logits: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) cross-entropy over the valid tokens of logits (B, T); 0 where the position is not one of them.

    A negative position is that of the first token, as transformers' own loss counts it.
    """
    mask = torch.ones_like(logits) if mask is None else mask
    positions = positions.reshape(len(logits)).clamp(0, mask.shape[1])
    inside = F.pad(mask != 0, (0, 1)).gather(1, positions[:, None]).squeeze(1)
    wide = at_least_float32(logits).masked_fill(mask == 0, torch.finfo(torch.float32).min)
    return F.cross_entropy(wide, positions.where(inside, IGNORED), ignore_index=IGNORED, reduction="none")


def _sequence_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    B, C = logits.shape
    if problem_type is None:
        several = labels.is_floating_point() and labels.shape == logits.shape
        problem_type = "regression" if C == 1 else "multi_label_classification" if several else ""
    if problem_type in ("regression", "multi_label_classification"):
        if labels.numel() != logits.numel():
            raise UserError(f"labels: expected shape (B={B}, {C}), got {tuple(labels.shape)}")
        labels = labels.reshape(B, C).to(logits.dtype)
        if problem_type == "regression":
            return F.mse_loss(logits, labels, reduction="none").mean(1)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    if labels.numel() != B:
        raise UserError(f"labels: expected shape (B={B},), got {tuple(labels.shape)}")
    labels = labels.reshape(B)
    _check_classes(labels, C)
    return F.cross_entropy(logits, labels.long(), reduction="none")


def _token_loss(logits: Tensor, labels: Tensor, causal: bool) -> Tensor:
    B, T, C = logits.shape
    if labels.shape != (B, T):
        raise UserError(f"labels: expected shape (B={B}, T={T}), got {tuple(labels.shape)}")
    labels = next_token_labels(labels) if causal else labels
    labelled = labels != IGNORED
    _check_classes(labels[labelled], C)
    loss = F.cross_entropy(logits.reshape(B * T, C), labels.reshape(B * T), ignore_index=IGNORED, reduction="none")
    return loss.view(B, T).sum(1) / labelled.sum(1).clamp(min=1)


def _check_classes(labels: Tensor, C: int) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(f"labels: expected integers from 0 to {C - 1}, got {labels.dtype}")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < C):
        raise UserError(f"labels: expected integers from 0 to {C - 1}, got {int(labels.min())} to {int(labels.max())}")
