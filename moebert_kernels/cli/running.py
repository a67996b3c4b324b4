"""What all commands share: errors of one line in the words of the command line, exit statuses, and what they print.

Exit statuses: 0 done; 1 the doctor found something wrong; 2 wrong input or an output that cannot be written; 130
interrupted.
"""

from __future__ import annotations

import copy
import errno
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, get_args, get_origin

import typer

from moebert_kernels.errors import MissingExtra, UserError

# what the package calls a value, where a command's option for it has another name
_OPTION_OF = {
    "text_columns": "text_column", "output_dir": "output", "tables": "hash_tables", "width": "expert_size",
    "num_hidden_layers": "layers", "num_attention_heads": "heads", "gradient_mask.probability": "gradient_mask",
    "objective.preset": "preset",
}  # fmt: skip
# what the package advises, as it is typed
_ADVICE = {
    "resume=False drops": "--restart drops", "resume=False replaces": "--restart --force replaces",
    "another output_dir": "another --output",
}  # fmt: skip


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a command: what a user did wrong is one line on standard error, without a traceback.

    The help texts of its options stand in its docstring, behind "Args:", or in the options' types.
    """
    signature = inspect.signature(function, eval_str=True)
    text, _, described = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    options = {name for name in signature.parameters if name != "ctx"}

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning
            try:
                return function(*args, **kwargs)
            except UserError as error:
                _fail(as_typed(" ".join(str(error).split()), options), 2)
            except MissingExtra as error:
                _fail(" ".join(str(error).split()), 2)
            except KeyboardInterrupt:
                _fail("interrupted; the same command goes on from here", 130)
            except Exception as error:
                if _is_of_a_full_disk(error):
                    reason = " ".join(str(error).split())
                    _fail(f"expected space to write the result, got none ({reason}); free some and run it again", 2)
                if not isinstance(error, OSError):
                    raise
                where = f"{error.filename}: " if error.filename else ""
                _fail(f"{where}{error.strerror or ' '.join(str(error).split())}", 2)

    helps = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", described, re.MULTILINE))
    found = signature.parameters.values()
    documented = [_with_help(one, helps[one.name]) if one.name in helps else one for one in found]
    run.__signature__ = signature.replace(parameters=documented)  # type: ignore[attr-defined]  # typer reads it
    run.__doc__ = text
    return run


def _is_of_a_full_disk(error: Exception) -> bool:
    """Also as safetensors and torch's zip files report it, which tell no error number."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    kind, text = type(error).__name__, str(error)
    return (kind == "SafetensorError" and "I/O error" in text) or "inline_container.cc" in text


def _with_help(parameter: inspect.Parameter, text: str) -> inspect.Parameter:
    given = parameter.annotation
    kind, *found = get_args(given) if get_origin(given) is Annotated else (given,)
    made: Any = Annotated  # which a type checker takes for a type
    option = copy.copy(found[0]) if found else typer.Option()
    option.help, option.param_decls = " ".join(text.split()), (_typed(parameter.name),)
    return parameter.replace(annotation=made[kind, option])


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
    message = wanted + got + came
    if "restart" not in options:
        message = re.sub(r"resume=False (drops|replaces) it, ", "", message)
    for ours, typed in _ADVICE.items():
        message = message.replace(ours, typed)
    return message


def _option(name: str, options: Collection[str]) -> str | None:
    """The option that a value of this name is given by, as it is typed."""
    for candidate in (name.replace("-", "_"), _OPTION_OF.get(name)):
        if candidate in options:
            return _typed(candidate)
    return None


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def print_settings(settings: Mapping[str, Any], prefix: str = "") -> None:
    """One line with what a run was told or takes for granted, as it would be typed; what is off is left out."""
    from moebert_kernels.distill.recipe import flat

    given = {
        name: value for name, value in flat(settings).items() if not (value is None or value is False or value == {})
    }
    words = [f"--{prefix}{name}" if value is True else f"--{prefix}{name} {value}" for name, value in given.items()]
    print(f"settings: {' '.join(words)}", flush=True)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):  # the others are for developers
        print(f"moebert: {' '.join(str(message).split())}", file=sys.stderr)


def print_metrics(metrics: Mapping[str, float], title: str = "") -> None:
    """One line: names and values."""
    text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"{title}: {text}" if title else text)
