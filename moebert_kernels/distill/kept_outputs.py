"""A trainer's own cache of its teacher's outputs."""

from __future__ import annotations

from typing import Any

from torch import nn

from moebert_kernels.distill.embedding import EmbeddingObjective
from moebert_kernels.distill.orders import in_order, numbered
from moebert_kernels.distill.teacher import teacher_info
from moebert_kernels.distill.teacher_cache import TeacherCache


def kept_outputs(trainer: Any, teacher: nn.Module) -> TeacherCache:
    """The teacher's outputs for a `MoETrainer`'s training data, whose rows get numbers; computed where missing."""
    trainer.train_dataset = numbered(trainer.train_dataset)
    objective, args = trainer.objective, trainer.args
    last = teacher_info(teacher).num_layers
    pairs: Any = getattr(objective, "pairs", lambda *_: {})
    layers = {last, *pairs(trainer.student.config.num_hidden_layers, last).values()}
    return TeacherCache.build(
        teacher,
        in_order(trainer),
        args.teacher_outputs,
        layers=sorted(layers),
        pooled=isinstance(objective, EmbeddingObjective) and objective.layer_map == {},
        dtype=args.teacher_outputs_dtype,
        device=args.device,
    )
