"""A table of a configuration's fields: of each the kind and the range of its values, checked before a model is built.

`check_fields(config, {"num_experts": integer(1), "router": choice(ROUTERS)})` raises a UserError of one line that names
the first field with another value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from moebert_kernels.errors import UserError

LARGEST = 2**31 - 1  # of a size: what an int32 index reaches
_LARGEST_FLOAT = 3.4e38  # in float32
_SHOWN = 80  # characters of a wrong value

Field = Callable[[Any], str | None]
"""What would have been right in the place of a value; None if the value is right."""


def check_fields(config: Any, fields: Mapping[str, Field]) -> None:
    """Raise a UserError that names the first of these attributes of `config` whose value is not what it should be."""
    for name, field in fields.items():
        value = getattr(config, name)
        wanted = field(value)
        if wanted is not None:
            raise UserError(f"{name}: expected {wanted}, got {shown(value)}")


def shown(value: Any) -> str:
    """The value on one line, and not all of a long one."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def integer(low: int, high: int = LARGEST) -> Field:
    def wanted(value: Any) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            return f"an integer of at least {low}"
        return None if value <= high else f"an integer of at most {high}"

    return wanted


def number(low: float) -> Field:
    """An integer or float, finite in float32."""

    def wanted(value: Any) -> str | None:
        return None if _is_number(value) and value >= low else f"a number of at least {low}"

    return wanted


def probability(value: Any) -> str | None:
    return None if _is_number(value) and 0 <= value < 1 else "a probability in [0, 1)"


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def mapping(value: Any) -> str | None:
    return None if isinstance(value, Mapping) else "a mapping"


def numbered(value: Any) -> str | None:
    """Values by number; JSON has numbers as strings in the place of keys."""
    is_right = isinstance(value, Mapping) and all(str(key).isdecimal() for key in value)
    return None if is_right else "a mapping of numbers to names"


def choice(allowed: Collection[str]) -> Field:
    def wanted(value: Any) -> str | None:
        return None if isinstance(value, str) and value in allowed else f"one of {', '.join(allowed)}"

    return wanted


def texts(value: Any) -> str | None:
    is_right = isinstance(value, (list, tuple)) and all(isinstance(text, str) and text for text in value)
    return None if is_right else "a list of names"


def optional(field: Field) -> Field:
    """None, or what `field` takes."""

    def wanted(value: Any) -> str | None:
        return None if value is None else field(value)

    return wanted


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT  # False for nan
