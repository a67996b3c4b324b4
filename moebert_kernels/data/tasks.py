"""Tasks and their data: all of GLUE, SQuAD v1.1 and v2, running text ("lm"), and any table with named columns.

A task says what its rows are; `load_task` reads them from local files or the Hub into `datasets.Dataset`s whose columns
are the same wherever they came from: the task's text columns, `label` (for questions `answers`, for running text none)
and `example_id`, the row's number in its split.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moebert_kernels.data.files import Columns, require_columns
from moebert_kernels.data.labels import all_missing, class_finder, class_names, label_text, score_of
from moebert_kernels.data.sources import sources, wanted_columns
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["classification", "regression", "qa", "lm"]

LOWER_IS_BETTER = ("perplexity", "loss")
SPLIT_WORDS = {"train": "training"}  # what a person calls the rows of a split
_NAMED = 20  # classes that a message names


@dataclass(frozen=True)
class Task:
    """What the rows of a task are, and how predictions on them are judged."""

    name: str
    kind: Kind
    text_columns: tuple[str, ...]  # one or two; for questions always ("question", "context"), for running text one
    metrics: tuple[str, ...]
    label_names: tuple[str, ...] = ()  # by class number; empty: taken from the data
    hub: tuple[str, ...] = ()  # arguments of datasets.load_dataset
    label_column: str = "label"
    file_columns: Mapping[str, str] = field(default_factory=dict)  # ours -> the name in the task's own files
    # Columns by position, for files without a header line: number of fields -> name of each, "" where it is not used.
    without_header: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    unnamed_classes: int = 0  # of a model that names none: labels that are whole numbers below this are their numbers

    def __post_init__(self) -> None:
        if taken := [name for name in self.text_columns if name in ("label", "example_id")]:
            raise UserError(f"text_columns: expected other names than label and example_id, got {taken[0]}; rename it")

    @property
    def main_metric(self) -> str:
        """The metric that says which checkpoint is best."""
        return self.metrics[0]

    @property
    def greater_is_better(self) -> bool:
        return self.main_metric not in LOWER_IS_BETTER

    @property
    def has_label(self) -> bool:
        """Whether rows have one class or score each, in the column `label`."""
        return self.kind in ("classification", "regression")

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head."""
        return {"classification": len(self.label_names), "regression": 1, "qa": 2, "lm": 0}[self.kind]


def _glue(name: str, text: str, metrics: str, labels: str = "", **options: Any) -> Task:
    kind: Kind = "classification" if labels else "regression"
    return Task(
        name,
        kind,
        tuple(text.split()),
        tuple(metrics.split()),
        tuple(labels.split()),
        ("nyu-mll/glue", name),
        **options,
    )


_ENTAILMENT = "entailment not_entailment"
_PAIR = "sentence1 sentence2"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", "sentence", "matthews accuracy", "unacceptable acceptable",
              without_header={4: ("", "label", "", "sentence")}),
        _glue("sst2", "sentence", "accuracy", "negative positive"),
        _glue("mrpc", _PAIR, "f1 accuracy", "not_equivalent equivalent",
              file_columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}),
        _glue("qqp", "question1 question2", "f1 accuracy", "not_duplicate duplicate",
              file_columns={"label": "is_duplicate"},
              without_header={6: ("", "", "", "question1", "question2", "label")}),
        _glue("stsb", _PAIR, "spearman pearson", file_columns={"label": "score"}),
        _glue("mnli", "premise hypothesis", "accuracy", "entailment neutral contradiction",
              file_columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
              without_header={3: ("label", "premise", "hypothesis")}),
        _glue("qnli", "question sentence", "accuracy", _ENTAILMENT),
        _glue("rte", _PAIR, "accuracy", _ENTAILMENT),
        _glue("wnli", _PAIR, "accuracy", "not_entailment entailment"),
        Task("squad", "qa", ("question", "context"), ("f1", "exact_match"), hub=("rajpurkar/squad",)),
        Task("squad_v2", "qa", ("question", "context"), ("f1", "exact_match"), hub=("rajpurkar/squad_v2",)),
        Task("lm", "lm", ("text",), ("perplexity", "loss")),
    )
}  # fmt: skip


@dataclass(frozen=True)
class TaskData:
    """A task and its splits, as far as there are any: train, validation, test, and MNLI's validation_mismatched."""

    task: Task
    splits: dict[str, Dataset]

    @property
    def train(self) -> Dataset:
        return self.split("train")

    @property
    def validation(self) -> Dataset:
        return self.split("validation")

    def split(self, name: str) -> Dataset:
        """A split by name.

        Raises:
            UserError: the data has none of that name.
        """
        if name not in self.splits:
            have = ", ".join(self.splits) or "none"
            held = " or hold out training rows with --hold-out 0.1" * (name == "validation" and "train" in self.splits)
            raise UserError(f"data: expected a {name} split, got {have}; name a file with {name}=FILE{held}")
        return self.splits[name]

    def with_label_order(self, names: Sequence[str]) -> TaskData:
        """The same data with classes numbered as `names`, a model's, are; see `label_order`."""
        order = label_order(self.task, names)
        if order == list(range(len(order))):
            return self
        renumber = {old: new for new, old in enumerate(order)}
        splits = {
            split: data.map(lambda row: {"label": renumber[row["label"]]}, load_from_cache_file=False)
            for split, data in self.splits.items()
        }
        return TaskData(replace(self.task, label_names=tuple(names)), splits)


def label_order(task: Task, names: Sequence[str]) -> list[int]:
    """For each class of a model, the number that the task gives it.

    Names that a model got by default (LABEL_0, ...) say nothing, and so keep the task's order.

    Raises:
        UserError: the model has other classes than the task.
    """
    if task.kind != "classification":
        return list(range(task.num_labels))
    if len(names) == len(task.label_names):
        if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
            return list(range(len(names)))
        order = [*map(class_finder(task.label_names), names)]
        if {*order} == {*range(len(names))}:
            return [number for number in order if number is not None]
    raise UserError(
        f"labels: expected the model's {len(names)} ({', '.join(names)}), got {len(task.label_names)} in task"
        f" {task.name} ({', '.join(task.label_names)})"
    )


def custom_task(
    text_columns: Sequence[str],
    label_column: str = "label",
    *,
    regression: bool = False,
    label_names: Sequence[str] = (),
) -> Task:
    """A task on a table of one's own, with one or two columns of text.

    `label_names` () takes the classes of the training split, in the order of their sorted names.

    Raises:
        UserError: no column of text, more than two, or one with a name that the data has for other things.
    """
    if len(text_columns) not in (1, 2):
        raise UserError(f"text_columns: expected one or two names, got {len(text_columns)}")
    kind: Kind = "regression" if regression else "classification"
    metrics = ("spearman", "pearson") if regression else ("accuracy", "macro_f1")
    return Task("custom", kind, tuple(text_columns), metrics, tuple(label_names), label_column=label_column)


def get_task(name: str) -> Task:
    """A task by its name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)} or custom, got {name!r}")
    return TASKS[name]


def load_task(
    task: Task | str, data: str | Path | Mapping[str, str | Path] | None = None, *, file_split: str = "train"
) -> TaskData:
    """Read a task's data.

    Args:
        task: a `Task`, or the name of one in `TASKS`.
        data: a folder with the task's files or one that `datasets`' `save_to_disk` wrote, one file, files by split, or
            the name of a dataset on the Hub. None: the task's own dataset on the Hub.
        file_split: the split that a single file, or a saved data set without splits, is.

    Raises:
        UserError: unknown task, missing file or column, one file for two splits, a label that is missing or that the
            task does not have, a text that is none, an answer that is not where it should be, an unreachable dataset.

    Warns of empty texts.
    """
    task = get_task(task) if isinstance(task, str) else task
    tables: dict[str, tuple[Columns, str]] = {}
    for split, columns, where in sources(task, data, file_split):
        if not any(len(values) for values in columns.values()):
            raise UserError(f"data: expected rows in {where}, got none")
        hint = "; --{0}-column, or custom_task, names another" if task.name == "custom" else ""
        chosen = require_columns(columns, wanted_columns(task), where, hint.format("text"))
        if task.has_label:
            names = (task.file_columns.get("label", task.label_column), task.label_column)
            if split == "test" and not set(names) & {*columns}:
                continue  # GLUE's own test files have no labels
            chosen |= require_columns(columns, {"label": names}, where, hint.format("label"))
        tables[split] = ({ours: columns[theirs][:] for ours, theirs in chosen.items()}, where)
    if task.kind == "classification" and not task.label_names and tables:
        columns, where = tables.get("train") or next(iter(tables.values()))
        classes = class_names(task.label_column, columns["label"], where)
        numbers = tuple(map(str, range(task.unnamed_classes)))
        task = replace(task, label_names=numbers if {*classes} <= {*numbers} else classes)
    if task.has_label and "test" in tables and all_missing(tables["test"][0]["label"], task.label_names):
        del tables["test"]
    return TaskData(task, {split: _dataset(task, columns, where) for split, (columns, where) in tables.items()})


def _check_answers(task: Task, contexts: Sequence[str], answers: Sequence[Any], where: str) -> None:
    for row, (context, given) in enumerate(zip(contexts, answers, strict=True), 1):
        held = given if isinstance(given, dict) else {}
        texts, starts = held.get("text"), held.get("answer_start")
        if not _are(str, texts) or not _are(int, starts) or len(texts) != len(starts):
            raise UserError(
                f"data: expected answers with as many text as answer_start in {where}, row {row}, got {given!r}"[:300]
            )
        if not texts and task.name == "squad":
            raise UserError(
                f"answers: expected one in {where}, row {row}, got none (--task squad_v2 has questions without answers)"
            )
        if texts and context[starts[0] : starts[0] + len(texts[0])] != texts[0]:
            raise UserError(
                f"answers: expected {texts[0]!r} at character {starts[0]} of the context in {where}, row {row}, got"
                " another"
            )


def _are(kind: type, values: Any) -> Any:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _class_number(task: Task, value: Any, find: Callable[[str], int | None]) -> int | None:
    """The class of a label given by name or, as GLUE's own files do, by number."""
    name = label_text(value)
    known = None if name is None else find(name)
    # the names of a table's own classes may be numbers themselves
    if name is None or known is not None or task.name not in TASKS:
        return known
    try:
        number = int(name)
    except ValueError:
        return None
    return number if 0 <= number < len(task.label_names) else None


def _dataset(task: Task, given: Columns, where: str) -> Dataset:
    from datasets import Dataset

    columns = {name: list(values) for name, values in given.items()}
    rows = len(columns[task.text_columns[0]])
    for name in task.text_columns:
        for number, text in enumerate(columns[name], 1):
            if not isinstance(text, str):
                raise UserError(f"{name}: expected text in {where}, row {number}, got {text!r}")
        empty = [number for number, text in enumerate(columns[name], 1) if not text.strip()]
        if empty and task.kind != "lm":
            warnings.warn(f"{name}: {len(empty)} rows of {where} are empty, the first is row {empty[0]}", stacklevel=3)
    if task.kind == "qa":
        _check_answers(task, columns["context"], columns["answers"], where)
    elif task.has_label:
        find = class_finder(task.label_names)
        for row, value in enumerate(columns["label"]):
            label = score_of(value) if task.kind == "regression" else _class_number(task, value, find)
            if label is None:
                more = f" and {len(task.label_names) - _NAMED} more" * (len(task.label_names) > _NAMED)
                wanted = f"one of {', '.join(task.label_names[:_NAMED])}{more}" if task.label_names else "a number"
                raise UserError(f"{task.label_column}: expected {wanted} in {where}, row {row + 1}, got {value!r}")
            columns["label"][row] = label
    return Dataset.from_dict(columns | {"example_id": list(range(rows))})
