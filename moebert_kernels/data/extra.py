"""Texts without labels beside a task's training data, for a student to follow its teacher on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moebert_kernels.data.files import quiet_datasets, split_name
from moebert_kernels.data.held_out import numbered
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import Task, load_task
from moebert_kernels.errors import UserError, about

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
    with about("extra-text", "data"):
        return load_task(replace(task, kind="lm"), {"train": file}).train  # running text has no labels either


def with_extra_text(train: TokenizedSplit, extra: Dataset) -> TokenizedSplit:
    """The training data and, after them, texts without labels, which the column `labelled` tells apart.

    Raises:
        UserError: training data of questions or running text, or of an encoder-decoder.
    """
    from datasets import concatenate_datasets

    if not train.task.has_label or train.text_to_text:
        got = "an encoder-decoder's" if train.text_to_text else f"a task of kind {train.task.kind}"
        raise UserError(f"extra-text: expected it with classes or scores of whole texts, got {got}; leave it out")
    with quiet_datasets():
        extra = extra.add_column("label", [0] * len(extra)).cast(train.rows.features)
        rows = numbered(concatenate_datasets([train.rows, extra]))
    joined = TokenizedSplit(rows, train.task, train.tokenizer, max_length=train.max_length, pad_to=train.pad_to)
    joined.columns = joined.columns.add_column("labelled", [row < len(train) for row in range(len(joined))])
    return joined
