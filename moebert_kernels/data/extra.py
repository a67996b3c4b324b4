"""Texts without labels beside a task's training data, for a student to follow its teacher on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moebert_kernels.data.files import quiet_datasets, split_name
from moebert_kernels.data.held_out import numbered
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import Task, load_task
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def extra_text(task: Task, file: Path) -> Dataset:
    """Rows with the task's text columns, of a tsv, csv or jsonl file; labels, if it has any, are not read.

    Raises:
        UserError: another format, or a column that is missing.
    """
    if split_name(file)[1] == ".txt" or file.is_dir():
        columns = ", ".join(task.text_columns)
        raise UserError(f"extra-text: expected a tsv, csv or jsonl file with {columns}, got {file}")
    return load_task(replace(task, kind="lm"), {"train": file}).train  # running text has no labels either


def with_extra_text(train: TokenizedSplit, extra: Dataset) -> TokenizedSplit:
    """The training data and, after them, texts without labels, which the column `labelled` tells apart."""
    from datasets import concatenate_datasets

    with quiet_datasets():
        extra = extra.add_column("label", [0] * len(extra)).cast(train.rows.features)
        rows = numbered(concatenate_datasets([train.rows, extra]))
    joined = TokenizedSplit(rows, train.task, train.tokenizer, max_length=train.max_length, pad_to=train.pad_to)
    joined.columns = joined.columns.add_column("labelled", [row < len(train) for row in range(len(joined))])
    return joined
