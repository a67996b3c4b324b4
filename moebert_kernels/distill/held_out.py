"""Test data of one's own where a task's labelled test set is not public, apart from what checkpoints are chosen by.

The two ways that text-to-text studies of GLUE use (HyperFormer, MPOE): small sets halve the validation split, large
ones (QQP, QNLI, SST-2) take 1,000 training rows as validation and test on the whole validation split. The choice of
rows is fixed, not seeded by the run: fine-tuning, distillation and evaluation must agree on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebert_kernels.distill.tasks import TaskData
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

WAYS = ("halves", "train-rows")
TRAIN_ROWS = 1000
_SEED = 42


def hold_out(data: TaskData, way: str) -> TaskData:
    """The data with a test split made of its own.

    Args:
        way: "halves" (half of validation becomes test) or "train-rows" (1,000 training rows become validation, and
            validation becomes test).

    Raises:
        UserError: an unknown way, running text, a test split that is there, one to divide that is not, or too few rows.
    """
    if way not in WAYS:
        raise UserError(f"hold-out: expected one of {', '.join(WAYS)}, got {way!r}")
    if data.task.kind == "lm":
        raise UserError("hold-out: expected rows to divide, got running text; divide its files")
    if "test" in data.splits:
        raise UserError("hold-out: expected data without a test split, got one")
    validation = data.validation
    if way == "halves":
        first, second = _divided(validation, len(validation) // 2, "validation")
        return TaskData(data.task, data.splits | {"validation": first, "test": second})
    train, held = _divided(data.train, len(data.train) - TRAIN_ROWS, "train")
    return TaskData(data.task, data.splits | {"train": train, "validation": held, "test": validation})


def _divided(rows: Dataset, count: int, name: str) -> tuple[Dataset, Dataset]:
    """The first `count` rows of a fixed shuffle and the others, numbered anew."""
    if not 0 < count < len(rows):
        least = 2 if name == "validation" else TRAIN_ROWS + 1
        raise UserError(f"hold-out: expected at least {least} rows in {name}, got {len(rows)}")
    shuffled = rows.shuffle(seed=_SEED).remove_columns("example_id")
    parts = (shuffled.select(range(count)), shuffled.select(range(count, len(rows))))
    first, second = (part.add_column("example_id", list(range(len(part)))) for part in parts)
    return first, second
