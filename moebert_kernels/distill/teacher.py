"""The teacher as the loop sees it: something that gives outputs for a batch, live or from a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moebert_kernels.convert import model_fingerprint
from moebert_kernels.convert.sample_loss import unread_labels
from moebert_kernels.cpu import aligned
from moebert_kernels.data.split import Batch
from moebert_kernels.distill.loading import check_reach, named_labels
from moebert_kernels.distill.objectives import has_two_stacks
from moebert_kernels.distill.relations import Recorder
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config


@dataclass(frozen=True)
class TeacherOutputs:
    """Detached outputs of a teacher, named as in transformers' outputs, so that objectives take either."""

    hidden_states: tuple[Tensor | None, ...]  # L + 1 of (B, T, H), the embeddings' first; None: not kept
    logits: Tensor | None = None  # (B, C), or by token (B, T, V)
    start_logits: Tensor | None = None  # (B, T)
    end_logits: Tensor | None = None  # (B, T)
    pooled: dict[int, Tensor] | None = None  # state -> (B, 3, H) [CLS], max and mean, where these are kept instead
    relation: tuple[Tensor, ...] | None = None  # queries, keys and values of one layer, each (B, T, H)


pytree.register_dataclass(TeacherOutputs)


@dataclass(frozen=True)
class TeacherInfo:
    """What must fit the student, known without running the teacher."""

    fingerprint: str  # of the weights
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_labels: int
    layers: tuple[int, ...]  # the hidden states it gives, 0 = the embeddings' output
    num_attention_heads: int = 1
    label_names: tuple[str, ...] = ()  # by class number; none where nobody named them
    stored_as: str | None = None  # a cache's dtype, with zeros at padded positions; None: computed for each batch
    pooled: bool = False  # a cache of pooled states


class Teacher(Protocol):
    """Gives the outputs of a frozen teacher for a batch, on the batch's device."""

    @property
    def info(self) -> TeacherInfo: ...

    def __call__(self, batch: Batch) -> TeacherOutputs: ...


def forward_keys(model: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that the model's forward declares; others in a batch are not for it."""
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def teacher_info(model: nn.Module, layers: Sequence[int] | None = None) -> TeacherInfo:
    """Facts of a transformers model; `layers` None: all hidden states. An encoder with a decoder gives none.

    Raises:
        UserError: a layer that the model does not have, a model without a vocabulary, or one with a head for each of
            several tasks.
    """
    check_one_head("teacher", model)
    config: Any = model.config
    sizes = config.get_text_config()
    if not hasattr(sizes, "vocab_size"):
        raise UserError(f"teacher: expected a model of texts, got a {type(model).__name__}, which has no vocabulary")
    available = sizes.num_hidden_layers + 1
    chosen = tuple(range(available)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= available:
        raise UserError(f"layers: expected hidden states between 0 and {available - 1}, got {list(chosen)}")
    return TeacherInfo(
        fingerprint=model_fingerprint(model),
        num_layers=sizes.num_hidden_layers,
        hidden_size=sizes.hidden_size,
        vocab_size=sizes.vocab_size,
        num_labels=config.num_labels,
        layers=() if has_two_stacks(model) else chosen,
        num_attention_heads=getattr(sizes, "num_attention_heads", 1),
        label_names=named_labels(config),
    )


def check_one_head(name: str, model: nn.Module) -> None:
    """Raise UserError if `model`, called `name`, is a task-routed one with a head for each task."""
    moe = moe_config(model.config)
    if moe is not None and moe.task_labels is not None:
        raise UserError(
            f"{name}: expected a model with one head, got a {type(model).__name__} with heads for"
            f" {', '.join(moe.tasks or ())} (moebert_kernels.convert.merge(model, task) makes the dense one of a task)"
        )


class LiveTeacher:
    """Runs a model for each batch: in eval mode and without gradients, and never a part of the student.

    Args:
        model: a transformers model; moved to `device`, its weights untouched.
        device: where batches lie.
        dropout: True runs it in train mode, as the original code did (its teacher was a submodule of the student).
        autocast: a factory of the context to run it in, for mixed precision.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, *, dropout: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:  # fmt: skip
        self.info = teacher_info(model)
        self._model = aligned(model).to(device)
        self._dropout = dropout
        self._autocast = autocast
        self._recorder: Recorder | None = None
        self._keys = [key for key in forward_keys(model) if key not in unread_labels(model)]

    def record(self, layer: int) -> None:
        """From now on give queries, keys and values of this layer, from 1, too."""
        self._recorder = Recorder(self._model, layer)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutputs:
        if "input_ids" in batch:
            check_reach("teacher", self._model.config, batch["input_ids"].shape[1])
        self._model.train(self._dropout)
        inputs = {key: batch[key] for key in self._keys if key in batch}
        with self._autocast(), self._recorder or nullcontext():
            outputs = self._model(**inputs, output_hidden_states=True)
        self._model.eval()
        return TeacherOutputs(
            tuple(getattr(outputs, "hidden_states", None) or ()),  # none of two stacks
            getattr(outputs, "logits", None),
            getattr(outputs, "start_logits", None),
            getattr(outputs, "end_logits", None),
            relation=None if self._recorder is None else self._recorder.take(),
        )
