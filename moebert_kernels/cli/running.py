"""What all commands share: errors of one line in the words of the command line, exit statuses, and what they print.

Exit statuses: 0 done; 1 the doctor found something wrong; 2 wrong input or an output that cannot be written; 130
interrupted.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import typer

from moebert_kernels.errors import MissingExtra, OtherRun, UserError

# what the package calls a value, where a command's option for it has another name
_OPTION_OF = {
    "text_columns": "text_column", "output_dir": "output", "tables": "hash_tables", "width": "expert_size",
    "num_hidden_layers": "layers", "num_attention_heads": "heads", "gradient_mask.probability": "gradient_mask",
    "objective.preset": "preset",
}  # fmt: skip


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a command: what a user did wrong is one line on standard error, without a traceback."""
    options = {name for name in inspect.signature(function).parameters if name != "ctx"}

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning
            try:
                return function(*args, **kwargs)
            except OtherRun as error:
                _fail(_of_other_run(error, options), 2)
            except UserError as error:
                _fail(as_typed(" ".join(str(error).split()), options), 2)
            except MissingExtra as error:
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


def as_typed(message: str, options: Collection[str]) -> str:
    """A message with the names of a command's options as they stand on the command line: --batch-size for batch_size.

    Args:
        message: "name: expected .., got ..". What came is the user's and stays as it is.
        options: parameter names of the command.
    """
    name, colon, rest = message.partition(": ")
    option = _option(name, options)
    if colon and option is not None:
        message = f"{option}: {rest}"
    wanted, got, came = message.rpartition(", got ") if ", got " in message else (message, "", "")
    if options:
        # a word may be a word: it is an option where it has a value, or could be nothing else
        names = "|".join(name if "_" in name else f"{name}(?= ?>?=)" for name in options)
        wanted = re.sub(rf"(?<![\w./-])({names})(?![\w./-])", lambda match: _typed(match[1]), wanted)
    return wanted + got + came


def _option(name: str, options: Collection[str]) -> str | None:
    """The option that a value of this name is given by, as it is typed."""
    for candidate in (name.replace("-", "_"), _OPTION_OF.get(name)):
        if candidate in options:
            return _typed(candidate)
    return None


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _of_other_run(error: OtherRun, options: Collection[str]) -> str:
    """What is different from the run in the output folder, by option, and what to do."""
    given: list[str] = []
    others: list[str] = []
    for name, (wanted, got) in error.changes.items():
        if " " in name or isinstance(wanted, dict | list) or isinstance(got, dict | list):
            others.append(name)  # a name of contents, whose values say nothing to a person
        else:
            given.append(f"{_option(name, options) or name} was {_said(got)} and is {_said(wanted)} now")
    if others:
        given = [*given[:3], f"other {', '.join(others[:3])}"]
    changes = "; ".join(given[:4])
    if "restart" not in options:
        advice = "use another --output"
    elif error.finished:
        advice = "use another --output, or --restart --force to replace the model there"
    else:
        advice = "use another --output, or --restart to drop that run"
    kind = "a finished" if error.finished else "an unfinished"
    return f"--output: {error.folder} holds {kind} run with other settings: {changes} ({advice})"


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)


def print_settings(settings: Mapping[str, Any], prefix: str = "") -> None:
    """One line with what a run was told or takes for granted, as it would be typed; what is off is left out."""
    words = []
    for name, value in settings.items():
        entries = value if isinstance(value, Mapping) else {}
        for key, one in (
            {f"{name}.{entry}": one for entry, one in entries.items()} if entries else {name: value}
        ).items():
            if one is not None and one is not False and one != {}:
                words.append(f"--{prefix}{key}" if one is True else f"--{prefix}{key} {one}")
    print(f"settings: {' '.join(words)}", flush=True)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):  # the others are for developers
        print(f"moebert: {' '.join(str(message).split())}", file=sys.stderr)


def print_metrics(metrics: Mapping[str, float], title: str = "") -> None:
    """One line: names and values."""
    text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"{title}: {text}" if title else text)
