"""Recipes: YAML files that say what a student is trained for, stage by stage, and values to override.

A recipe is a mapping of the fields of `Stage`; `stages:`, a mapping from names to further such mappings, makes several
of them, one after another. A key of its own holds for every stage, `STAGE.KEY` for one.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from moebert_kernels.data.tasks import Task
from moebert_kernels.distill.alignment import VIEWS, Distance
from moebert_kernels.distill.config import RUN_FOLDERS, FitConfig
from moebert_kernels.distill.discriminator import AdversaryConfig, Input
from moebert_kernels.distill.microbert import TERMS, MicroBertObjective
from moebert_kernels.errors import UserError

_FOLDER = files("moebert_kernels.distill") / "recipes"
_DISCRIMINATOR = "discriminator_"


@dataclass(frozen=True)
class Stage:
    """What one training run of a student does. Weights of 0 leave a term out.

    Raises:
        UserError: a negative weight, or a name that is none for a folder beside those of a run.
    """

    name: str = "student"
    # weights: of the labels, of a model's own balance loss, of the objective's terms
    labels: float = 0.0
    balance: float | None = None  # None: the model's own `load_balance`
    embedding: float = 0.0
    hidden: float = 0.0
    alignment: float = 0.0
    relation: float = 0.0
    soft: float = 0.0
    adversarial: float = 0.0
    # the terms; see MicroBertObjective and AdversaryConfig
    layer_map: dict[int, int] | None = None
    project: bool = True
    views: tuple[str, ...] = VIEWS
    distance: Distance = "mse"
    pool_first: bool = False
    temperature: float = 2.0
    relation_heads: int | None = None
    relation_layer: int | None = None
    discriminator_input: Input = "auto"
    discriminator_dropout: float = 0.1
    discriminator_learning_rate: float = 1e-4
    discriminator_real_label: float = 0.9
    discriminator_warmup: float = 0.1
    discriminator_stop_steps: int | None = None
    discriminator_stop_accuracy: float = 0.95
    # training; see FitConfig
    epochs: int = 3
    max_steps: int | None = None
    learning_rate: float = 5e-5
    router_learning_rate: float | None = None
    batch_size: int = 32
    accumulation: int = 1
    weight_decay: float = 0.01
    warmup_ratio: float = 0.0
    schedule: str = "linear"
    max_grad_norm: float | None = 1.0
    mixed_precision: str = "no"
    teacher_dropout: bool = False
    eval_steps: int | None = None
    patience: int | None = None
    save_steps: int = 500
    log_steps: int = 10
    max_length: int | None = None  # tokens of a text at most; None: the task's

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name) or self.name in RUN_FOLDERS:
            taken = ", ".join(RUN_FOLDERS)
            raise UserError(f"stages: expected names of letters, digits, - and _ other than {taken}, got {self.name!r}")
        for name in ("labels", "balance", *TERMS):
            weight = getattr(self, name)
            if weight is not None and not 0.0 <= weight < float("inf"):
                raise UserError(f"{name}: expected a weight of at least 0, got {weight!r}")

    @property
    def terms(self) -> tuple[str, ...]:
        """The objective's terms that have a weight; all but the labels and the balance loss need a teacher."""
        return tuple(term for term in TERMS if getattr(self, term))

    @property
    def is_lean(self) -> bool:
        """Whether logits and sentence vectors are all that is needed of a teacher."""
        return not {"embedding", "hidden", "relation"} & set(self.terms)

    def objective(self, task: Task) -> MicroBertObjective | None:
        """The objective; None without a term that needs a teacher."""
        if not self.terms:
            return None
        names = ("layer_map", "project", "views", "distance", "pool_first", "temperature", "relation_heads",
                 "relation_layer")  # fmt: skip
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        settings: dict[str, Any] = {
            field.name.removeprefix(_DISCRIMINATOR): getattr(self, field.name)
            for field in fields(self)
            if field.name.startswith(_DISCRIMINATOR)
        }
        kind: Any = task.kind  # which the objective checks
        return MicroBertObjective(kind, self.terms, adversary=AdversaryConfig(**settings), **options)

    def fit_config(self, task: Task, seed: int) -> FitConfig:
        """The settings of its training run, judged by the task's main metric."""
        same = {field.name for field in fields(FitConfig)} & {field.name for field in fields(self)}
        weights = {"task": self.labels, **{term: getattr(self, term) for term in self.terms}}
        if self.balance is not None:
            weights["balance"] = self.balance
        return FitConfig(
            **{name: getattr(self, name) for name in same},
            seed=seed,
            weights=weights,
            best_metric=task.main_metric,
            greater_is_better=task.greater_is_better,
        )


@dataclass(frozen=True)
class Recipe:
    """Stages, one after another."""

    name: str
    stages: tuple[Stage, ...]

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """With `KEY` set in every stage, or `STAGE.KEY` in one; texts are read as YAML writes such values.

        Raises:
            UserError: an unknown key, or a value that cannot be one of it.
        """
        changed = {stage.name: stage for stage in self.stages}
        for key, value in values.items():
            stage, dot, name = key.rpartition(".")
            if dot and stage not in changed:
                raise UserError(f"{key}: expected one of the stages {', '.join(changed)}, got {stage!r}")
            for target in [stage] if dot else list(changed):
                changed[target] = replace(changed[target], **_typed({name: value}))
        return Recipe(self.name, tuple(changed.values()))

    @property
    def active(self) -> tuple[Stage, ...]:
        """The stages that have a term.

        Raises:
            UserError: none has.
        """
        stages = tuple(stage for stage in self.stages if stage.terms or stage.labels)
        if not stages:
            raise UserError(f"recipe: expected a term with a weight above 0 in {self.name}, got none")
        return stages

    @property
    def needs_teacher(self) -> bool:
        return any(stage.terms for stage in self.active)


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
        raise UserError(f"recipe: expected one of {', '.join(recipe_names())}, or a YAML file, got {name}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe: expected YAML in {path}, got something else ({reason})") from None
    stages = content.pop("stages", {"student": {}}) if isinstance(content, dict) else None
    if not isinstance(stages, dict) or not stages or not all(isinstance(stage, dict) for stage in stages.values()):
        raise UserError(f"recipe: expected keys and values in {path}, and stages by name, got another form")
    common = _typed(content)
    return Recipe(str(name), tuple(Stage(**common | _typed(own) | {"name": str(key)}) for key, own in stages.items()))


@cache
def keys() -> dict[str, Any]:
    """What a recipe can say -> its type."""
    return {name: hint for name, hint in get_type_hints(Stage).items() if name != "name"}


def nearest(key: str, known: Any) -> str:
    """ " (the nearest is ...)" for an unknown name, or nothing."""
    found = difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)
    return f" (the nearest is {found[0]!r})" if found else ""


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe's keys in their types."""
    typed = {}
    for key, value in values.items():
        if key not in keys():
            raise UserError(f"recipe: expected a known key, got {key!r}{nearest(str(key), keys())}")
        try:
            typed[key] = _converted(value, keys()[key])
        except (TypeError, ValueError, yaml.YAMLError, AttributeError):
            raise UserError(f"{key}: expected {_described(keys()[key])}, got {value!r}") from None
    return typed


def _converted(value: Any, hint: Any) -> Any:
    """A value, or a text as YAML has it, as one of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or value in ("null", "none", ""):
            return None
        return _converted(value, arguments[0])
    if origin is Literal:
        if value not in arguments:
            raise ValueError
        return value
    if origin is tuple:
        parts = value.replace(",", " ").split() if isinstance(value, str) else list(value)
        return tuple(str(part) for part in parts)
    if origin is dict:  # a text: 1:2,2:4
        pairs = value.items() if not isinstance(value, str) else (part.split(":") for part in value.split(","))
        return {int(student): int(teacher) for student, teacher in pairs}
    if hint is bool:
        value = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool):
        raise ValueError
    if hint is int and isinstance(value, float) and value != int(value):
        raise ValueError
    return hint(value)


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return f"{_described(arguments[0])}, or null"
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is dict:
        return "pairs such as 1:2,2:4"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(hint, "names")
