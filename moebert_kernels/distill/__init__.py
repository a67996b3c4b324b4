"""Fine-tuning and distillation: objectives, the training loop, tasks, metrics."""

# ruff: noqa: E402  what is missing is named before the imports that need it
from moebert_kernels.errors import require_extra

require_extra("train", "transformers", "accelerate", "datasets")

from moebert_kernels.distill.config import Batch, Batches, FitConfig, FitResult, Metrics
from moebert_kernels.distill.loop import fit
from moebert_kernels.distill.objectives import LayerwiseObjective
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.distill.token_objective import TokenObjective

__all__ = [
    "Batch",
    "Batches",
    "FitConfig",
    "FitResult",
    "LayerwiseObjective",
    "Metrics",
    "TeacherCache",
    "TokenObjective",
    "fit",
]
