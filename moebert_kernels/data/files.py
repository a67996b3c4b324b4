"""Columns of local tables: csv, tsv, jsonl and SQuAD's json, plain or gzipped, parquet, arrow; found by their names.

GLUE's tsv files have no quoting: a tab always separates and a quotation mark is text. csv files are quoted as Python's
csv module reads them, strictly: a quotation mark that is never closed would swallow the rows behind it. A csv row that
does not have the header's number of fields is an error, since its text was cut at a comma; of tsv files, in which GLUE
has damaged lines, a few are left out with a warning.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Columns = Mapping[str, Sequence[Any]]

TABLES = (".parquet", ".arrow")
FORMATS = (".tsv", ".csv", ".txt", ".jsonl", ".json", *TABLES)
# What files of a split are called, after their suffixes are taken off; the first that exists is taken.
SPLIT_STEMS = {
    "train": ("train", "msr_paraphrase_train"),
    "validation": ("dev", "validation", "valid", "val", "dev_matched", "validation_matched"),
    "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
    "test": ("test_labeled", "test", "test_matched"),
}
_FEW_MALFORMED = 0.01  # of a tsv file; a larger share of lines with other columns means another format, not damage


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
    return split in ("validation", "test") and "mismatched" in name


def read_columns(
    file: Path,
    is_header: Callable[[Sequence[str]], bool] = lambda names: True,
    without_header: Mapping[int, Sequence[str]] | None = None,
) -> Columns:
    """The columns of a table by name. Classes that the file numbers are given by their names, None for those without.

    Args:
        is_header: whether these fields of the first line of a tsv or csv file name its columns.
        without_header: number of fields -> names, "" where they are not used, for files whose first line does not.

    Raises:
        UserError: the file is missing, not a known format, damaged, or not text; a csv row has other columns than the
            header.
    """
    _, suffix = split_name(file)
    if suffix not in FORMATS:
        raise UserError(f"data: expected one of {', '.join(FORMATS)} (or with .gz), got {file}")
    if suffix in TABLES and file.exists():
        with reading(f"a whole {suffix[1:]} file in {file}"):
            return named_columns(_table(file))
    text = read_text(file)
    if suffix in (".json", ".jsonl"):
        return _json_columns(text, file)
    return _separated(text, file, is_header, without_header or {})


def _table(file: Path) -> Dataset:
    """Read anew: `load_dataset` would take its copy of a file that was replaced by one of the same date."""
    from datasets import Dataset
    from pyarrow import ArrowInvalid, feather, parquet

    if split_name(file)[1] == ".parquet":
        return Dataset(parquet.read_table(file))
    try:
        return Dataset.from_file(str(file))
    except ArrowInvalid:
        return Dataset(feather.read_table(file))


@contextmanager
def reading(wanted: str) -> Iterator[None]:
    """What `datasets` raises, of many kinds, as one line that says what was `wanted`; without its bars."""
    try:
        with quiet_datasets():
            yield
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split()) or repr(error)
        raise UserError(f"data: expected {wanted}, got {reason}"[:400]) from None


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the bars of `datasets`."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def named_columns(data: Dataset) -> Columns:
    """The columns of a data set; classes that it numbers are given by their names, None for those without one."""
    columns: dict[str, Sequence[Any]] = {name: data[name] for name in data.column_names}
    for name, feature in data.features.items():
        if (of_class := getattr(feature, "names", None)) is not None:
            columns[name] = [None if n is None or n < 0 else of_class[n] for n in columns[name]]
    return columns


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


def _json_columns(text: str, file: Path) -> Columns:
    """A list of rows, a row in each line, or SQuAD's nested articles; None where a row does not have a column."""
    lines = enumerate(text.split("\n"), 1)
    by_line = split_name(file)[1] == ".jsonl"
    content = (
        [_json(line, f"{file}, line {number}") for number, line in lines if line.strip()]
        if by_line
        else _json(text, str(file))
    )
    try:
        rows = content["data"] if isinstance(content, dict) else content
        if rows and "paragraphs" in rows[0]:
            rows = [
                {
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {
                        key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")
                    },
                }
                for article in rows
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
            ]
        names = sorted(set().union(*(row.keys() for row in rows)))
        return {name: [row.get(name) for row in rows] for name in names}
    except (AttributeError, KeyError, TypeError) as error:
        wanted = 'a list of rows or SQuAD\'s {"data": [...]}'
        raise UserError(f"data: expected {wanted} in {file}, got neither ({error})") from None


def _separated(
    text: str, file: Path, is_header: Callable[[Sequence[str]], bool], without_header: Mapping[int, Sequence[str]]
) -> Columns:
    is_csv, number = split_name(file)[1] == ".csv", 0
    lines: list[tuple[int, list[str]]] = []
    limit = csv.field_size_limit()
    try:
        if is_csv:
            csv.field_size_limit(max(limit, len(text)))  # a document may be one field
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            for fields in reader:
                number = reader.line_num
                lines += [(number, fields)] * bool(fields)
        else:
            split = ((number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1))
            lines = [(number, line.split("\t")) for number, line in split if line]
    except csv.Error as error:
        raise UserError(f"data: expected quoted csv in {file}, got {error} at line {number + 1} or behind it") from None
    finally:
        csv.field_size_limit(limit)
    header = [name.strip() for name in lines[0][1]] if lines else []
    width = Counter(len(fields) for _, fields in lines[:20]).most_common(1)[0][0] if lines else 0
    if not is_header(header) and width in without_header:  # one line may be damaged, the first one too
        header = list(without_header[width])
    else:
        lines = lines[1:]
    width = len(header)
    if is_csv and width == 1 and ";" in header[0]:
        raise UserError(f"data: expected commas between the columns of {file}, got semicolons")
    twice = next((name for name, count in Counter(header).items() if name and count > 1), None)
    if twice is not None:
        raise UserError(f"data: expected one column {twice} in {file}, got {header.count(twice)}")
    rows, malformed = [], []
    for number, fields in lines:
        fits = len(fields) == width or (len(fields) > width and not any(map(str.strip, fields[width:])))
        if fits:  # or has a spreadsheet's empty columns
            rows.append(fields[:width])
        else:
            malformed.append((number, len(fields)))
    if malformed:
        number, count = malformed[0]
        where = f"line {number} with {count}" + f" and {len(malformed) - 1} more" * (len(malformed) > 1)
        if is_csv or len(malformed) > max(1, _FEW_MALFORMED * len(rows)):
            quoting = "; a text with a comma stands in double quotes" if is_csv else ""
            raise UserError(f"data: expected {width} columns in each line of {file}, got {where}{quoting}")
        warnings.warn(f"{file}: left out lines without {width} columns: {where}", stacklevel=2)
    return dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(header, ())


def require_columns(
    found: Iterable[str], wanted: Mapping[str, Sequence[str]], where: str, hint: str = ""
) -> dict[str, str]:
    """Which of the found columns is each wanted one; the wanted names are tried in order. `hint` ends the error.

    Raises:
        UserError: none of the names of a wanted column is there.
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
        chosen[ours] = match
    return chosen
