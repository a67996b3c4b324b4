"""Labels as files hold them: which are missing, which are scores, and which are one class written in two ways."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from moebert_kernels.errors import UserError

_MISSING = ("", "nan", "<na>", "nat")  # what table libraries write where there is no value


def label_text(value: Any) -> str | None:
    """A label without the white space around it; None where there is none."""
    text = "" if value is None else str(value).strip()
    return None if text.casefold() in _MISSING else text


def all_missing(values: Sequence[Any], names: Sequence[str] = ()) -> bool:
    """Whether there are rows and none has a label: test sets without them have -1 throughout, or nothing.

    `names`: of the classes, of which -1 may be one.
    """
    stands_for_none = "-1" not in names
    missing = (label_text(value) is None or (stands_for_none and score_of(value) == -1) for value in values)
    return len(values) > 0 and all(missing)


def class_names(column: str, values: Sequence[Any], where: str) -> tuple[str, ...]:
    """The classes of a column, in the order of their sorted names, numbers first and by size.

    Warns of two names that differ in upper and lower case, or in the way that a number is written, alone.

    Raises:
        UserError: a missing label, several in one row, scores in place of classes, or a number of classes below 2 or
            above 1,000.
    """
    rows: dict[str, int] = {}  # the first row of each class
    for row, value in enumerate(values, 1):
        name = None if isinstance(value, (list, dict)) else label_text(value)
        if name is None:
            raise UserError(f"{column}: expected a label in {where}, row {row}, got {value!r}")
        rows.setdefault(name, row)
    numbers = {name: number for name in rows if (number := score_of(name)) is not None}
    score = next((name for name, number in numbers.items() if number != int(number)), None)
    if score is not None and len(numbers) == len(rows):
        raise UserError(
            f"{column}: expected classes in {where}, got scores such as {score} in row {rows[score]}"
            " (--regression, or custom_task(regression=True), reads them as scores)"
        )
    if not 2 <= len(rows) <= 1000:
        raise UserError(f"labels: expected between 2 and 1000 classes in {where}, got {len(rows)}")
    alike: dict[Any, str] = {}
    for name in rows:
        other = alike.setdefault(numbers.get(name, name.casefold()), name)
        if other != name:
            warnings.warn(f"{column}: {other!r} and {name!r} are two classes in {where}", stacklevel=2)
    return tuple(sorted(rows, key=by_name))


def by_name(name: str) -> tuple[int, int, str]:
    """What classes are sorted by: numbers first and by size."""
    return (0, int(name), name) if name.isdigit() else (1, 0, name)


def class_finder(names: Sequence[str]) -> Callable[[str], int | None]:
    """What gives the number of a class by its name, also in another case if no second class has that name then."""
    exact = {name: number for number, name in enumerate(names)}
    alike = Counter(map(str.casefold, exact))
    folded = {name.casefold(): number for name, number in exact.items() if alike[name.casefold()] == 1}
    return lambda name: exact.get(name, folded.get(name.casefold()))


def score_of(value: Any) -> float | None:
    """A score, or None where there is no finite number."""
    try:
        score = float(value)
    except (TypeError, ValueError):
        return None
    return score if abs(score) < float("inf") else None
