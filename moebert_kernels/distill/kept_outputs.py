"""A trainer's own cache of its teacher's outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from moebert_kernels.distill.orders import by_length, numbered
from moebert_kernels.distill.teacher import teacher_info
from moebert_kernels.distill.teacher_cache import TeacherCache


def kept_outputs(trainer: Any, teacher: nn.Module) -> TeacherCache:
    """The teacher's outputs for a `MoETrainer`'s training data, computed where they are missing.

    The rows of the data get numbers. Before anything is computed, the objective says whether it takes such outputs.
    """
    trainer.train_dataset = numbered(trainer.train_dataset)
    objective, args = trainer.objective, trainer.args
    models: Any = (trainer.student, teacher)
    ours, theirs = (model.config.get_text_config().num_hidden_layers for model in models)
    layers = sorted({theirs, *objective.pairs(ours, theirs).values()})
    kept = {"layers": layers, "pooled": objective.pooled, "dtype": args.teacher_outputs_dtype}
    info = replace(teacher_info(teacher, layers), stored_as="another dtype", pooled=objective.pooled)
    objective.check(trainer.student, info)
    return TeacherCache.build(teacher, by_length(trainer), args.teacher_outputs, device=args.device, **kept)
