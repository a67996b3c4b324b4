"""Settings of a training run as people write them, on a command line or in YAML: names and types of the arguments."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import yaml
from transformers import HfArgumentParser

from moebert_kernels.distill.arguments import MoETrainingArguments
from moebert_kernels.errors import UserError

OF_DATA = {"max_length": 8, "doc_stride": 0}  # which a file may say too: whole numbers of at least so much
# what a run decides itself, by its folder and by being run again
_DECIDED = (
    "output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict",
    "restore_callback_states_from_checkpoint",
)  # fmt: skip


_POWER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read_yaml(text: str) -> Any:
    """What a text in YAML says, with `powers`.

    Raises:
        YAMLError: it is none.
    """
    return powers(yaml.safe_load(text))


def powers(content: Any) -> Any:
    """A copy with 1e-4 as a number, as YAML 1.2 and Python have it; to PyYAML, which wants 1.0e-4, it is a text."""
    if isinstance(content, dict):
        return {key: powers(value) for key, value in content.items()}
    if isinstance(content, list):
        return [powers(value) for value in content]
    return float(content) if isinstance(content, str) and _POWER.fullmatch(content) else content


@cache
def names() -> tuple[str, ...]:
    """What a run can be told."""
    arguments = [field.name for field in fields(MoETrainingArguments) if field.init and field.name not in _DECIDED]
    return (*arguments, *OF_DATA)


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (the nearest is ...)" for an unknown name, or nothing; of dotted names the last part is compared."""
    by_end = {full.rpartition(".")[2]: full for full in known}
    found = difflib.get_close_matches(name, by_end, n=1, cutoff=0.6)
    return f" (the nearest is {by_end[found[0]]!r})" if found else ""


def dotted_names() -> list[str]:
    """Entries of dictionaries that people may take for names of their own."""
    from moebert_kernels.distill.discriminator import AdversaryConfig
    from moebert_kernels.distill.microbert import TERMS, MicroBertObjective

    options = [f"objective_options.{name}" for name in inspect.signature(MicroBertObjective).parameters]
    adversary = [f"objective_options.adversary.{field.name}" for field in fields(AdversaryConfig)]
    return [*adversary, *options, *(f"loss_weights.{term}" for term in (*TERMS, "balance"))]


def typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name in their types; texts are read as transformers' command lines have them, dictionaries as YAML.

    Raises:
        UserError: an unknown name, with the nearest known one, or a value that cannot be one of it.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in _DECIDED:
            raise UserError(f"{name}: expected none, as --output and the run's own state decide it, got {value!r}")
        if name not in names():
            raise UserError(
                f"{key}: expected the name of a training argument, got an unknown one"
                f"{nearest(name, [*dotted_names(), *names()])}"
            )
        found[name] = one = _typed(name, value)
        if name in OF_DATA and one is not None and one < OF_DATA[name]:
            raise UserError(f"{name}: expected a number of at least {OF_DATA[name]}, got {one}")
    return found


def _typed(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in MoETrainingArguments._VALID_DICT_FIELDS and not isinstance(value, str):
        return powers(value)  # which the arguments check
    if name in MoETrainingArguments._VALID_DICT_FIELDS and (value.strip().startswith("{") or name in _OURS):
        try:
            content = read_yaml(value)
        except yaml.YAMLError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{name}: expected names and values such as '{{a: 1}}', got {value!r}")
        return content
    if isinstance(value, list | tuple) and not any(a.dest == name and a.nargs for a in _parser()._actions):
        return list(value)  # where one text or several may stand
    words = [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]
    try:
        given = [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
        return getattr(_parser().parse_args(given), name)
    except argparse.ArgumentError as error:
        raise UserError(f"{name}: expected another value, got {value!r} ({error.message})") from None


_OURS = ("objective_options", "loss_weights", "gradient_mask")


@cache
def _parser() -> HfArgumentParser:
    """Of single values: what is not given has no default."""
    arguments: Any = MoETrainingArguments
    options: Any = {"allow_abbrev": False, "add_help": False, "exit_on_error": False}
    parser = HfArgumentParser(arguments, argument_default=argparse.SUPPRESS, **options)
    for name in OF_DATA:
        parser.add_argument(f"--{name}", type=int)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser
