"""What a training run is told: its data, its settings, and what it hands back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor
from transformers import SchedulerType

from moebert_kernels.errors import UserError

Batch = dict[str, Tensor]
Metrics = dict[str, float]


class Batches(Protocol):
    """The training data as the loop sees it: `batches(epoch)` gives that epoch's micro-batches, on the CPU.

    A batch holds `input_ids` and `attention_mask` (both (B, T) int64), `example_id` (B,) int64 and what else the
    model's forward names (`token_type_ids`, `labels`, `start_positions`, `end_positions`). Batches depend on the data,
    the seed and the epoch alone: resuming skips those that were used and must meet the same ones again.

    `fingerprint` names the data; a run is not resumed on data with another one.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int:
        """Micro-batches in an epoch, the same in each."""
        ...

    def __call__(self, epoch: int) -> Iterator[Batch]: ...


# These change how often a run reports and saves, not where it ends; a run may be resumed under other values.
_FREE_ON_RESUME = ("save_steps", "log_steps")

RUN_FOLDERS = ("best", "final", "state")  # in a run's output folder

# of transformers, those that need no settings of their own, nor a metric at each step
_SCHEDULES = (
    SchedulerType.LINEAR,
    SchedulerType.COSINE,
    SchedulerType.COSINE_WITH_RESTARTS,
    SchedulerType.POLYNOMIAL,
    SchedulerType.CONSTANT,
    SchedulerType.CONSTANT_WITH_WARMUP,
    SchedulerType.INVERSE_SQRT,
)


@dataclass(frozen=True)
class FitConfig:
    """Settings of `fit`. Steps are optimizer steps; a step sees `batch_size * accumulation` sequences per process.

    Raises:
        UserError: a value out of its range.
    """

    epochs: int = 3
    max_steps: int | None = None  # stop (and end the learning-rate schedule) here even if epochs remain
    learning_rate: float = 5e-5
    router_learning_rate: float | None = None  # of routers' parameters; None: as all others
    batch_size: int = 32  # sequences in a micro-batch; whoever makes the batches reads it
    accumulation: int = 1  # micro-batches per optimizer step
    weight_decay: float = 0.0  # not applied to biases and norms
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    warmup_ratio: float = 0.0
    schedule: str = "linear"  # one of _SCHEDULES
    max_grad_norm: float | None = 1.0
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    # Of the loss terms, by name. One that is not named has weight 1, the balance term the model's `load_balance`.
    weights: dict[str, float] = field(default_factory=dict)
    label_smoothing: float = 0.0  # of labels by token (B, T)
    shared_fold: bool = False  # MPOE: fold the experts' weights once per optimizer step; takes their memory
    teacher_dropout: bool = False  # True: as the original code, whose teacher was left in train mode
    eval_steps: int | None = None  # None: at the end of each epoch
    best_metric: str | None = None  # None: the only metric that evaluate returns
    greater_is_better: bool = True
    patience: int | None = None  # stop after so many evaluations without a new best
    save_steps: int = 500
    log_steps: int = 10

    def __post_init__(self) -> None:
        optional = ("max_steps", "eval_steps", "patience")
        for name in ("epochs", "batch_size", "accumulation", "save_steps", "log_steps", *optional):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and not (name in optional and value is None):
                raise UserError(f"{name}: expected a whole number of at least 1, got {value!r}")
        for name in ("learning_rate", "router_learning_rate", "weight_decay", "warmup_ratio"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise UserError(f"{name}: expected a number of at least 0, got {value!r}")
        if self.warmup_ratio > 1.0:
            raise UserError(f"warmup_ratio: expected a share between 0 and 1, got {self.warmup_ratio!r}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"label_smoothing: expected at least 0 and below 1, got {self.label_smoothing!r}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0.0:
            raise UserError(f"max_grad_norm: expected a number above 0 or None, got {self.max_grad_norm!r}")
        if self.schedule not in _SCHEDULES:
            names = ", ".join(name.value for name in _SCHEDULES)
            raise UserError(f"schedule: expected one of {names}, got {self.schedule!r}")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise UserError(f"mixed_precision: expected 'no', 'fp16' or 'bf16', got {self.mixed_precision!r}")
        for name, weight in self.weights.items():
            if not 0.0 <= weight < float("inf"):
                raise UserError(f"weights[{name!r}]: expected a number of at least 0, got {weight!r}")

    def identity(self) -> dict[str, object]:
        """The settings that decide where a run ends, for comparison with those of a checkpoint."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in _FREE_ON_RESUME}
        return settings | {f"weights.{term}": weight for term, weight in settings.pop("weights").items()}


@dataclass(frozen=True)
class FitResult:
    """Where a run ended. The model that `fit` was given holds the weights of `model_dir`."""

    step: int
    model_dir: Path  # best/ (the later of equals) if there was an evaluation, else final/
    stopped_early: bool
    best_step: int | None
    best_metrics: Metrics
    history: list[dict[str, object]]  # one entry per evaluation: step, epoch and the metrics
