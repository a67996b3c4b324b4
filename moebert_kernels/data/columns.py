"""What a model is fed, as columns of a data set: tokenised by `map`, batched by `Trainer`'s samplers and collators.

A function of a batch of rows makes the columns, so that data which streams (`IterableDataset`) is tokenised as it
comes, and what does not is kept in `datasets`' cache. `length` is there for samplers that group by length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from moebert_kernels.data.tasks import Task
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Mapping[str, list[Any]]
IGNORED = -100  # as in moebert_kernels.convert, which takes seconds to import
WINDOW = ("offset_mapping", "row")  # of questions: the characters of each token in the context, and the window's row


def tokenized(
    data: Any,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 128,
    doc_stride: int | None = None,
    text_to_text: bool = False,
) -> Any:
    """A split as columns of tokens: `input_ids`, `attention_mask`, what else the model takes, its labels, `length`.

    Rows of classes and scores keep their number, `example_id`. A question with a long context becomes several windows,
    with `start_positions`, `end_positions` (0 where a window does not have the answer) and, for `answers_of`, the
    columns of WINDOW. Running text ("lm") becomes windows of `max_length` tokens, documents one after another, each
    behind a token that starts it where the tokenizer has one. Every token is a label once: one that two windows share
    is so in the earlier one, where it has the longer context. Each batch of the map ends with a shorter window.

    Args:
        data: a `datasets` split with the task's columns, as `load_task` gives it, or one that streams. Without a column
            `label` there are no `labels`: text to follow a teacher on.
        max_length: tokens at most; longer texts are cut, contexts of questions divided.
        doc_stride: tokens that two windows of a context or of running text share. None: 128 for questions, 1 for text.
        text_to_text: inputs and labels of an encoder-decoder: "NAME sentence1: ... sentence2: ..." and the number of
            the class or the score.

    Raises:
        UserError: a tokenizer that cannot do what the task needs.
    """
    if task.kind == "qa" and not tokenizer.is_fast:
        raise UserError("tokenizer: expected a fast one, which knows characters' positions, got a slow one")
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_length": max_length}
    made: Callable[..., Any]
    if text_to_text:
        made, options = _text_to_text, options | {"task": task}
    elif task.kind == "qa":
        made, options = _questions, options | {"doc_stride": 128 if doc_stride is None else doc_stride}
    elif task.kind == "lm":
        overlap = 1 if doc_stride is None else doc_stride
        if not 1 <= overlap < max_length:
            raise UserError(
                f"doc_stride: expected between 1 and {max_length - 1} tokens in windows of {max_length}, got {overlap}"
            )
        made, options = _running_text, options | {"column": task.text_columns[0], "overlap": overlap}
    else:
        made, options = _sentences, options | {"columns": task.text_columns, "scores": task.kind == "regression"}
    rows_change = task.kind in ("qa", "lm")
    if data.column_names is None and rows_change:  # a stream whose rows nobody has looked at
        data = data._resolve_features()
    dropped = [name for name in data.column_names or () if name != "example_id" or rows_change]
    return data.map(made, batched=True, fn_kwargs=options, remove_columns=dropped, with_indices=task.kind == "qa")


def collator(
    task: Task, tokenizer: PreTrainedTokenizerBase, *, text_to_text: bool = False, pad_to: int | None = None
) -> Any:
    """What makes batches of these columns: padded to the longest text or to `pad_to`, labels by token with -100."""
    if text_to_text:
        return DataCollatorForSeq2Seq(tokenizer)
    if task.kind == "qa" and tokenizer.padding_side != "right":  # which would shift the answers' positions
        tokenizer = copy.deepcopy(tokenizer)  # it is saved with the model as it is
        tokenizer.padding_side = "right"
    if task.kind == "lm":
        return _LanguageModelCollator(tokenizer)
    if pad_to is not None:
        return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=pad_to)
    return DataCollatorWithPadding(tokenizer)


class _LanguageModelCollator(DataCollatorForTokenClassification):
    """Pads labels with -100, and takes the token that ends a text where the tokenizer has none for padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.pad_token_id is None:
            tokenizer = copy.deepcopy(tokenizer)  # which is saved with the model as it is
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # masked wherever it stands
        super().__init__(tokenizer)


def _sentences(
    rows: Rows, tokenizer: Any, max_length: int, columns: tuple[str, ...], scores: bool
) -> dict[str, list[Any]]:
    made = dict(tokenizer(*(rows[name] for name in columns), truncation=True, max_length=max_length))
    if "label" in rows:
        made["labels"] = [float(label) if scores else label for label in rows["label"]]
    return made | {"length": [len(ids) for ids in made["input_ids"]]}


def _text_to_text(rows: Rows, tokenizer: Any, max_length: int, task: Task) -> dict[str, list[Any]]:
    count = len(rows[task.text_columns[0]])
    texts = [
        " ".join([task.name, *(f"{column}: {rows[column][n]}" for column in task.text_columns)]) for n in range(count)
    ]
    made = dict(tokenizer(texts, truncation=True, max_length=max_length))
    if "label" in rows:
        made["labels"] = tokenizer([target_text(task, label) for label in rows["label"]])["input_ids"]
    return made | {"length": [len(ids) for ids in made["input_ids"]]}


def target_text(task: Task, label: float) -> str:
    """The answer to a row as text: its class's number, or its score rounded to 0.2, as T5 (1910.10683) has STS-B."""
    return f"{round(label * 5) / 5:.1f}" if task.kind == "regression" else str(label)


def _running_text(rows: Rows, tokenizer: Any, max_length: int, column: str, overlap: int) -> dict[str, list[Any]]:
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    stream: list[int] = []
    for document in rows[column]:
        lines = document.splitlines(keepends=True)
        ids = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"] if lines else []
        stream.extend(chain([] if start is None else [start], chain.from_iterable(ids)))
    made: dict[str, list[Any]] = {name: [] for name in ("input_ids", "attention_mask", "labels", "length")}
    for first in range(0, max(len(stream) - overlap, 1), max_length - overlap):
        window, known = stream[first : first + max_length], overlap if first else 0
        if len(window) > 1:
            made["input_ids"].append(window)
            made["attention_mask"].append([1] * len(window))
            made["labels"].append([IGNORED] * known + window[known:])
            made["length"].append(len(window))
    return made


def _questions(
    rows: Rows, indices: list[int], tokenizer: Any, max_length: int, doc_stride: int
) -> dict[str, list[Any]]:
    questions = [question.strip() for question in rows["question"]]
    longest = max(len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"])
    least = longest + tokenizer.num_special_tokens_to_add(pair=True) + doc_stride
    if max_length <= least:
        raise UserError(
            f"max_length: expected more than {least} for questions of up to {longest} tokens and doc_stride"
            f" {doc_stride}, got {max_length}"
        )
    encoded = tokenizer(
        questions, rows["context"], truncation="only_second", max_length=max_length, stride=doc_stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    made = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    made |= {name: [] for name in ("start_positions", "end_positions", *WINDOW)}
    for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
        in_context = [part == 1 for part in encoded.sequence_ids(window)]
        offsets = encoded["offset_mapping"][window]
        offsets = [pair if inside else (-1, -1) for pair, inside in zip(offsets, in_context, strict=True)]
        start, end = _answer_tokens(rows["answers"][row], offsets)
        ids = made["input_ids"][window]
        nothing = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        made["start_positions"].append(nothing if start is None else start)
        made["end_positions"].append(nothing if end is None else end)
        made["offset_mapping"].append(offsets)
        made["row"].append(indices[row])
    return made | {"length": [len(ids) for ids in made["input_ids"]]}


def _answer_tokens(answers: Mapping[str, Any], offsets: list[tuple[int, int]]) -> tuple[int | None, int | None]:
    """First and last token of the first answer, if this window holds all of it."""
    if not answers["text"]:
        return None, None
    first = answers["answer_start"][0]
    last = first + len(answers["text"][0])  # one past it
    context = [n for n, (start, _) in enumerate(offsets) if start >= 0]
    tokens = [n for n in context if offsets[n][0] < last and offsets[n][1] > first]
    if not tokens or offsets[context[0]][0] > first or offsets[context[-1]][1] < last:
        return None, None
    return tokens[0], tokens[-1]
