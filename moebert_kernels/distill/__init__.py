"""Fine-tuning and distillation: objectives, the training loop, tasks, metrics."""

from moebert_kernels.distill.config import Batch, Batches, FitConfig, FitResult, Metrics
from moebert_kernels.distill.loop import fit
from moebert_kernels.distill.objectives import LayerwiseObjective
from moebert_kernels.distill.teacher_cache import TeacherCache

__all__ = ["Batch", "Batches", "FitConfig", "FitResult", "LayerwiseObjective", "Metrics", "TeacherCache", "fit"]
