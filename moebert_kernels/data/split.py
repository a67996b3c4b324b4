"""A split as a model reads it: its rows, their tokens as columns, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from moebert_kernels.data.columns import WINDOW, collator, tokenized
from moebert_kernels.data.files import quiet_datasets
from moebert_kernels.data.tasks import Task
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]


class TokenizedSplit:
    """The rows of a split and their tokens, in the same order; of questions and running text, several windows of a row.

    Args:
        rows: with the task's columns, as `load_task` gives them.
        tokenizer: the model's.
        max_length, doc_stride, text_to_text: see `tokenized`.
        pad_to: pad batches to this length, for a model that routes padding as published. None: to their longest text.

    Raises:
        UserError: as `tokenized`; no tokens to train or judge on, a tokenizer without a padding token, or a task that a
            text-to-text model cannot answer.
    """

    def __init__(
        self,
        rows: Dataset,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        doc_stride: int | None = None,
        text_to_text: bool = False,
        pad_to: int | None = None,
    ) -> None:
        if text_to_text and not task.has_label:
            raise UserError(f"task: expected classification or regression for a text-to-text model, got {task.name}")
        if tokenizer.pad_token_id is None and task.kind != "lm":
            raise UserError("tokenizer: expected one with a padding token, got none")
        self.rows, self.task, self.tokenizer, self.max_length = rows, task, tokenizer, max_length
        self.text_to_text, self.pad_to = text_to_text, pad_to
        options: dict[str, Any] = {"max_length": max_length, "doc_stride": doc_stride, "text_to_text": text_to_text}
        with quiet_datasets():
            self.columns: Dataset = tokenized(rows, task, tokenizer, **options)
        if not len(self.columns):
            least = "text of at least two tokens" if task.kind == "lm" else "at least one row"
            raise UserError(f"data: expected {least}, got none")
        self.collator = collator(task, tokenizer, text_to_text=text_to_text, pad_to=pad_to)

    def __len__(self) -> int:
        return len(self.columns)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each text or window."""
        return np.array(self.columns["length"], dtype=np.int64)

    @cached_property
    def model_columns(self) -> Dataset:
        """The columns without those that no model reads."""
        unread = [name for name in ("length", *WINDOW) if name in self.columns.column_names]
        return self.columns.remove_columns(unread)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that name the tokens, the labels and how they are padded."""
        digest = sha256(repr((self.task.kind, self.pad_to)).encode())
        for name in sorted(self.model_columns.column_names):
            digest.update(name.encode())
            for part in self.model_columns.select_columns(name).iter(1000):
                digest.update(repr(part[name]).encode())
        return digest.hexdigest()[:32]

    def collate(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """A batch of these texts: (B, T) int64 ids and mask, labels, and of rows with labels their `example_id`."""
        return dict(self.collator([self.model_columns[int(index)] for index in indices]))

    def batches(self, size: int) -> Any:
        """All texts in batches, the longest first: memory runs out at the start or not at all."""
        rows: Any = range(len(self))
        groups: Any = self.by_length(size)
        seeded = torch.Generator()  # a loader draws a seed that it has no use for
        return DataLoader(rows, batch_sampler=groups, collate_fn=self.collate, generator=seeded)

    def by_length(self, size: int) -> list[np.ndarray]:
        """The texts of each of these batches."""
        order = np.argsort(-self.lengths, kind="stable")
        return [order[start : start + size] for start in range(0, len(order), size)]

    def cut(self) -> int:
        """How many texts were cut, or just fit."""
        return 0 if self.task.kind in ("qa", "lm") else int((self.lengths >= self.max_length).sum())
