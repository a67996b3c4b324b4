"""Splits of one's own: validation rows out of one file, or test rows where a task's labelled test set is not public.

For test rows there are the two ways that text-to-text studies of GLUE use (HyperFormer, MPOE): small sets halve the
validation split, large ones (QQP, QNLI, SST-2) take 1,000 training rows as validation and test on the whole validation
split. The choice of rows is fixed, not seeded by the run: fine-tuning, distillation and evaluation must agree on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moebert_kernels.data.files import quiet_datasets
from moebert_kernels.data.labels import by_name
from moebert_kernels.data.tasks import TaskData
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

WAYS = ("halves", "train-rows")
TRAIN_ROWS = 1000
_SEED = 42


def hold_out(data: TaskData, way: str) -> TaskData:
    """The data with a validation or a test split made of its own.

    Args:
        way: a share such as "0.1" (of the training rows, which becomes validation: of each class that share, of
            questions those of whole contexts), "halves" (half of validation becomes test) or "train-rows" (1,000
            training rows become validation, and validation becomes test).

    Raises:
        UserError: an unknown way, running text, a split to be made that is there, one to divide that is not, or too few
            rows.
    """
    share = share_of(way)
    if way not in WAYS and share is None:
        raise UserError(f"hold-out: expected a share between 0 and 1, or one of {', '.join(WAYS)}, got {way!r}")
    if data.task.kind == "lm":
        raise UserError("hold-out: expected rows to divide, got running text; divide its files")
    if share is not None:
        if "validation" in data.splits:
            raise UserError(f"hold-out: expected {', '.join(WAYS)} for data with a validation split, got {way}")
        chosen = _drawn(data, share)
        if not 0 < chosen.sum() < len(chosen):
            several = f" of {len(set(data.train['label']))} classes, of which one row each is not held out"
            raise UserError(
                f"hold-out: expected enough training rows for both splits, got {len(chosen)}"
                f"{several if data.task.kind == 'classification' else ''}"
            )
        held, train = (numbered(data.train.select(np.flatnonzero(rows).tolist())) for rows in (chosen, ~chosen))
        return TaskData(data.task, data.splits | {"train": train, "validation": held})
    if "test" in data.splits:
        raise UserError("hold-out: expected data without a test split, got one")
    validation = data.validation
    if way == "halves":
        first, second = _divided(validation, len(validation) // 2, "validation")
        return TaskData(data.task, data.splits | {"validation": first, "test": second})
    train, held = _divided(data.train, len(data.train) - TRAIN_ROWS, "train")
    return TaskData(data.task, data.splits | {"train": train, "validation": held, "test": validation})


def share_of(way: str) -> float | None:
    """The share of the training rows that a way makes validation; None for the ways that make a test split."""
    try:
        share = float(way)
    except ValueError:
        return None
    return share if 0.0 < share < 1.0 else None


def _drawn(data: TaskData, share: float) -> np.ndarray:
    """(training rows,) bool: which are drawn."""
    rows, generator = data.train, np.random.default_rng(_SEED)
    chosen = np.zeros(len(rows), dtype=bool)
    if data.task.kind == "qa":
        known: dict[str, int] = {}
        contexts = np.array([known.setdefault(context, len(known)) for context in rows["context"]])
        order = generator.permutation(len(known))
        taken = np.cumsum(np.bincount(contexts)[order]) <= share * len(rows)
        return np.isin(contexts, order[: max(1, taken.sum())])
    classes: Any = np.array(rows["label"]) if data.task.kind == "classification" else np.zeros(len(rows), dtype=int)
    # The generator goes through the classes by name: models number them in other ways, and write them in another case.
    names = data.task.label_names if data.task.kind == "classification" else ("",)
    for label in sorted(np.unique(classes), key=lambda label: (by_name(names[label].casefold()), names[label])):
        members = np.flatnonzero(classes == label)
        count = round(share * len(members)) if len(members) > 1 else 0
        chosen[generator.permutation(members)[: min(max(count, 1), len(members) - 1)]] = True
    return chosen


def numbered(rows: Dataset) -> Dataset:
    """Rows with `example_id` from 0 on."""
    with quiet_datasets():
        return rows.remove_columns("example_id").add_column("example_id", list(range(len(rows))))


def _divided(rows: Dataset, count: int, name: str) -> tuple[Dataset, Dataset]:
    """The first `count` rows of a fixed shuffle and the others, numbered anew."""
    if not 0 < count < len(rows):
        least = 2 if name == "validation" else TRAIN_ROWS + 1
        raise UserError(f"hold-out: expected at least {least} rows in {name}, got {len(rows)}")
    shuffled = rows.shuffle(seed=_SEED)
    return numbered(shuffled.select(range(count))), numbered(shuffled.select(range(count, len(rows))))
