"""Read the original code's pickles - lists, dicts and numbers - without running anything that they name."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from moebert_kernels.errors import UserError


def _number(dtype: np.dtype, data: bytes) -> int | float:
    if dtype.kind not in "iuf":
        raise pickle.UnpicklingError(f"a numpy scalar of dtype {dtype}")
    number: int | float = np.frombuffer(data, dtype, count=1)[0].item()
    return number


# `numpy.argmin` leaves numpy integers in the balance tables; nothing else than plain data occurs in those files
_ALLOWED = {
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return _ALLOWED[module, name]


def read_plain_pickle(path: Path) -> Any:
    """Return the lists, dicts and numbers of a pickle; raise UserError for anything else in it."""
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path.name}: expected a pickle of plain lists and numbers, got {path} ({error})") from error
