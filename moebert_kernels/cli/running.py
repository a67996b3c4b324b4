"""What all commands share: errors of one line, exit statuses, and outputs that are never overwritten by accident.

Exit statuses: 0 done; 1 the doctor found something wrong; 2 wrong input or an output that cannot be written; 130
interrupted.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from moebert_kernels.errors import UserError

MARKER = "moebert.json"  # in an output folder: which call wrote it


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a command: what a user did wrong is one line on standard error, without a traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning
            try:
                return function(*args, **kwargs)
            except UserError as error:
                _fail(" ".join(str(error).split()), 2)
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                _fail(f"{where}{error.strerror or ' '.join(str(error).split())}", 2)
            except KeyboardInterrupt:
                _fail("interrupted; the same command goes on from here", 130)

    return run


def _fail(message: str, status: int) -> None:
    print(f"moebert: {message}", file=sys.stderr)
    raise typer.Exit(status)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):  # the others are for developers
        print(f"moebert: {' '.join(str(message).split())}", file=sys.stderr)


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be written into `folder`, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output: expected a folder that can be written, got {folder} ({error.strerror})") from None


def already_written(folder: Path, identity: Mapping[str, Any], force: bool) -> bool:
    """Whether an earlier call of the same `identity` has written `folder`.

    Raises:
        UserError: the folder holds something else. `force` allows to replace a model, and never anything else.
    """
    if folder.is_file():
        raise UserError(f"output: expected a folder, got the file {folder}")
    if not folder.exists() or not any(folder.iterdir()):
        check_writable(folder.absolute().parent)
        return False
    marker = folder / MARKER
    if marker.exists() and not force:
        try:
            if json.loads(marker.read_text(encoding="utf-8")) == json.loads(json.dumps(identity)):
                return True
        except ValueError:
            pass
    if not force:
        raise UserError(f"output: expected a new or empty folder, got {folder}, which is in use (--force replaces it)")
    if not (marker.exists() or (folder / "config.json").exists()):
        raise UserError(f"output: expected a new folder or one with a model, got {folder}, which holds other things")
    return False


def write_model(folder: Path, model: Any, tokenizer: Any, identity: Mapping[str, Any]) -> None:
    """Write a model, its tokenizer if there is one, and the call that made them, whole or not at all."""
    from moebert_kernels.distill.checkpoint import write_folder
    from moebert_kernels.distill.progress import quiet_transformers
    from moebert_kernels.models.card import save_with_card

    output = folder

    def write(folder: Path) -> None:
        with quiet_transformers():
            save_with_card(model, folder, previous=output)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / MARKER).write_text(json.dumps(identity), encoding="utf-8")

    write_folder(folder, write)
    print(f"saved in {folder}")


def print_metrics(metrics: Mapping[str, float], title: str = "") -> None:
    """One line: names and values."""
    text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"{title}: {text}" if title else text)
