"""Losses as named, unweighted terms. The loop weighs, adds, logs and watches them.

The layer-wise objective of MoEBERT (2204.07675), eq. 5-7: the student's hidden states follow the teacher's, and its
predictions the teacher's. Every term is a mean over sequences of a value per sequence, or for causal language models a
mean over labels, so that gradient accumulation weighted by sequences (`batch_weight`) equals the large batch.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_kernels.convert import describe_layer_map
from moebert_kernels.convert import layer_map as even_layer_map
from moebert_kernels.convert.sample_loss import IGNORED, at_least_float32, next_token_labels, position_loss
from moebert_kernels.data.split import Batch
from moebert_kernels.distill.loading import named_labels
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config

if TYPE_CHECKING:
    from moebert_kernels.distill.discriminator import Adversary
    from moebert_kernels.distill.teacher import TeacherInfo

Kind = Literal["classification", "regression", "qa"]
Preset = Literal["default", "paper"]
# how classes of transformers end whose models predict something of a sequence, and not of each token
BY_SEQUENCE = ("ForSequenceClassification", "ForQuestionAnswering", "ForImageClassification", "ForMultipleChoice")


def symmetric_kl(logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """1/2 (KL(p||q) + KL(q||p)) of the softmaxes over the last dimension, summed and divided by the batch.

    Args:
        logits, teacher_logits: (B, C), any floating dtype; computed in at least float32, from log_softmax: finite for
            every finite gap, where the original's log(softmax) was not beyond a gap of about 104.
        mask: (B, C), nonzero where an entry takes part; None: everywhere.

    Returns:
        () the mean over B. MoEBERT (2204.07675), eq. 6.
    """
    logits, teacher_logits = at_least_float32(logits), at_least_float32(teacher_logits)
    if mask is not None:
        masked = mask == 0
        lowest = torch.finfo(logits.dtype).min
        logits, teacher_logits = logits.masked_fill(masked, lowest), teacher_logits.masked_fill(masked, lowest)
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    log_ratio = log_p - log_q
    if mask is not None:
        log_ratio = log_ratio.masked_fill(masked, 0.0)  # the two logarithms may be -inf there, their difference nan
    return 0.5 * ((log_p.exp() - log_q.exp()) * log_ratio).sum() / logits.shape[0]


def soft_targets(logits: Tensor, teacher_logits: Tensor, temperature: float, kind: str = "classification") -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of (B, C) logits, or for "regression" their MSE.

    () mean over B, in at least float32. Hinton et al. (1503.02531).
    """
    logits, teacher_logits = at_least_float32(logits), at_least_float32(teacher_logits)
    if kind == "regression":
        return F.mse_loss(logits, teacher_logits)
    log_q, log_p = (values.div(temperature).log_softmax(-1) for values in (logits, teacher_logits))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def hidden_mse(hidden: Tensor, teacher_hidden: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """Mean squared difference of two (B, T, H) hidden states; computed in at least float32.

    `token_weights` (B, T) sums to 1 and says how much each position counts; None: all B * T positions equally.
    """
    difference = at_least_float32(hidden) - at_least_float32(teacher_hidden)
    if token_weights is None:
        return difference.square().mean()
    return (difference.square().mean(-1) * token_weights).sum()


def sequence_weights(attention_mask: Tensor) -> Tensor:
    """(B, T) float32 weights for a mean over each sequence's valid tokens, then over the sequences; 0 at padding."""
    mask = (attention_mask != 0).float()
    return mask / (mask.sum(1, keepdim=True).clamp(min=1.0) * mask.shape[0])


def label_weights(labels: Tensor, causal: bool) -> Tensor:
    """(B, T) weights for the mean over labels by token: over all of them, or over each sequence's and the sequences."""
    labelled = labels != IGNORED
    return labelled / labelled.sum().clamp(min=1) if causal else sequence_weights(labelled)


def checked_pairs(layer_map: Mapping[int, int] | None, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Student hidden state -> teacher hidden state, 0 the embeddings' output. None: all of the student's, evenly.

    Raises:
        UserError: it names a hidden state that one of the two does not have, or is None for a deeper student.
    """
    if layer_map is None:
        return even_layer_map(student_layers, teacher_layers)
    for name, layers, last in (
        ("student", layer_map.keys(), student_layers),
        ("teacher", layer_map.values(), teacher_layers),
    ):
        if min(layers) < 0 or max(layers) > last:
            raise UserError(f"layer_map: expected {name} states between 0 and {last}, got {sorted(layers)}")
    return dict(layer_map)


class Objective(ABC):
    """What a student is trained for besides its labels: named, unweighted terms of a batch.

    Attributes:
        terms: the names of its terms. None: the first batch tells.
        preset: whether padding counts in the task's own loss.
        pooled: whether logits and sentence vectors are all that is needed of a teacher.
        relation_layer: the teacher's layer, from 1, whose queries, keys and values are needed; None: none are.
        layer_map: student hidden state -> teacher hidden state, 0 the embeddings' output. None: all of the student's,
            evenly spaced over the teacher's.
        maps: what is trained together with the student, and no part of it; made by `build`.
        adversary: a discriminator with its own optimizer, which steps after the student; made by `build`.
    """

    terms: Sequence[str] | None = None
    preset: Preset = "default"
    pooled: bool = False
    relation_layer: int | None = None
    layer_map: Mapping[int, int] | None = None
    maps: nn.Module | None = None
    adversary: Adversary | None = None

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """What decides where a run ends, for comparison with a checkpoint's."""

    @abstractmethod
    def check(self, student: nn.Module, teacher: TeacherInfo) -> None:
        """Raise UserError, before any step, where the two models, the cache or the routing do not fit."""

    def build(self, student: nn.Module, teacher: TeacherInfo, seed: int, device: torch.device | None = None) -> None:
        """Make `maps` and `adversary` anew, or leave them None. `device` is where they train; None: the student's."""
        self.maps = self.adversary = None

    def pairs(self, student_layers: int, teacher_layers: int) -> dict[int, int]:
        """Student state -> teacher state that it follows, of a student and a teacher of so many layers."""
        return {}

    def summary(self, student_layers: int, teacher_layers: int) -> str:
        """A line for people, printed once: which state follows which."""
        pairs = self.pairs(student_layers, teacher_layers)
        return describe_layer_map(pairs) if pairs else "student <- teacher: its last outputs"

    @property
    def sorted_map(self) -> list[tuple[int, int]] | None:
        """The layer map as `identity` has it."""
        return None if self.layer_map is None else sorted(self.layer_map.items())

    def recording(self) -> AbstractContextManager[Any]:
        """Entered while the student computes a batch."""
        return nullcontext()

    @abstractmethod
    def __call__(self, student_outputs: Any, teacher_outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The terms by name, each (), with a gradient; the same names for every batch."""


class LayerwiseObjective(Objective):
    """MSE over hidden states ("hidden") and the distance of the predictions ("prediction").

    Args:
        kind: "classification" (symmetric KL of the logits), "regression" (their MSE) or "qa" (the mean of the symmetric
            KLs of the start and the end positions).
        preset: "default" skips padding: hidden states are means over each sequence's valid tokens, then over the
            sequences, and padded positions are no answers. "paper" is the published form: a mean over all B * T * H,
            a softmax over all T.
        layer_map: student hidden state -> teacher hidden state, of L + 1 each with 0 the embeddings' output. None: all
            of the student's, evenly spaced over the teacher's.

    Raises:
        UserError: an unknown kind or preset, or an empty layer map.
    """

    terms = ("hidden", "prediction")

    def __init__(self, kind: Kind, preset: Preset = "default", layer_map: Mapping[int, int] | None = None):
        for name, value, choices in (("kind", kind, get_args(Kind)), ("preset", preset, get_args(Preset))):
            if value not in choices:
                raise UserError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if layer_map is not None and not layer_map:
            raise UserError("layer_map: expected at least one pair of layers, got none: the term would always be zero")
        self.kind, self.preset = kind, preset
        self.layer_map = layer_map

    def identity(self) -> dict[str, object]:
        return {"kind": self.kind, "preset": self.preset, "layer_map": self.sorted_map}

    def pairs(self, student_layers: int, teacher_layers: int) -> dict[int, int]:
        return checked_pairs(self.layer_map, student_layers, teacher_layers)

    def check(self, student: nn.Module, teacher: TeacherInfo) -> None:
        config: Any = student.config
        pairs = self.pairs(config.get_text_config().num_hidden_layers, teacher.num_layers)
        check_states(pairs.values(), student, teacher)
        check_sizes(config, teacher, "hidden_size", "vocab_size", "num_labels")
        if self.kind == "classification":
            check_classes(config, teacher)
        if self.preset == "paper" and teacher.stored_as is not None:
            raise UserError(
                "preset: expected 'default' with cached teacher outputs, which hold no padded positions, got 'paper'"
            )
        moe = moe_config(config)
        if moe is not None and moe.route_padding != (self.preset == "paper"):
            wanted, got = ("routed", "skipped") if self.preset == "paper" else ("skipped", "routed")
            raise UserError(
                f"preset: expected padding to be {wanted} by a student of the {self.preset!r} losses, got a model that"
                f" has it {got} (route_padding={moe.route_padding})"
            )

    def __call__(self, student_outputs: Any, teacher_outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The terms {"hidden": (), "prediction": ()} of a batch, unweighted.

        Args:
            student_outputs: with `hidden_states` (L + 1 of (B, T, H)) and `logits` (B, C), or for "qa" `start_logits`
                and `end_logits` (B, T), as transformers' models give them.
            teacher_outputs: the same of the teacher; a hidden state that the layer map does not use may be None.
            batch: `attention_mask` (B, T) is used unless the preset is "paper"; without one all positions are valid.

        Raises:
            UserError: an output is missing, or hidden sizes differ.
        """
        mask = batch.get("attention_mask") if self.preset == "default" else None
        return {
            "hidden": self._hidden(student_outputs, teacher_outputs, mask),
            "prediction": self._prediction(student_outputs, teacher_outputs, mask),
        }

    def _hidden(self, student_outputs: Any, teacher_outputs: Any, mask: Tensor | None) -> Tensor:
        student, teacher = (
            named_output(student_outputs, "hidden_states"),
            named_output(teacher_outputs, "hidden_states"),
        )
        weights = None if mask is None else sequence_weights(mask)
        terms = []
        for layer, teacher_layer in self.pairs(len(student) - 1, len(teacher) - 1).items():
            ours, theirs = student[layer], teacher[teacher_layer]
            if theirs is None or ours.shape != theirs.shape:
                got = None if theirs is None else tuple(theirs.shape)
                raise UserError(f"hidden_states[{teacher_layer}]: expected the shape {tuple(ours.shape)}, got {got}")
            terms.append(hidden_mse(ours, theirs, weights))
        return torch.stack(terms).sum()

    def _prediction(self, student_outputs: Any, teacher_outputs: Any, mask: Tensor | None) -> Tensor:
        if self.kind == "qa":
            start, end = (
                symmetric_kl(named_output(student_outputs, name), named_output(teacher_outputs, name), mask)
                for name in ("start_logits", "end_logits")
            )
            return (start + end) / 2
        logits, teacher_logits = named_output(student_outputs, "logits"), named_output(teacher_outputs, "logits")
        if self.kind == "regression":
            return F.mse_loss(at_least_float32(logits), at_least_float32(teacher_logits))
        return symmetric_kl(logits, teacher_logits)


def check_sizes(student: Any, teacher: TeacherInfo, *names: str) -> None:
    """Raise UserError unless the student's configuration says the teacher's sizes."""
    for name in names:
        wanted, got = (
            getattr(teacher, name),
            getattr(student if name == "num_labels" else student.get_text_config(), name, None),
        )
        if wanted != got:
            raise UserError(f"{name}: expected the teacher's {wanted}, got {got}")


def check_classes(student: Any, teacher: TeacherInfo) -> None:
    """Raise UserError unless the student's classes, if both models name theirs, are the teacher's in the same order.

    Case is ignored, as where a task's classes are compared with a model's.
    """
    ours = named_labels(student)
    lowered, theirs = ([name.lower() for name in names] for names in (ours, teacher.label_names))
    if ours and theirs and lowered != theirs:
        raise UserError(f"labels: expected the teacher's {', '.join(teacher.label_names)}, got {', '.join(ours)}")


def has_two_stacks(model: nn.Module) -> bool:
    """Whether a model is an encoder with a decoder, whose outputs name the hidden states of the two apart."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def check_states(needed: Iterable[int], student: nn.Module, teacher: TeacherInfo) -> None:
    """Raise UserError unless the student gives hidden states of one stack, and the teacher these."""
    if has_two_stacks(student):
        got = f"both in a {type(student).__name__}"
        raise UserError(f"model: expected an encoder or a decoder, whose states can follow others, got {got}")
    if not {*needed} <= set(teacher.layers):
        raise UserError(f"teacher: expected hidden states {sorted({*needed})}, got only {list(teacher.layers)}")


def named_output(outputs: Any, name: str) -> Any:
    """What transformers' outputs have by this name; `logits` (B,), as DeBERTa's of one score with labels, as (B, 1)."""
    value = getattr(outputs, name, None)
    if value is None:
        raise UserError(f"{name}: expected in the outputs of student and teacher, got none")
    return value[:, None] if name == "logits" and value.ndim == 1 else value


def sequences_in(batch: Batch) -> int:
    """B of a batch; images have no input_ids."""
    return len(batch["input_ids"] if "input_ids" in batch else next(iter(batch.values())))


def batch_weight(batch: Batch, causal: bool) -> int:
    """What a micro-batch's means are over, which is its weight in a window: sequences, or a causal model's labels."""
    if not causal:
        return sequences_in(batch)
    if "labels" not in batch:
        raise UserError("labels: expected in each batch for the task's loss, got none")
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def task_loss(
    outputs: Any,
    batch: Batch,
    preset: Preset = "default",
    causal: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss against the labels; a mean over sequences, for a causal model over labels.

    It is the model's own loss but for the cases that accumulation could not equal, or that padding would enter:
    token-level labels (B, T) give a mean over each sequence's labelled tokens, then over the sequences (for a causal
    model over all labelled tokens), and answers' positions a cross-entropy over the valid tokens (with the preset
    "paper" as published, over all positions). Where the batch says which sequences are `labelled` (B,), the others
    count as 0. `label_smoothing` is of token-level labels.

    Raises:
        UserError: the batch has no labels, or none by token that could be smoothed.
    """
    labels = batch.get("labels")
    by_token = "labelled" not in batch and labels is not None and labels.ndim == 2 and outputs.logits.ndim == 3
    if label_smoothing and not by_token:
        raise UserError(f"label_smoothing: expected 0 for a task without labels by token, got {label_smoothing}")
    if "labelled" in batch:
        return _loss_of_labelled(at_least_float32(named_output(outputs, "logits")), labels, batch["labelled"])
    if by_token:
        labels = next_token_labels(labels) if causal else labels
        logits = at_least_float32(outputs.logits)
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
        )
        return (losses.view_as(labels) * label_weights(labels, causal)).sum()
    if getattr(outputs, "loss", None) is None:
        raise UserError("labels: expected in each batch for the task's loss, got none")
    if "start_positions" in batch and "attention_mask" in batch and preset == "default":
        mask = batch["attention_mask"]
        start, end = (
            position_loss(getattr(outputs, f"{name}_logits"), batch[f"{name}_positions"], mask)
            for name in ("start", "end")
        )
        return (start + end).mean() / 2
    return outputs.loss


def _loss_of_labelled(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """Mean over B of the cross-entropy, or squared error of scores, with 0 for the sequences without a label."""
    if labels.is_floating_point():
        losses = (logits[:, 0] - labels).square()
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.masked_fill(~labelled, 0.0).mean()
