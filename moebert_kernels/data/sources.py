"""Where the rows of a task come from: a file, files by split, a folder, a saved data set, or the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_kernels.data.files import (
    Columns,
    find_split_files,
    named_columns,
    read_columns,
    read_text,
    reading,
    split_name,
)
from moebert_kernels.data.labels import all_missing
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from moebert_kernels.data.tasks import Task

_HUB_SPLITS = {"validation_matched": "validation", "test_matched": "test"}


def wanted_columns(task: Task) -> dict[str, tuple[str, ...]]:
    """The columns that are read as they are, each with the names that it may have."""
    names = (*task.text_columns, *["answers"] * (task.kind == "qa"))
    return {name: (task.file_columns.get(name, name), name) for name in names}


def sources(task: Task, data: Any, file_split: str) -> Iterator[tuple[str, Columns, str]]:
    """Split, columns and where they are from."""
    path = Path(data) if isinstance(data, (str, Path)) else None
    if path is not None and any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        from datasets import Dataset, load_from_disk

        with reading(f"a whole saved data set in {path}"):
            loaded = load_from_disk(str(path))
        yield from _splits({file_split: loaded} if isinstance(loaded, Dataset) else loaded, task, str(path))
    elif path is not None and path.is_dir():
        yield from _files(find_split_files(path), task)
    elif path is not None and path.exists():
        yield from _files({file_split: path}, task)
    elif isinstance(data, Mapping):
        yield from _files(data, task)
    elif path is None or (re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(data)) and not path.suffix):
        from datasets import load_dataset

        if path is None and not task.hub:
            raise UserError(f"data: expected a file, a folder or a dataset's name for task {task.name}, got none")
        repository = task.hub if path is None else (str(data),)
        where = f"dataset {'/'.join(repository)}"
        with reading(f"a local path or a reachable {where}"):
            loaded = load_dataset(*repository)
        yield from _splits(loaded, task, where)
    else:
        raise UserError(f"data: expected a file or a folder, got {data}, which does not exist")


def _splits(loaded: Mapping[str, Dataset], task: Task, where: str) -> Iterator[tuple[str, Columns, str]]:
    for split, data in loaded.items():
        columns = named_columns(data)
        if not task.has_label or not all_missing(columns.get(task.label_column, ())):
            yield _HUB_SPLITS.get(split, split), columns, f"{where}, {split}"


def _files(files: Mapping[str, str | Path], task: Task) -> Iterator[tuple[str, Columns, str]]:
    splits: dict[Path, str] = {}
    for split, file in files.items():
        other = splits.setdefault(Path(file).resolve(), split)
        if other != split:
            raise UserError(
                f"data: expected different files for {other} and {split}, got {file} for both (--hold-out 0.1 takes"
                " a tenth of the training rows for validation)"
            )
        yield split, _read(task, Path(file)), str(file)


def _read(task: Task, file: Path) -> Columns:
    if task.kind == "lm" and split_name(file)[1] == ".txt":
        text = read_text(file)
        return {task.text_columns[0]: [text] * bool(text)}
    wanted = wanted_columns(task).values()
    return read_columns(file, lambda names: all(any(n in names for n in of) for of in wanted), task.without_header)
