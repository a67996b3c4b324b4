"""Relations of queries, keys and values (MiniLMv2, 2012.15828): distributions over a sequence's tokens, whose number
does not depend on hidden size or heads, so students of any shape can follow them.

Recorded by hooks on the projections: any attention implementation will do, where attention maps need "eager" and carry
dropout.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.convert.sample_loss import at_least_float32
from moebert_kernels.distill.objectives import sequence_weights
from moebert_kernels.errors import UserError

QKV = tuple[Tensor, ...]  # queries, keys and values, each (B, T, H)
# what models call the projections, or one whose output is queries, keys and values one behind the other
_NAMES = (
    ("query", "key", "value"),  # bert, roberta, electra
    ("query_proj", "key_proj", "value_proj"),  # deberta-v2
    ("q_lin", "k_lin", "v_lin"),  # distilbert
    ("q", "k", "v"),  # mpnet
    ("q_proj", "k_proj", "v_proj"),  # llama
    ("Wqkv",),  # modernbert
    ("c_attn",),  # gpt2
)


class Recorder:
    """While entered, keeps what a layer's query, key and value projections give first.

    What DeBERTa-v2's give later in the same forward is of its relative positions.

    Args:
        model: a model of transformers whose layers have projections of known names.
        layer: from 1.

    Raises:
        UserError: no such layer, or one without such projections.
    """

    def __init__(self, model: nn.Module, layer: int):
        config: Any = model.config
        number = config.get_text_config().num_hidden_layers
        if not 1 <= layer <= number:
            raise UserError(f"relation_layer: expected 1 to {number}, the model's layers, got {layer}")
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == number)
        parts = (part for layers in lists for part in layers[layer - 1].modules())
        found = ((part, names) for part in parts for names in _NAMES if all(hasattr(part, name) for name in names))
        attention, names = next(found, (None, ()))
        if attention is None:
            kind = type(model).__name__
            raise UserError(f"relation: expected a model with projections to queries, keys and values, got a {kind}")
        self._modules = [attention.get_submodule(name) for name in names]
        self._outputs: dict[int, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Recorder:
        self._hooks, self._outputs = ExitStack(), {}
        for number, module in enumerate(self._modules):

            def keep(module: nn.Module, inputs: Any, output: Tensor, number: int = number) -> None:
                self._outputs.setdefault(number, output)

            self._hooks.callback(module.register_forward_hook(keep).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def take(self) -> QKV:
        """What was recorded, and forget it.

        Raises:
            UserError: nothing was.
        """
        taken, self._outputs = self._outputs, {}
        if len(taken) != len(self._modules):
            raise UserError("relation: expected queries, keys and values of a forward pass, got none")
        return taken[0].chunk(3, -1) if len(taken) == 1 else tuple(taken[number] for number in range(3))


def relation_heads(student: Any, teacher_heads: int, teacher_size: int, wanted: int | None) -> int:
    """Into how many heads both models' vectors are cut; None: the teacher's number of heads, else the student's.

    Raises:
        UserError: the number does not divide both hidden sizes.
    """
    sizes = (student.hidden_size, teacher_size)
    candidates = (teacher_heads, student.num_attention_heads) if wanted is None else (wanted,)
    for heads in candidates:
        if heads >= 1 and not any(size % heads for size in sizes):
            return heads
    raise UserError(f"relation_heads: expected a divisor of the hidden sizes {sizes[0]} and {sizes[1]}, got {wanted}")


def relation_kl(student: QKV, teacher: QKV, mask: Tensor, heads: int) -> Tensor:
    """KL(teacher || student) of the relations softmax(v v^T / sqrt(d)), a mean over queries, keys and values.

    Args:
        student, teacher: three of (B, T, H), with hidden sizes of their own; computed in at least float32.
        mask: (B, T), 0 at padding: no query and no key.
        heads: of the relations; H / heads = d of each model.

    Returns:
        () mean over heads and each sequence's valid queries, then over the sequences.
    """
    weights, padding = sequence_weights(mask), (mask == 0)[:, None, None, :]
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        log_q, log_p = (_log_relations(values, padding, heads) for values in (ours, theirs))
        divergence = (log_p.exp() * (log_p - log_q)).masked_fill(padding, 0.0).sum(-1)  # (B, heads, T)
        terms.append((divergence.mean(1) * weights).sum())
    return torch.stack(terms).mean()


def _log_relations(values: Tensor, padding: Tensor, heads: int) -> Tensor:
    """(B, T, H) -> (B, heads, T, T) logarithms of each query's distribution over the keys."""
    split = at_least_float32(values).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, T, d)
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    return scores.masked_fill(padding, torch.finfo(scores.dtype).min).log_softmax(-1)
