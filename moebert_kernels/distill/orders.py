"""In which order a trainer reads its data: batches of similar lengths, and of one task each, in a seeded order.

Sentences of one length waste no padding. The order is shuffled, cut into pools of `POOL` batches, and each pool is
sorted by length before it is cut into batches, which are shuffled again. The seed and the epoch alone decide it: a
resumed run meets the batches that it would have met.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import Trainer

from moebert_kernels.errors import UserError

POOL = 50


def length_groups(lengths: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """(N,) an order of examples of these `lengths`, whose batches of `size` have similar ones; a short one is last."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), POOL * size):
        pool = order[start : start + POOL * size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    whole = [batch for batch in batches if len(batch) == size]
    short = [batch for batch in batches if len(batch) < size]
    return np.concatenate([*(whole[i] for i in generator.permutation(len(whole))), *short])


class _Seeded(Sampler[int]):
    """The seed of a run and the epoch that it is in."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def _seed(self) -> int:
        args = self._trainer.args
        return args.seed if args.data_seed is None else args.data_seed

    @property
    def _epoch(self) -> int:
        return int(self._trainer.state.epoch or 0)


class SeededLengthGroups(_Seeded):
    """Batches of similar lengths; see `length_groups`. transformers' draws from the global generator.

    Args:
        lengths: of the examples.
        size: of a batch.
    """

    def __init__(self, trainer: Trainer, lengths: Sequence[int], size: int) -> None:
        super().__init__(trainer)
        self._lengths, self._size = np.asarray(lengths), size

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(length_groups(self._lengths, self._size, self._seed, self._epoch).tolist())


class SeededTasks(_Seeded):
    """Batches of one task each, of examples of several tasks that lie one task after another.

    A task with n batches in an epoch of its own gives about N n^(1/temperature) / sum n^(1/temperature) of an epoch's N
    batches, at least one, where N is the sum of all n. It goes on in the next epoch where it stopped, through its own
    epochs one after another: nothing is lost. All batches are full.

    Args:
        lengths: of the examples of each task.
        size: of a batch.
        temperature: above 1 draws small tasks more often than in proportion; infinity all equally often.

    Attributes:
        counts: batches of each task in an epoch.

    Raises:
        UserError: a temperature below 1.
    """

    def __init__(self, trainer: Trainer, lengths: Sequence[np.ndarray], size: int, temperature: float = 1.0) -> None:
        super().__init__(trainer)
        if not temperature >= 1:
            raise UserError(f"task_temperature: expected a number of at least 1, got {temperature!r}")
        self._lengths, self._size = lengths, size
        sizes = np.array([-(-len(task) // size) for task in lengths])
        shares = sizes ** (1 / temperature)
        self.counts: list[int] = np.maximum(1, np.round(sizes.sum() * shares / shares.sum())).astype(int).tolist()

    def __len__(self) -> int:
        return sum(self.counts) * self._size

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self._seed, self._epoch])
        order = generator.permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        streams = [self._stream(task, self._epoch * count * self._size) for task, count in enumerate(self.counts)]
        for task in order:
            yield from islice(streams[task], self._size)

    def _stream(self, task: int, start: int) -> Iterator[int]:
        """The examples of all epochs of a task in a row, from number `start` on, without end."""
        first = sum(len(lengths) for lengths in self._lengths[:task])
        epoch, skip = divmod(start, len(self._lengths[task]))
        while True:
            order = first + length_groups(self._lengths[task], self._size, self._seed, epoch)
            yield from order[skip:].tolist()
            epoch, skip = epoch + 1, 0


def numbered(data: Any) -> Dataset:
    """Training data with a column `example_id`, by which a teacher's kept outputs are found.

    Raises:
        UserError: it is no data set with a length.
    """
    if not isinstance(data, Dataset):
        raise UserError(f"teacher_outputs: expected training data as datasets.Dataset, got {type(data).__name__}")
    return data if "example_id" in data.column_names else data.add_column("example_id", list(range(len(data))))


def by_length(trainer: Any) -> Any:
    """Batches of a trainer's data as `TeacherCache.build` reads it: each example once, the longest first."""
    data = trainer._remove_unused_columns(trainer.train_dataset, description="training")
    order = np.argsort([-len(ids) for ids in data["input_ids"]], kind="stable")
    size = trainer.args.per_device_train_batch_size
    groups = [order[start : start + size].tolist() for start in range(0, len(order), size)]
    generator = torch.Generator()  # a loader draws a seed that it has no use for
    return torch.utils.data.DataLoader(
        data, batch_sampler=groups, collate_fn=trainer.data_collator, generator=generator
    )


def padded(collator: Any, multiple: int) -> Any:
    """The collator, which pads to lengths that are multiples of this number.

    Raises:
        UserError: it is not one of transformers' that pad.
    """
    if not hasattr(collator, "pad_to_multiple_of"):
        kind = getattr(collator, "__name__", type(collator).__name__)
        raise UserError(f"pad_to_multiple_of: expected a collator that has it, got {kind}")
    collator = copy(collator)
    collator.pad_to_multiple_of = multiple
    return collator
