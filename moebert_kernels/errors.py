"""The errors for wrong input by a person: a command line, a file, a checkpoint, a configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Wrong input, said in one line: `"{name}: expected {what}, got {what}"`.

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
