"""Fine-tuning and distillation: objectives, and training with them on transformers' Trainer."""

# ruff: noqa: E402  what is missing is named before the imports that need it
from importlib import import_module
from typing import Any

from moebert_kernels.errors import require_extra

require_extra("train", "transformers", "accelerate", "datasets")

from moebert_kernels.distill.objectives import LayerwiseObjective
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.distill.token_objective import TokenObjective

__all__ = [
    "EmbeddingObjective",
    "LayerwiseObjective",
    "MoETrainer",
    "MoETrainingArguments",
    "TeacherCache",
    "TokenObjective",
    "end_processes",
    "train_stages",
]

# transformers' Trainer takes its time to import, and commands that do not train would wait for it
_LATER = {
    "EmbeddingObjective": "embedding", "MoETrainer": "trainer", "MoETrainingArguments": "arguments",
    "end_processes": "processes", "train_stages": "run",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
