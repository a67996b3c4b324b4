"""Rows of local data files: csv, tsv, jsonl and SQuAD's json, plain or gzipped, parquet, arrow; found by their names.

A reader gives plain dicts and does not know about tasks. GLUE's tsv files have no quoting: a tab always separates and a
quotation mark is text. csv files are quoted as Python's csv module reads them, strictly: a quotation mark that is never
closed would swallow the rows behind it. A csv row that does not have the header's number of fields is an error, since
its text was cut at a comma; of tsv files, in which GLUE has damaged lines, a few are left out with a warning.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]

TABLES = (".parquet", ".arrow")
FORMATS = (".tsv", ".csv", ".txt", ".jsonl", ".json", *TABLES)
# What files of a split are called, after their suffixes are taken off; the first that exists is taken.
SPLIT_STEMS = {
    "train": ("train", "msr_paraphrase_train"),
    "validation": ("dev", "validation", "valid", "val", "dev_matched", "validation_matched"),
    "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
    "test": ("test_labeled", "test"),
}
_FEW_MALFORMED = 0.01  # of a tsv file; a larger share of lines with other columns means another format, not damage

Lines = Iterator[tuple[int, list[str]]]  # the number of each line, from 1, and its fields


def split_name(file: Path) -> tuple[str, str]:
    """The stem and the format of a file: `dev.tsv.gz` -> ("dev", ".tsv")."""
    name = file.name.removesuffix(".gz")
    suffix = Path(name).suffix.lower()
    # GLUE's and SQuAD's names hold versions (train-v1.1.json): only a known format is a suffix.
    return (name.removesuffix(Path(name).suffix), suffix) if suffix in FORMATS else (name, "")


def find_split_files(folder: Path) -> dict[str, Path]:
    """The data files of a folder by split. An exact name (dev.tsv) is preferred to a longer one (dev_part.tsv).

    Raises:
        UserError: several files may be the split, or no file is one.
    """
    files = {file: split_name(file)[0] for file in sorted(folder.iterdir()) if split_name(file)[1]}
    found: dict[str, Path] = {}
    for split, stems in SPLIT_STEMS.items():
        exact = [file for stem in stems for file, name in files.items() if name == stem]
        longer = [
            file
            for stem in stems
            for file, name in files.items()
            if name.startswith((f"{stem}_", f"{stem}-", f"{stem}.")) and not _is_of_another_split(name, split)
        ]
        same = [file for file in exact if files[file] == files[exact[0]]]  # train.csv and train.tsv
        candidates = same or sorted(set(longer))
        if len(candidates) > 1:
            names = ", ".join(file.name for file in candidates)
            raise UserError(f"data: expected one {split} file in {folder}, got {names}; name one with {split}=FILE")
        if candidates:
            found[split] = candidates[0]
    if not found:
        raise UserError(f"data: expected train.tsv, dev.tsv or the like in {folder}, got no such file")
    return found


def _is_of_another_split(name: str, split: str) -> bool:
    return split == "validation" and "mismatched" in name


def read_rows(file: Path, columns: Sequence[str] | None = None) -> tuple[list[Row], list[str]]:
    """Rows of a file, and the columns that it names itself.

    Args:
        columns: names of the columns of a tsv or csv file that has no header line. None: its first line is the header.

    Raises:
        UserError: the file is missing, not a known format, damaged, or not text; a csv row has other columns than the
            header.
    """
    _, suffix = split_name(file)
    if suffix not in FORMATS:
        raise UserError(f"data: expected one of {', '.join(FORMATS)} (or with .gz), got {file}")
    if suffix in TABLES:
        data = _table(file, suffix)
        return named_rows(data), list(data.column_names)
    text = read_text(file)
    if suffix == ".jsonl":
        rows = [
            _json(line, f"{file}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    elif suffix == ".json":
        rows = _json_rows(_json(text, str(file)), file)
    else:
        return _table_rows(file, _lines(text, "," if suffix == ".csv" else "\t"), columns)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"data: expected an object of columns in {file}, row {number}, got {type(row).__name__}")
    return rows, sorted({name for row in rows for name in row})


def _table(file: Path, suffix: str) -> Dataset:
    import pyarrow
    from datasets import Dataset
    from pyarrow import ipc, parquet

    try:
        if suffix == ".parquet":
            table = parquet.read_table(file)
        else:
            source = pyarrow.memory_map(str(file))
            try:
                table = ipc.open_stream(source).read_all()  # as `datasets` writes them
            except pyarrow.ArrowInvalid:
                source.seek(0)
                table = ipc.open_file(source).read_all()  # as feather does
        return Dataset(table)
    except FileNotFoundError:
        raise UserError(f"data: expected a file, got {file}, which does not exist") from None
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data: expected a whole {suffix[1:]} file, got {file} ({reason})") from None


def named_rows(data: Dataset) -> list[Row]:
    """The rows of a data set; classes that it numbers are given by their names, None for those without one."""
    names = {column: feature.names for column, feature in data.features.items() if hasattr(feature, "names")}
    rows = [dict(row) for row in data]
    for row in rows:
        for column, of_class in names.items():
            number = row[column]
            row[column] = None if number is None or number < 0 else of_class[number]
    return rows


def saved_splits(folder: Path) -> dict[str, Dataset] | None:
    """The splits of a folder that `datasets`' `save_to_disk` wrote, "train" where it is one; None of another folder.

    Raises:
        UserError: it cannot be read.
    """
    from datasets import Dataset, load_from_disk

    if not any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return None
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # datasets raises many kinds
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"data: expected a whole saved data set, got {folder} ({reason})"[:400]) from None
    return {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)


def peek(file: Path, count: int = 20) -> list[list[str]]:
    """The fields of a tsv or csv file's first lines; [] for other formats, and where `read_rows` would raise."""
    _, suffix = split_name(file)
    if suffix not in (".tsv", ".csv", ".txt"):
        return []
    try:
        with _opened(file) as lines:
            text = "".join(islice(lines, count))
    except (EOFError, zlib.error, UnicodeDecodeError, OSError):
        return []
    first = _lines(text, "," if suffix == ".csv" else "\t")
    found = []
    with suppress(csv.Error):  # the last of these lines may end inside quotation marks
        found += [fields for _, fields in first]
    return found


def _opened(file: Path) -> io.TextIOBase:
    # The byte-order mark that MRPC's files start with is not part of the first column's name.
    if file.name.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="\n")
    return file.open(encoding="utf-8-sig", newline="\n")


def read_text(file: Path) -> str:
    """All of a text file, plain or gzipped.

    Raises:
        UserError: it is missing, damaged, or not UTF-8.
    """
    try:
        with _opened(file) as lines:
            return lines.read()
    except FileNotFoundError:
        raise UserError(f"data: expected a file, got {file}, which does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"data: expected UTF-8 text, got other bytes in {file} at position {error.start}; save it as UTF-8"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data: expected a whole gzip file, got {file} ({error})") from None
    except OSError as error:
        raise UserError(f"data: expected a readable file, got {file} ({error.strerror or error})") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"data: expected JSON in {where}, got something else ({error})") from None


def _json_rows(content: Any, file: Path) -> list[Row]:
    """SQuAD's nested articles as flat rows, or a plain list of rows."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f'data: expected a list of rows or SQuAD\'s {{"data": [...]}} in {file}, got neither')
    if content["data"] and "paragraphs" not in content["data"][0]:
        return content["data"]
    try:
        return [
            {
                "id": question["id"],
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {
                    "text": [answer["text"] for answer in question["answers"]],
                    "answer_start": [answer["answer_start"] for answer in question["answers"]],
                },
            }
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"data: expected SQuAD's articles, paragraphs and qas in {file}, got none of {error}") from None


def _lines(text: str, separator: str) -> Lines:
    if separator == ",":
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        return ((reader.line_num, fields) for fields in reader if fields)
    lines = enumerate(text.split("\n"), 1)
    return ((number, line.rstrip("\r").split(separator)) for number, line in lines if line.strip("\r"))


def _table_rows(file: Path, lines: Lines, columns: Sequence[str] | None) -> tuple[list[Row], list[str]]:
    is_csv = split_name(file)[1] == ".csv"
    header = None if columns is None else list(columns)
    rows: list[Row] = []
    malformed: list[tuple[int, int]] = []
    number = 0
    try:
        for number, fields in lines:
            if header is None:
                header = [name.strip() for name in fields]
                if is_csv and len(header) == 1 and ";" in header[0]:
                    raise UserError(f"data: expected commas between the columns of {file}, got semicolons")
                continue
            width = len(header)
            if len(fields) > width and not any(map(str.strip, fields[width:])):
                fields = fields[:width]  # a spreadsheet's empty columns
            if len(fields) != width:
                malformed.append((number, len(fields)))
            else:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise UserError(f"data: expected quoted csv in {file}, got {error} at line {number + 1} or behind it") from None
    if malformed:
        number, count = malformed[0]
        where = f"line {number} with {count}" + f" and {len(malformed) - 1} more" * (len(malformed) > 1)
        if is_csv or len(malformed) > max(1, _FEW_MALFORMED * len(rows)):
            quoting = "; a text with a comma stands in double quotes" if is_csv else ""
            raise UserError(f"data: expected {len(header or ())} columns in each line of {file}, got {where}{quoting}")
        warnings.warn(f"{file}: left out lines without {len(header or ())} columns: {where}", stacklevel=2)
    return rows, header or []


def require_columns(
    found: Iterable[str], wanted: Mapping[str, Sequence[str]], where: str, hint: str = ""
) -> dict[str, str]:
    """Which of the found columns is each wanted one; the wanted names are tried in order. `hint` ends the error.

    Raises:
        UserError: none of the names of a wanted column is there, or the first that is there is so twice.
    """
    found = list(found)
    chosen = {}
    for ours, names in wanted.items():
        match = next((name for name in names if name in found), None)
        if match is None:
            names_text = " or ".join(dict.fromkeys(names))
            raise UserError(
                f"data: expected a column {names_text} in {where}, got {', '.join(found) or 'no columns'}{hint}"
            )
        if found.count(match) > 1:
            raise UserError(f"data: expected one column {match} in {where}, got {found.count(match)}")
        chosen[ours] = match
    return chosen
