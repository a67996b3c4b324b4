"""Results as rows to show: what a case is about, its timed providers, which of them is ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import load

OURS = "moebert_kernels"
BOUNDS = (
    "ideal",
    "roof",
    "deepcopy_of_dense",
)  # providers that do less than the case asks for: what can be reached, no alternatives
_NOT_SHAPE = ("op", "direction", "T")


def load_all(path: Path) -> dict[str, dict[str, Any]]:
    """Results of a file or of a folder by file name, in its order.

    Raises:
        ValueError: nothing there, or a file that is no result of this format.
    """
    if path.is_dir():  # what `make gpu` leaves besides its suites lies there too
        files = sorted(file for file in path.glob("*.json") if not file.name.startswith("gpu-"))
    else:
        files = [path]
    found = {}
    for file in files:
        try:
            found[file.name] = load(file)
        except (OSError, json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{file}: expected a result of python -m benchmarks run, got {error}") from None
    if not found:
        raise ValueError(f"{path}: expected results of python -m benchmarks run, got none")
    return found


@dataclass(frozen=True)
class Row:
    """A case with its suite's name and roof."""

    what: str
    case: Mapping[str, Any]
    roof: Mapping[str, float]

    @property
    def subject(self) -> str:
        """The op or model."""
        parameters = self.case["parameters"]
        return str(parameters.get("op") or parameters.get("model") or self.what)

    @property
    def direction(self) -> str:
        return str(self.case["parameters"].get("direction", ""))

    @property
    def tokens(self) -> int:
        """Flattened: of cases with sequences, B times T."""
        parameters = self.case["parameters"]
        return int(parameters.get("T", 0)) * int(parameters.get("B", 1))

    @property
    def label(self) -> str:
        return str(self.case["name"])

    @property
    def times(self) -> dict[str, Mapping[str, Any]]:
        """Entries of the providers that were timed."""
        return {name: entry for name, entry in self.case["providers"].items() if "median_ms" in entry}

    def speed(self, provider: str) -> Mapping[str, float] | None:
        """Quartiles of the provider's speed over the baseline's."""
        return self.case["providers"].get(provider, {}).get("speed_over_baseline")


@dataclass(frozen=True)
class Series:
    """An op in one direction and one shape at several numbers of tokens, in order."""

    name: tuple[str, str]  # op, direction
    shape: str
    rows: Sequence[Row]


def rows_of(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [Row(result["what"], case, result["roof"]) for result in results for case in result["cases"]]


def ours(case: Mapping[str, Any]) -> str:
    """Our provider of a case: by name, or the first, as every suite lists it."""
    named = [name for name in case["providers"] if name == OURS] or [
        name for name in case["providers"] if name.startswith(OURS)
    ]
    return (named or list(case["providers"]))[0]


def is_ours(case: Mapping[str, Any], provider: str) -> bool:
    """Ours, or a form of it, such as on another backend."""
    return provider.startswith((ours(case), OURS))


def is_model(row: Row) -> bool:
    return "model" in row.case["parameters"]


def series_over_tokens(rows: Iterable[Row]) -> list[Series]:
    """Ops that were timed at three or more numbers of tokens; at equal ones, the first suite's case counts."""
    found: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        parameters = row.case["parameters"]
        if "op" in parameters and row.times and row.speed(ours(row.case)):
            shape = ", ".join(f"{name} {value}" for name, value in parameters.items() if name not in _NOT_SHAPE)
            found.setdefault((row.subject, row.direction, shape), {}).setdefault(row.tokens, row)
    return [
        Series((op, direction), shape, [some[tokens] for tokens in sorted(some)])
        for (op, direction, shape), some in found.items()
        if len(some) >= 3
    ]
