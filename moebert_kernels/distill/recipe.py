"""Recipes: YAML files that say what a model is trained for, stage by stage, and values to override.

A recipe is a mapping of training arguments, by the names of `MoETrainingArguments`, and of `max_length` and
`doc_stride`; `stages:`, a mapping from names to further such mappings, makes several of them, one after another. A key
of its own holds for every stage, `STAGE.KEY` for one, `KEY.NAME` for one entry of a dictionary such as `loss_weights`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from moebert_kernels.distill.arguments import check_weights
from moebert_kernels.distill.microbert import TERMS
from moebert_kernels.distill.settings import nearest, read_yaml, typed
from moebert_kernels.distill.terms import BALANCE, TASK
from moebert_kernels.errors import UserError

_FOLDER = files("moebert_kernels.distill") / "recipes"
RUN_FOLDERS = ("best", "final")  # in a run's output folder
MICROBERT = "microbert"  # the objective whose terms are those with a weight


@dataclass(frozen=True)
class Stage:
    """What one training run does.

    Raises:
        UserError: a weight of a term that does not exist, or a name that is none for a folder beside those of a run.
    """

    name: str = "student"
    settings: Mapping[str, Any] = field(default_factory=dict)  # training arguments by name, and those of data

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name) or self.name in RUN_FOLDERS:
            taken = ", ".join(RUN_FOLDERS)
            raise UserError(f"stages: expected names of letters, digits, - and _ other than {taken}, got {self.name!r}")
        weights, known = self.settings.get("loss_weights") or {}, (TASK, BALANCE, *TERMS)
        check_weights(weights)
        unknown = [name for name in weights if self.objective == MICROBERT and name not in known]
        if unknown:
            near = nearest(unknown[0], known)
            raise UserError(f"loss_weights: expected names among {', '.join(known)}, got {unknown[0]!r}{near}")

    @property
    def objective(self) -> str | None:
        return self.settings.get("objective")

    @property
    def weights(self) -> dict[str, float]:
        """Of the loss terms; a term of "microbert" that has none is left out."""
        weights = dict(self.settings.get("loss_weights") or {})
        if self.objective != MICROBERT:
            return weights
        return {name: weight for name, weight in weights.items() if name in (TASK, BALANCE) or weight}

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of "microbert" that have a weight."""
        return tuple(term for term in TERMS if self.weights.get(term)) if self.objective == MICROBERT else ()

    @property
    def needs_teacher(self) -> bool:
        return self.objective is not None and (self.objective != MICROBERT or bool(self.terms))

    @property
    def is_active(self) -> bool:
        """Whether there is a term to train for."""
        return self.needs_teacher or bool(self.weights.get(TASK, 1.0))


@dataclass(frozen=True)
class Recipe:
    """Stages, one after another."""

    name: str
    stages: tuple[Stage, ...]

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """With `KEY` set in every stage, or `STAGE.KEY` in one; `.NAME` behind a key sets one entry of a dictionary.

        Raises:
            UserError: an unknown key, or a value that cannot be one of it.
        """
        changed = {stage.name: dict(stage.settings) for stage in self.stages}
        for key, value in values.items():
            first, dot, rest = str(key).partition(".")
            targets, path = ([first], rest) if dot and first in changed else (list(changed), str(key))
            name, dot, entry = path.partition(".")
            for target in targets:
                settings = changed[target]
                if not dot:
                    settings |= typed({name: value})
                    continue
                ((name, _),) = typed({name: {}}).items()  # which refuses an unknown name
                inner = read_yaml(value) if isinstance(value, str) else value
                settings[name] = _with_entry(settings.get(name), name, entry, inner)
        return Recipe(self.name, tuple(Stage(name, settings) for name, settings in changed.items()))

    def common(self, name: str) -> Any:
        """A value that all stages share.

        Raises:
            UserError: they do not.
        """
        values = [stage.settings.get(name) for stage in self.active]
        if any(value != values[0] for value in values):
            raise UserError(f"{name}: expected the same in every stage, got {' and '.join(map(str, values))}")
        return values[0]

    @property
    def active(self) -> tuple[Stage, ...]:
        """The stages that have a term.

        Raises:
            UserError: none has.
        """
        stages = tuple(stage for stage in self.stages if stage.is_active)
        if not stages:
            raise UserError(f"loss_weights: expected a term with a weight above 0 in {self.name}, got none")
        return stages

    @property
    def needs_teacher(self) -> bool:
        return any(stage.needs_teacher for stage in self.active)


def _with_entry(content: Any, name: str, path: str, value: Any) -> dict[str, Any]:
    """A copy of a dictionary with one entry set, which may lie in a dictionary inside it."""
    if content is not None and not isinstance(content, Mapping):
        raise UserError(f"{name}: expected names and values, got {content!r}")
    made, (entry, dot, rest) = dict(content or {}), path.partition(".")
    made[entry] = _with_entry(made.get(entry), f"{name}.{entry}", rest, value) if dot else value
    return made


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, one level deep; an empty dictionary stays."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        entries = value if isinstance(value, Mapping) else {}
        found |= {f"{name}.{entry}": one for entry, one in entries.items()} or {name: value}
    return found


def recipe_names() -> list[str]:
    """Of the recipes that are part of the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str | Path) -> Recipe:
    """A recipe of the package by name, or one of your own by its file.

    Raises:
        UserError: there is none, it is no YAML mapping, or it has an unknown key or an impossible value.
    """
    path: Any = Path(name)
    if str(name) in recipe_names():
        path = _FOLDER / f"{name}.yaml"
    elif path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UserError(f"config: expected one of {', '.join(recipe_names())}, or a YAML file, got {name}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config: expected YAML in {path}, got something else ({reason})") from None
    stages = content.pop("stages", {"student": {}}) if isinstance(content, dict) else None
    if not isinstance(stages, dict) or not stages or not all(isinstance(stage, dict) for stage in stages.values()):
        raise UserError(f"config: expected keys and values in {path}, and stages by name, got another form")
    common = typed(content)
    return Recipe(str(name), tuple(Stage(str(key), common | typed(own)) for key, own in stages.items()))
