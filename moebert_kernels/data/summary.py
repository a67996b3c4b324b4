"""What a person should see of the data before a model is trained or judged on it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from moebert_kernels.data.tasks import SPLIT_WORDS, Task, TaskData

if TYPE_CHECKING:
    from datasets import Dataset

    from moebert_kernels.data.split import TokenizedSplit


_SHOWN = 12  # classes of a split; more of them are summed up
_MANY = 20  # classes whose names are all numbers; more of them look like scores


def summary(data: TaskData) -> list[str]:
    """For each split its rows, with the classes and their counts or the range of scores, and what looks wrong.

    Rows count as repeated where validation or test rows have the texts of training rows.
    """
    lines = [_rows(data.task, name, rows) for name, rows in data.splits.items()]
    names = data.task.label_names
    if data.task.name == "custom" and len(names) > _MANY and all(name.isdigit() for name in names):
        lines.append(f"the {len(names)} classes are numbers; if they are scores, give --regression")
    if data.task.kind == "lm" or "train" not in data.splits:
        return lines
    seen = set(_texts(data.task, data.train))
    for name, rows in data.splits.items():
        if name != "train":
            repeated = sum(texts in seen for texts in _texts(data.task, rows))
            if repeated:
                lines.append(f"{repeated} of the {len(rows)} {name} rows have the texts of training rows")
    return lines


def _texts(task: Task, rows: Dataset) -> list[tuple[str, ...]]:
    return list(zip(*(rows[name] for name in task.text_columns), strict=True))


def _rows(task: Task, name: str, rows: Dataset) -> str:
    line = f"{len(rows)} {SPLIT_WORDS.get(name, name)} row{'s' * (len(rows) != 1)}"
    if task.kind == "regression":
        return f"{line}, scores from {min(rows['label']):g} to {max(rows['label']):g}"
    if task.kind != "classification":
        return line
    counts = Counter(rows["label"])
    shown = [f"{task.label_names[label]} {count}" for label, count in counts.most_common(_SHOWN)]
    more = [f"{len(counts) - _SHOWN} more"] * (len(counts) > _SHOWN)
    none = [f"none of {label}" for number, label in enumerate(task.label_names) if number not in counts]
    none = none if len(none) <= _SHOWN else [f"none of {len(none)} other classes"]
    return f"{line}; {', '.join([*shown, *more, *none])}"


def cut_texts(name: str, split: TokenizedSplit) -> str | None:
    """How many texts of a split may have lost their ends, if any have."""
    if not (cut := split.cut()):
        return None
    texts = f"{cut} of {len(split)} {SPLIT_WORDS.get(name, name)} texts"
    return f"{texts} fill all {split.max_length} tokens, and what is longer is cut (--max-length changes it)"
