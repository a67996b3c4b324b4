"""Training one model on several tasks: batches of one task each, drawn in proportion, and metrics per task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from datasets import Value, concatenate_datasets
from torch import nn

from moebert_kernels.data.files import quiet_datasets
from moebert_kernels.data.metrics import Metrics
from moebert_kernels.data.split import Batch, TokenizedSplit
from moebert_kernels.distill.orders import SeededTasks
from moebert_kernels.errors import UserError
from moebert_kernels.layers import get_task, moe_layers, set_task

MEAN = "mean"  # the metric that judges checkpoints


class JoinedTasks:
    """The training data of several tasks as one, which trains like a `TokenizedSplit`.

    Every batch is of one task and carries `task_ids` (B,); `SeededTasks` says in which order. A task's sequences are
    padded as its own split pads them.

    Args:
        splits: name of a task -> its training split.
        tasks: the model's tasks; a task's number in it is its id.
        temperature: see `SeededTasks`.

    Raises:
        UserError: no tasks, or a task that the model does not have.
    """

    pad_to = None

    def __init__(self, splits: Mapping[str, TokenizedSplit], tasks: Sequence[str], *, temperature: float = 1.0) -> None:
        if not splits:
            raise UserError("tasks: expected at least one, got none")
        for name in splits:
            if name not in tasks:
                raise UserError(f"tasks: expected some of {', '.join(tasks)}, got {name!r}")
        self.splits, self.tasks, self.temperature = dict(splits), list(tasks), temperature
        self._by_id = {self.tasks.index(name): split for name, split in splits.items()}
        self.tokenizer = next(iter(splits.values())).tokenizer
        with quiet_datasets():
            self.columns = concatenate_datasets([self._columns(name, split) for name, split in splits.items()])

    def _columns(self, name: str, split: TokenizedSplit) -> Any:
        columns = split.columns.remove_columns("example_id").cast_column("labels", Value("float64"))
        return columns.add_column("task_ids", [self.tasks.index(name)] * len(columns))

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate([split.lengths for split in self.splits.values()])

    @property
    def fingerprint(self) -> str:
        """Names the data of all tasks and everything that their order depends on."""
        parts = [self.temperature, self.tasks, *((name, split.fingerprint) for name, split in self.splits.items())]
        return sha256(repr(parts).encode()).hexdigest()[:32]

    def collator(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of rows of one task."""
        split = self._by_id[rows[0]["task_ids"]]
        batch = dict(split.collator([dict(row) for row in rows]))
        kind = torch.int64 if split.task.kind == "classification" else torch.float32
        return batch | {"labels": batch["labels"].to(kind)}

    def sampler(self, trainer: Any) -> SeededTasks:
        """The order of a trainer's run."""
        lengths = [split.lengths for split in self.splits.values()]
        return SeededTasks(trainer, lengths, trainer._train_batch_size, self.temperature)


class MultiTaskEvaluator:
    """Judges a task-routed model on each task; calling it gives "<task>.<metric>" and "mean", that of the main metrics.

    `fingerprint` names the data of all tasks.

    Args:
        evaluators: name of a task -> what gives its metrics for a model that is set to the task.
        main_metrics: name of a task -> its metric that enters the mean.
    """

    def __init__(self, evaluators: Mapping[str, Callable[[nn.Module], Metrics]], main_metrics: Mapping[str, str]):
        self.evaluators, self.main_metrics = dict(evaluators), dict(main_metrics)
        parts = {name: getattr(evaluate, "fingerprint", None) for name, evaluate in self.evaluators.items()}
        self.fingerprint = sha256(repr((parts, self.main_metrics)).encode()).hexdigest()[:32]

    def __call__(self, model: nn.Module) -> Metrics:
        metrics: Metrics = {}
        for name, evaluate in self.evaluators.items():
            with on_task(model, name):
                metrics |= {f"{name}.{metric}": value for metric, value in evaluate(model).items()}
        main = [metrics[f"{name}.{self.main_metrics[name]}"] for name in self.evaluators]
        return metrics | {MEAN: sum(main) / len(main)}


@contextmanager
def on_task(model: Any, name: str) -> Iterator[None]:
    """Within the block a task-routed model takes this task where it is given none."""
    before = get_task(model)
    set_task(model, name)
    try:
        yield
    finally:
        set_task(model, before)


def load_report(model: Any) -> list[str]:
    """A line per layer of a task-routed model: each task's experts with their probabilities, and tasks per expert."""
    lines, config = [], model.config.quantization_config
    for number, layer in enumerate(moe_layers(model), 1):
        router: Any = layer.router
        experts, probabilities = router.chosen()
        tasks = ", ".join(
            f"{name} {'+'.join(map(str, chosen))} ({' '.join(f'{p:.3f}' for p in gates)})"
            for name, chosen, gates in zip(config.tasks, experts.tolist(), probabilities.tolist(), strict=True)
        )
        load = torch.bincount(experts.flatten(), minlength=config.num_experts).tolist()
        lines.append(f"layer {number}: {tasks}; tasks per expert {' '.join(map(str, load))}")
    return lines
