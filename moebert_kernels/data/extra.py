"""Texts without labels beside a task's training data, for a student to follow its teacher on: others or corrupted.

The column `labelled` tells them apart from those with labels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moebert_kernels.data.files import quiet_datasets, split_name
from moebert_kernels.data.held_out import numbered
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import Task, load_task
from moebert_kernels.errors import UserError, about

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CORRUPTED = 0.15  # of the tokens of a copy, as many as BERT's pretraining hides


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
    """The training data and, after them, texts without labels.

    Raises:
        UserError: training data of questions or running text, or of an encoder-decoder.
    """
    from datasets import concatenate_datasets

    _check_labels(train, "extra-text")
    with quiet_datasets():
        extra = extra.add_column("label", [0] * len(extra)).cast(train.rows.features)
        rows = numbered(concatenate_datasets([train.rows, extra]))
    joined = TokenizedSplit(rows, train.task, train.tokenizer, max_length=train.max_length, pad_to=train.pad_to)
    joined.columns = joined.columns.add_column("labelled", [row < len(train) for row in range(len(joined))])
    return joined


def with_corrupted_copies(train: TokenizedSplit, copies: int, seed: int) -> TokenizedSplit:
    """The training data and, after them, so many corrupted copies; see `corrupted_copies`.

    Raises:
        UserError: as `with_extra_text`.
    """
    _check_labels(train, "corrupted-copies")
    joined = TokenizedSplit(train.rows, train.task, train.tokenizer, max_length=train.max_length, pad_to=train.pad_to)
    joined.columns = corrupted_copies(train.columns, train.tokenizer, copies, seed)
    return joined


def corrupted_copies(columns: Dataset, tokenizer: PreTrainedTokenizerBase, copies: int, seed: int) -> Dataset:
    """Texts and, after them, copies of them in which each token is with a probability of 15 % another one of the texts.

    A teacher's answers to its own training texts say little but the labels; copies are other text for a student to
    follow it on (after the data augmentation of Tang et al., 1903.12136, who hide and exchange words). Tokens that the
    tokenizer calls special stay.

    Args:
        columns: of `tokenized`, with or without the column `labelled`; the copies have False there.
        copies: of each text.
        seed: of the tokens that are exchanged and of those in their place.
    """
    from datasets import concatenate_datasets

    pool = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in columns["input_ids"]])
    pool = pool[~np.isin(pool, tokenizer.all_special_ids)]
    with quiet_datasets():
        if "labelled" not in columns.column_names:
            columns = columns.add_column("labelled", [True] * len(columns))
        parts = [columns]
        for number in range(copies if len(pool) else 0):
            options = {"pool": pool, "special": tokenizer.all_special_ids, "seed": (seed, number)}
            parts.append(columns.map(_corrupted, batched=True, with_indices=True, fn_kwargs=options))
        return numbered(concatenate_datasets(parts))


def _corrupted(
    rows: dict[str, list[Any]], indices: list[int], pool: np.ndarray, special: list[int], seed: tuple[int, int]
) -> dict[str, list[Any]]:
    generator, made = np.random.default_rng([*seed, indices[0]]), []
    for ids in map(np.asarray, rows["input_ids"]):
        exchanged = (generator.random(len(ids)) < CORRUPTED) & ~np.isin(ids, special)
        made.append(np.where(exchanged, generator.choice(pool, len(ids)), ids).tolist())
    return {"input_ids": made, "labelled": [False] * len(made)}


def _check_labels(train: TokenizedSplit, name: str) -> None:
    if not train.task.has_label or train.text_to_text:
        got = "an encoder-decoder's" if train.text_to_text else f"a task of kind {train.task.kind}"
        raise UserError(f"{name}: expected it with classes or scores of whole texts, got {got}; leave it out")
