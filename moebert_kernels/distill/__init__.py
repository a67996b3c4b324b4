"""Fine-tuning and distillation: objectives, the training loop, tasks, metrics."""

from moebert_kernels.distill.config import Batch, Batches, FitConfig, FitResult, Metrics

__all__ = ["Batch", "Batches", "FitConfig", "FitResult", "Metrics"]
