"""Training one model on several tasks: batches of one task each, drawn in proportion, and metrics per task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from moebert_kernels.distill.config import Batch, Batches, Metrics
from moebert_kernels.errors import UserError
from moebert_kernels.layers import get_task, moe_layers, set_task

MEAN = "mean"  # the metric that judges checkpoints


class MultiTaskBatches:
    """The batches of several tasks in one seeded order; every batch is of one task and carries `task_ids` (B,).

    A task with n batches in an epoch of its own gives about N n^(1/temperature) / sum n^(1/temperature) of an epoch's N
    batches, at least one, where N is the sum of all n. At temperature 1 these are its n batches, each once. Otherwise
    it goes on in the next epoch where it stopped, through its own epochs one after another: nothing is lost.

    `example_id` becomes id * number of the model's tasks + task id, so that no two tasks share one.

    Args:
        batches: name of a task -> its batches.
        tasks: the model's tasks; a task's number in it is its id.
        seed: with the epoch, decides the order of the tasks.
        temperature: above 1 draws small tasks more often than in proportion; infinity all equally often.

    Raises:
        UserError: no tasks, a task that the model does not have, or a temperature below 1.
    """

    def __init__(
        self, batches: Mapping[str, Batches], tasks: Sequence[str], seed: int = 0, *, temperature: float = 1.0
    ):
        if not batches:
            raise UserError("batches: expected those of at least one task, got none")
        for name in batches:
            if name not in tasks:
                raise UserError(f"batches: expected tasks among {', '.join(tasks)}, got {name!r}")
        if not temperature >= 1:
            raise UserError(f"temperature: expected a number of at least 1, got {temperature!r}")
        self.batches, self.tasks, self.seed, self.temperature = dict(batches), list(tasks), seed, temperature
        sizes = np.array([len(task) for task in self.batches.values()])
        shares = sizes ** (1 / temperature)
        self.counts = np.maximum(1, np.round(sizes.sum() * shares / shares.sum())).astype(int).tolist()

    @property
    def fingerprint(self) -> str:
        """Names the data of all tasks and everything that their order depends on."""
        parts = [self.seed, self.temperature, self.tasks, *((n, b.fingerprint) for n, b in self.batches.items())]
        return sha256(repr(parts).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return sum(self.counts)

    def __call__(self, epoch: int) -> Iterator[Batch]:
        names = list(self.batches)
        order = np.repeat(np.arange(len(names)), self.counts)
        order = np.random.default_rng([self.seed, epoch]).permutation(order)
        streams = [_stream(self.batches[name], epoch * count) for name, count in zip(names, self.counts, strict=True)]
        for index in order:
            batch, task_id = next(streams[index]), self.tasks.index(names[index])
            rows = batch["input_ids"].shape[0]
            yield batch | {
                "task_ids": torch.full((rows,), task_id, dtype=torch.int64),
                "example_id": batch["example_id"] * len(self.tasks) + task_id,
            }


def _stream(batches: Batches, start: int) -> Iterator[Batch]:
    """The batches of all epochs of a task in a row, from number `start` on, without end."""
    epoch, skip = divmod(start, len(batches))
    while True:
        yield from islice(batches(epoch), skip, None)
        epoch, skip = epoch + 1, 0


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
