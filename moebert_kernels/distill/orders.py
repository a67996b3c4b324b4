"""In which order a trainer reads its data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from moebert_kernels.errors import UserError


class SeededLengthGroups(LengthGroupedSampler):
    """Batches of similar lengths in an order that the seed and the epoch alone decide, so that a resumed run meets it.

    transformers' draws from the global generator, which a resumed run has elsewhere.
    """

    def __init__(self, trainer: Trainer, like: LengthGroupedSampler) -> None:
        super().__init__(like.batch_size, lengths=like.lengths, generator=torch.Generator())
        self._trainer = trainer

    def __iter__(self) -> Iterator[int]:
        args, epoch = self._trainer.args, int(self._trainer.state.epoch or 0)
        self.generator.manual_seed((args.seed if args.data_seed is None else args.data_seed) + epoch)
        return super().__iter__()


def numbered(data: Any) -> Dataset:
    """Training data with a column `example_id`, by which a teacher's kept outputs are found.

    Raises:
        UserError: it is no data set with a length.
    """
    if not isinstance(data, Dataset):
        raise UserError(f"teacher_outputs: expected training data as datasets.Dataset, got {type(data).__name__}")
    return data if "example_id" in data.column_names else data.add_column("example_id", list(range(len(data))))


class InOrder:
    """A trainer's data as `TeacherCache.build` reads it: in its own order, each example once."""

    fingerprint = ""

    def __init__(self, trainer: Any) -> None:
        data = trainer._remove_unused_columns(trainer.train_dataset, description="training")
        size = trainer.args.per_device_eval_batch_size
        generator = torch.Generator()  # a loader draws a seed that it has no use for
        self._loader: Any = torch.utils.data.DataLoader(
            data, size, collate_fn=trainer.data_collator, generator=generator
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __call__(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        return iter(self._loader)
