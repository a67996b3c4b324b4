"""Tasks and their data: all of GLUE, SQuAD v1.1 and v2, running text ("lm"), and any table with named columns.

A task says what its rows are; `load_task` reads them from local files or the Hub into `datasets.Dataset`s whose columns
are the same wherever they came from: the task's text columns, `label` (for questions `answers`, for running text none)
and `example_id`, the row's number in its split.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moebert_kernels.data.files import (
    Row,
    find_split_files,
    named_rows,
    peek,
    read_rows,
    read_text,
    require_columns,
    saved_splits,
    split_name,
)
from moebert_kernels.data.labels import class_names, label_text, score_of
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
        name, kind, tuple(text.split()), tuple(metrics.split()), tuple(labels.split()), ("glue", name), **options
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
        Task("squad", "qa", ("question", "context"), ("f1", "exact_match"), hub=("squad",)),
        Task("squad_v2", "qa", ("question", "context"), ("f1", "exact_match"), hub=("squad_v2",)),
        Task("lm", "lm", ("text",), ("perplexity", "loss")),
    )
}  # fmt: skip
_HUB_REPOSITORIES = {"glue": "nyu-mll/glue", "squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
_HUB_SPLITS = {"validation_matched": "validation", "test_matched": "test"}


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
            held = " or hold out training rows with --hold-out 0.1" * (name == "validation" and have == "train")
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
        lowered = [name.lower() for name in task.label_names]
        if sorted(lowered) == sorted(name.lower() for name in names):
            return [lowered.index(name.lower()) for name in names]
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
        UserError: no column of text, or more than two.
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
        file_split: the split that a single file is.

    Raises:
        UserError: unknown task, missing file or column, one file for two splits, a label that is missing or that the
            task does not have, a text that is none, an answer that is not where it should be, an unreachable dataset.

    Warns of empty texts.
    """
    task = get_task(task) if isinstance(task, str) else task
    saved = saved_splits(Path(data)) if isinstance(data, (str, Path)) else None
    files = None if saved is not None else _local_files(data, file_split)
    if files is None:
        name = task.hub if data is None else (str(data),)
        tables = _tables(task, *(_from_hub(task, name) if saved is None else (saved, str(data))))
    else:
        tables = {}
        for split, file in files.items():
            rows = _read(task, file, needs_label=task.has_label and split != "test")
            if not rows or not task.has_label or task.label_column in rows[0]:  # GLUE's own test files have no labels
                tables[split] = (rows, str(file))
    if task.kind == "classification" and not task.label_names:
        rows, where = tables.get("train") or next(iter(tables.values()))
        classes = class_names(task.label_column, [row[task.label_column] for row in rows], where)
        task = replace(task, label_names=classes)
    return TaskData(task, {split: _dataset(task, rows, where) for split, (rows, where) in tables.items()})


def _local_files(data: Any, file_split: str) -> dict[str, Path] | None:
    if data is None:
        return None
    if isinstance(data, Mapping):
        splits: dict[Path, str] = {}
        for split, file in data.items():
            other = splits.setdefault(Path(file).resolve(), split)
            if other != split:
                raise UserError(
                    f"data: expected different files for {other} and {split}, got {file} for both (--hold-out 0.1 takes"
                    " a tenth of the training rows for validation)"
                )
        return {split: Path(file) for split, file in data.items()}
    path = Path(data)
    if path.is_dir():
        return find_split_files(path)
    if path.exists():
        return {file_split: path}
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(data)) and not path.suffix:
        return None  # the form of a name on the Hub
    raise UserError(f"data: expected a file or a folder, got {data}, which does not exist")


def _read(task: Task, file: Path, needs_label: bool) -> list[Row]:
    """Rows of a file under the task's column names; `label` is missing where the file has none."""
    if not file.exists():
        raise UserError(f"data: expected a file, got {file}, which does not exist")
    if task.kind == "lm" and split_name(file)[1] == ".txt":
        text = read_text(file)
        return [{task.text_columns[0]: text}] if text else _no_rows(file)
    if task.kind == "qa":
        rows, _ = read_rows(file)
        return [_question(task, row, f"{file}, row {n}") for n, row in enumerate(rows, 1)] or _no_rows(file)
    wanted = {name: (task.file_columns.get(name, name), name) for name in task.text_columns}
    first = peek(file)
    header = [name.strip() for name in first[0]] if first else []
    headed = all(any(name in header for name in names) for names in wanted.values())
    widths = Counter(len(fields) for fields in first)  # one line may be damaged, the first one too
    columns = None if headed or not first else task.without_header.get(widths.most_common(1)[0][0])
    rows, found = read_rows(file, columns)
    if not rows:
        return _no_rows(file)
    hint = "; --{0}-column, or custom_task, names another" if task.name == "custom" else ""
    chosen = require_columns(found, wanted, str(file), hint.format("text"))
    labels = (task.file_columns.get("label", task.label_column), task.label_column)
    if needs_label or not set(labels).isdisjoint(found):
        chosen |= require_columns(found, {task.label_column: labels}, str(file), hint.format("label"))
    for number, row in enumerate(rows, 1):
        missing = [theirs for theirs in chosen.values() if theirs not in row]
        if missing:
            raise UserError(f"data: expected a column {missing[0]} in each row of {file}, got none in row {number}")
    return [{ours: row[theirs] for ours, theirs in chosen.items()} for row in rows]


def _no_rows(file: Path) -> list[Row]:
    raise UserError(f"data: expected rows in {file}, got none")


def _question(task: Task, row: Row, where: str) -> Row:
    missing = [name for name in ("question", "context", "answers") if name not in row]
    if missing:
        raise UserError(f"data: expected a column {missing[0]} in {where}, got {', '.join(sorted(row))}")
    context, answers = row["context"], row["answers"]
    held: dict[str, Any] = answers if isinstance(answers, dict) else {}
    texts, starts = held.get("text", ()), held.get("answer_start", ())
    if not _are(str, texts) or not _are(int, starts) or len(texts) != len(starts):
        raise UserError(f"data: expected answers with as many text as answer_start in {where}, got {answers!r}"[:300])
    if not texts and task.name == "squad":
        raise UserError(f"answers: expected one in {where}, got none (--task squad_v2 has questions without answers)")
    if texts and isinstance(context, str):  # a context that is no text is named later
        text, start = texts[0], starts[0]
        if context[start : start + len(text)] != text:
            raise UserError(f"answers: expected {text!r} at character {start} of the context in {where}, got another")
    return {"question": row["question"], "context": context, "answers": answers}


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _class_number(task: Task, value: Any, numbers: Mapping[str, int]) -> int | None:
    """The class of a label given by name or, as GLUE's own files do, by number."""
    name = label_text(value)
    if name in numbers:
        return numbers[name]
    if name is None or task.name not in TASKS:  # the names of a table's own classes may be numbers themselves
        return None
    try:
        number = int(name)
    except ValueError:
        return None
    return number if 0 <= number < len(task.label_names) else None


def _dataset(task: Task, rows: list[Row], where: str) -> Dataset:
    from datasets import Dataset

    columns: dict[str, list[Any]] = {}
    for name in task.text_columns:
        columns[name] = [row[name] for row in rows]
        empty = []
        for number, text in enumerate(columns[name], 1):
            if not isinstance(text, str):
                raise UserError(f"{name}: expected text in {where}, row {number}, got {text!r}")
            if not text.strip():
                empty.append(number)
        if empty and task.kind != "lm":
            warnings.warn(f"{name}: {len(empty)} rows of {where} are empty, the first is row {empty[0]}", stacklevel=3)
    if task.kind == "qa":
        columns["answers"] = [row["answers"] for row in rows]
    elif task.has_label:
        numbers = {name: number for number, name in enumerate(task.label_names)}
        columns["label"] = []
        for number, row in enumerate(rows, 1):
            value = row[task.label_column]
            label = score_of(value) if task.kind == "regression" else _class_number(task, value, numbers)
            if label is None:
                more = f" and {len(task.label_names) - _NAMED} more" * (len(task.label_names) > _NAMED)
                wanted = f"one of {', '.join(task.label_names[:_NAMED])}{more}" if task.label_names else "a number"
                raise UserError(
                    f"{task.label_column}: expected {wanted} in {where}, row {number}, got {row[task.label_column]!r}"
                )
            columns["label"].append(label)
    columns["example_id"] = list(range(len(rows)))
    return Dataset.from_dict(columns)


def _from_hub(task: Task, name: tuple[str, ...]) -> tuple[Any, str]:
    from datasets import load_dataset

    if not name:
        raise UserError(f"data: expected a file, a folder or a dataset's name for task {task.name}, got none")
    repository = (_HUB_REPOSITORIES.get(name[0], name[0]), *name[1:])
    where = f"dataset {'/'.join(repository)}"
    try:
        loaded = load_dataset(*repository)
    except Exception as error:  # datasets raises many kinds: no such dataset, no network, an unknown format
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"data: expected a local path or a reachable {where}, got {reason}"[:400]) from None
    return loaded, where


def _tables(task: Task, loaded: Mapping[str, Dataset], where: str) -> dict[str, tuple[list[Row], str]]:
    """The splits of a data set of `datasets` as rows of the task, and what to call each."""
    tables = {}
    for split, data in loaded.items():
        label = [task.label_column] if task.has_label else []
        wanted = [*task.text_columns, *(["answers"] if task.kind == "qa" else label)]
        require_columns(data.column_names, {column: (column,) for column in wanted}, where)
        rows = named_rows(data.select_columns(wanted))
        if label and any(row[label[0]] in (None, -1) for row in rows[:1]):
            continue  # the Hub's copies of test sets without labels have -1
        tables[_HUB_SPLITS.get(split, split)] = (rows, f"{where}, {split}")
    return tables
