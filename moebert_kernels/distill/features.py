"""Token ids of a split, and its batches: of similar lengths, padded to the longest, in a seeded order.

Sentences of one length waste no padding. The order is shuffled, cut into pools of `POOL` batches, and each pool is
sorted by length before it is cut into batches, which are shuffled again: batches stay random, and an epoch has always
the same number of them. Nothing but (seed, epoch) decides the order: a resumed run meets the batches it would have met.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moebert_kernels.data.metrics import Window
from moebert_kernels.data.tasks import Task
from moebert_kernels.distill.config import Batch
from moebert_kernels.distill.objectives import IGNORED
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

POOL = 50
_CHUNK = 2000  # rows tokenised at once; bounds memory


@dataclass
class Features:
    """What a model is fed for a split, in the order of its rows.

    `example_ids` (N,) int64 are 0..N-1: a row's number in its split or, for questions, a window's. `cut` counts the
    texts that were longer than the model is fed, `longest` are the tokens of the longest of these.
    """

    input_ids: list[np.ndarray]  # N of (tokens,) int32
    targets: dict[str, np.ndarray]  # by the name of the model's argument, each (N,)
    padding_id: int
    token_type_ids: list[np.ndarray] | None = None
    windows: list[Window] | None = None  # questions only
    token_targets: dict[str, list[np.ndarray]] = field(default_factory=dict)  # each N of (target tokens,) int32
    cut: int = 0
    longest: int = 0
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        targets = [*self.targets.values(), *(array for arrays in self.token_targets.values() for array in arrays)]
        for arrays in (self.input_ids, self.token_type_ids or [], targets):
            digest.update(np.array([len(array) for array in arrays], dtype=np.int64).tobytes())
            digest.update(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
        self.fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)

    def collate(self, indices: Sequence[int] | np.ndarray, pad_to: int | None = None) -> Batch:
        """A batch of the examples: int64 (B, T) ids and mask, T the longest of them, or `pad_to`.

        Targets by token are padded with -100 to the longest of their own.
        """
        width = max((len(self.input_ids[i]) for i in indices), default=0)
        width = max(width, pad_to or 0)
        batch: dict[str, Tensor] = {
            "input_ids": self._padded(self.input_ids, indices, width, self.padding_id),
            "attention_mask": torch.zeros(len(indices), width, dtype=torch.int64),
            "example_id": torch.as_tensor(np.asarray(indices, dtype=np.int64)),
        }
        for row, index in enumerate(indices):
            batch["attention_mask"][row, : len(self.input_ids[index])] = 1
        if self.token_type_ids is not None:
            batch["token_type_ids"] = self._padded(self.token_type_ids, indices, width, 0)
        for name, values in self.targets.items():
            batch[name] = torch.as_tensor(values[np.asarray(indices, dtype=np.int64)])
        for name, arrays in self.token_targets.items():
            width = max((len(arrays[i]) for i in indices), default=0)
            batch[name] = self._padded(arrays, indices, width, IGNORED)
        return batch

    @staticmethod
    def _padded(arrays: list[np.ndarray], indices: Sequence[int] | np.ndarray, width: int, padding: int) -> Tensor:
        rows = np.full((len(indices), width), padding, dtype=np.int64)
        for row, index in enumerate(indices):
            rows[row, : len(arrays[index])] = arrays[index]
        return torch.from_numpy(rows)


class Batches:
    """Training batches: `batches(epoch)` iterates that epoch's, `len(batches)` says how many each has.

    Args:
        features: of the training split.
        batch_size: sequences in a batch; the last one of an epoch may have fewer.
        seed: with the epoch, decides the order.
        bucket: False takes the shuffled order as it is, as the published recipe does.
        pad_to: pad every batch to this length. None: to its longest sequence.
    """

    def __init__(
        self, features: Features, batch_size: int, seed: int = 0, *, bucket: bool = True, pad_to: int | None = None
    ):
        if not len(features):
            raise UserError("data: expected at least one training example, got none")
        if batch_size < 1:
            raise UserError(f"batch_size: expected at least 1, got {batch_size}")
        self.features, self.batch_size, self.seed, self.bucket, self.pad_to = features, batch_size, seed, bucket, pad_to

    @property
    def fingerprint(self) -> str:
        """Names the data and everything that its order depends on."""
        return f"{self.features.fingerprint}-{self.batch_size}-{self.seed}-{self.bucket}-{self.pad_to}"

    def __len__(self) -> int:
        return -(-len(self.features) // self.batch_size)

    def order(self, epoch: int) -> list[np.ndarray]:
        """The examples of each batch of an epoch."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.features))
        size = self.batch_size
        if not self.bucket:
            return [order[start : start + size] for start in range(0, len(order), size)]
        lengths = self.features.lengths
        batches = []
        for start in range(0, len(order), POOL * size):
            pool = order[start : start + POOL * size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def __call__(self, epoch: int) -> Iterator[Batch]:
        for indices in self.order(epoch):
            yield self.features.collate(indices, self.pad_to)


def ordered_batches(features: Features, batch_size: int, pad_to: int | None = None) -> list[np.ndarray]:
    """Batches for evaluation: every example once, the longest first (memory runs out at the start or not at all)."""
    order = np.argsort(-features.lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def tokenize(
    data: Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    doc_stride: int = 128,
    progress: bool = False,
) -> Features:
    """Features of a split.

    Args:
        max_length: longer texts are cut; contexts of questions are split into overlapping windows instead. None: 384
            for questions, 128 for the others.
        doc_stride: tokens that neighbouring windows share.
        progress: show a bar.

    Raises:
        UserError: questions too long for the windows, or a tokenizer that gives no character positions.
    """
    from tqdm import tqdm

    max_length = max_length or (384 if task.kind == "qa" else 128)
    chunks = tqdm(range(0, len(data), _CHUNK), desc="tokenizing", disable=not progress, leave=False)
    parts = (data[start : start + _CHUNK] | {"first_row": start} for start in chunks)
    if task.kind == "qa":
        return _question_features(parts, tokenizer, max_length, doc_stride)
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    whole: list[int] = []
    for part in parts:
        texts = [part[name] for name in task.text_columns]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        whole += cut_lengths(tokenizer, texts, encoded["input_ids"], max_length)
        ids += _arrays(encoded["input_ids"])
        types += _arrays(encoded.get("token_type_ids", []))
    dtype = np.float32 if task.kind == "regression" else np.int64
    targets = {"labels": np.array(data["label"], dtype=dtype)}
    return Features(
        ids, targets, _padding_id(tokenizer), types or None, cut=len(whole), longest=max(whole, default=0)
    )  # fmt: skip


def cut_lengths(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], ids: Sequence[Sequence[int]], max_length: int
) -> list[int]:
    """The whole lengths, in tokens, of those texts that were cut.

    Args:
        texts: one or two columns of N texts.
        ids: N of token ids, cut at `max_length`.
    """
    full = [row for row, tokens in enumerate(ids) if len(tokens) >= max_length]  # the others are whole
    if not full:
        return []
    encoded = tokenizer(*([column[row] for row in full] for column in texts), verbose=False)
    return [length for tokens in encoded["input_ids"] if (length := len(tokens)) > max_length]


def _arrays(rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int32) for row in rows]


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise UserError("tokenizer: expected one with a padding token, got none")
    return int(tokenizer.pad_token_id)


def _question_features(
    parts: Iterator[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
) -> Features:
    if not tokenizer.is_fast:
        raise UserError("tokenizer: expected a fast one, which knows characters' positions, got a slow one")
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    windows: list[Window] = []
    starts: list[int] = []
    ends: list[int] = []
    for part in parts:
        questions = [question.strip() for question in part["question"]]
        _check_question_lengths(tokenizer, questions, max_length, doc_stride)
        encoded = tokenizer(
            questions,
            part["context"],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        ids += _arrays(encoded["input_ids"])
        types += _arrays(encoded.get("token_type_ids", []))
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            in_context = np.array([part_id == 1 for part_id in encoded.sequence_ids(window)])
            offsets = np.array(encoded["offset_mapping"][window], dtype=np.int32)
            offsets[~in_context] = -1
            windows.append(Window(part["first_row"] + row, offsets))
            start, end = _answer_tokens(part["answers"][row], offsets)
            no_answer = _no_answer_position(tokenizer, encoded["input_ids"][window])
            starts.append(no_answer if start is None else start)
            ends.append(no_answer if end is None else end)
    targets = {"start_positions": np.array(starts, dtype=np.int64), "end_positions": np.array(ends, dtype=np.int64)}
    return Features(ids, targets, _padding_id(tokenizer), types or None, windows)


def _check_question_lengths(
    tokenizer: PreTrainedTokenizerBase, questions: list[str], max_length: int, doc_stride: int
) -> None:
    longest = max(len(row) for row in tokenizer(questions, add_special_tokens=False)["input_ids"])
    room = max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= doc_stride:
        raise UserError(
            f"max_length: expected more than {max_length - room + doc_stride} for questions of up to {longest} tokens"
            f" and doc_stride {doc_stride}, got {max_length}"
        )


def _no_answer_position(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Where a window without the answer points: the first special token, [CLS]."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def _answer_tokens(answers: dict[str, Any], offsets: np.ndarray) -> tuple[int | None, int | None]:
    """First and last token of the first answer, if this window holds all of it."""
    if not answers["text"]:
        return None, None
    first = answers["answer_start"][0]
    last = first + len(answers["text"][0])  # one past it
    inside = (offsets[:, 0] >= 0) & (offsets[:, 0] < last) & (offsets[:, 1] > first)
    tokens = np.flatnonzero(inside)
    context = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(tokens) or offsets[context[0], 0] > first or offsets[context[-1], 1] < last:
        return None, None
    return int(tokens[0]), int(tokens[-1])
