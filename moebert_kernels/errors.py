"""The errors that a person meets: wrong input, and a package that is not installed."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Wrong input by a person, reported in one line: `"{name}: expected {what}, got {what}"`.

    The command line prints it without a traceback and exits with status 2.
    """


class OtherRun(UserError):
    """A folder belongs to a training run with other settings or other data.

    Attributes:
        folder: of that run.
        finished: whether it came to its end.
        changes: what differs -> (what was expected, what the folder's run has).
    """

    def __init__(self, message: str, folder: Path, finished: bool, changes: Mapping[str, tuple[Any, Any]]):
        super().__init__(message)
        self.folder, self.finished, self.changes = folder, finished, dict(changes)


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message says what to run."""


def require_extra(extra: str, *packages: str) -> None:
    """Raise a MissingExtra that names the extra to install, unless all of its packages can be imported.

    The ops need torch (and Triton on a GPU) only; models, training and plots are extras of this package.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: run"
            f" `pip install 'moebert_kernels[{extra}]'`, or `pip install -e '.[{extra}]'` in a clone"
        )
