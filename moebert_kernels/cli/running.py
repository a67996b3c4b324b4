"""What all commands share: errors of one line in the words of the command line, exit statuses, and what they print.

Exit statuses: 0 done; 1 the doctor found something wrong; 2 wrong input or an output that cannot be written; 130
interrupted.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from moebert_kernels.errors import MissingExtra, UserError

# what the package calls a value, where a command's option for it has another name
_OPTION_OF = {
    "text_columns": "text_column", "output_dir": "output", "tables": "hash_tables", "width": "expert_size",
    "num_hidden_layers": "layers", "num_attention_heads": "heads",
}  # fmt: skip
# options that name a file or a folder; a shell leaves the ~ of --output=~/out as it is
_PLACES = (
    "model", "against", "teacher", "dense_teacher", "init", "output", "data", "config", "importance", "hash_tables",
    "from_original", "extra_text", "chart",
)  # fmt: skip
_ADVICE = {"resume=False": "--force", "another output_dir": "another --output"}  # as it is typed


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a command: what a user did wrong is one line on standard error, without a traceback.

    The help texts of its options stand in its docstring, behind "Args:", or in the options' types. A parameter whose
    type is a dataclass stands for its fields, each of which is an option.
    """
    signature = inspect.signature(function, eval_str=True)
    text, _, described = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    taken = signature.parameters.values()
    groups: dict[str, Any] = {one.name: one.annotation for one in taken if dataclasses.is_dataclass(one.annotation)}
    found = [option.replace(kind=option.KEYWORD_ONLY) for one in taken for option in _fields(one)]
    options = {one.name for one in found if one.name != "ctx"}

    @functools.wraps(function)
    def run(**given: Any) -> Any:
        given |= {name: at_home(given[name]) for name in _PLACES if name in given}
        if "ctx" in given:
            given["ctx"].params.update({name: given[name] for name in _PLACES if name in given})
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning
            try:
                return function(**given)
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
    documented = [_with_help(one, helps[one.name]) if one.name in helps else one for one in found]
    run.__signature__ = signature.replace(parameters=documented)  # type: ignore[attr-defined]  # typer reads it
    run.__doc__ = text
    return run


def at_home(place: Any) -> Any:
    """A path, NAME=PATH or several of them with the user's folder in place of a ~ at a path's beginning."""
    if isinstance(place, list):
        return [at_home(one) for one in place]
    if isinstance(place, Path):
        return Path(os.path.expanduser(place))  # which leaves what names no user as it is
    return "=".join(map(os.path.expanduser, place.split("="))) if isinstance(place, str) else place


def _is_of_a_full_disk(error: Exception) -> bool:
    """Also as safetensors and torch's zip files report it, which tell no error number."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    kind, text = type(error).__name__, str(error)
    return (kind == "SafetensorError" and "I/O error" in text) or "inline_container.cc" in text


def _fields(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """The options that a parameter stands for."""
    kind: Any = parameter.annotation
    if not dataclasses.is_dataclass(kind):
        return [parameter]
    types: Any = get_type_hints(kind, include_extras=True)
    return [
        parameter.replace(name=field.name, default=field.default, annotation=types[field.name])
        for field in dataclasses.fields(kind)
    ]


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
    """A message "name: expected .., got .." of a value that one of a command's options gives, with the option's name.

    Args:
        options: parameter names of the command.
    """
    name, _, rest = message.partition(": ")
    option = _OPTION_OF.get(name, name).replace("-", "_")
    message = f"{_typed(option)}: {rest}" if option in options else message
    for ours, typed in _ADVICE.items():
        message = message.replace(ours, typed)
    return message


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
