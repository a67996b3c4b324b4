"""What `moebert distill --recipe` does: a student trained by a recipe, with any of its values given as --KEY VALUE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli.outputs import claim
from moebert_kernels.cli.running import print_settings, run_settings
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from moebert_kernels.data.tasks import Task
    from moebert_kernels.distill.config import FitResult
    from moebert_kernels.distill.recipe import Recipe

_WITHOUT_RECIPE = ("distill_weight", "preset", "doc_stride", "label_smoothing", "gradient_mask", "shared_fold")


class Trained(NamedTuple):
    """A training run's result, and the student with the best weights."""

    result: FitResult
    student: Any


def given(ctx: typer.Context) -> dict[str, Any]:
    """The command's own options that stand on the command line, by parameter name."""
    return {name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name).name == "COMMANDLINE"}


def no_further_options(ctx: typer.Context) -> None:
    """Raise UserError for what is neither an option of the command nor, without a recipe, anything else."""
    from moebert_kernels.distill.recipe import nearest

    if ctx.args:
        known = [option for parameter in ctx.command.params for option in parameter.opts]
        name = ctx.args[0].partition("=")[0]
        raise UserError(f"{name}: expected an option of moebert {ctx.command.name}, got none{nearest(name, known)}")


def recipe_of(ctx: typer.Context, name: str) -> Recipe:
    """The recipe with the values of the command line: options of the command's own, and any --KEY VALUE.

    Raises:
        UserError: an unknown key or value, or an option that no recipe knows.
    """
    from moebert_kernels.distill.recipe import keys, load_recipe

    ours = given(ctx)
    for option in _WITHOUT_RECIPE:
        if option in ours:
            raise UserError(f"{option.replace('_', '-')}: expected it without --recipe, got {ours[option]}")
    values = {key: value for key, value in ours.items() if key in keys()}
    return load_recipe(name).with_values(values | _pairs(ctx.args))


def _pairs(words: Sequence[str]) -> dict[str, str]:
    """["--key", "value", "--other=value"] as a mapping; - and _ in a key are the same."""
    pairs: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or (not equals and not rest):
            raise UserError(f"recipe: expected --KEY VALUE, got {word}")
        pairs[key.replace("-", "_")] = value if equals else rest.pop(0)
    return pairs


def print_recipe(recipe: Recipe, max_length: int, seed: int) -> None:
    """Print what each stage does, in the recipe's keys, as they would be typed."""
    from moebert_kernels.distill.microbert import TERMS

    for stage in recipe.active:
        terms = {name: getattr(stage, name) for name in ("labels", "balance", *stage.terms)}
        more = {
            field.name: getattr(stage, field.name)
            for field in fields(stage)
            if field.name not in ("name", *TERMS) and getattr(stage, field.name) != field.default
        }
        prefix = f"{stage.name}." if len(recipe.active) > 1 else ""
        print_settings(terms | more | run_settings(stage) | {"max_length": max_length, "seed": seed}, prefix)


def load_teacher(name: str, task: Task) -> Any:
    """A teacher for one task: as it is, or of a task-routed MoE the dense model that it is for the task.

    Raises:
        UserError: no such model, or one of another task or with other classes.
    """
    from moebert_kernels.convert import merge
    from moebert_kernels.distill.loading import check_labels, load_as_saved, load_config, load_model
    from moebert_kernels.layers import moe_config

    moe = moe_config(load_config(name))
    if moe is not None and moe.is_task_routed:
        teacher = merge(load_as_saved(name), task.name)
        check_labels(task, teacher.config)
        return teacher
    return load_model(name, task)


def train_by_recipe(
    recipe: Recipe, model: str, teacher: str | None, loaded: Any, output: Path, *, seed: int, cache: Path | None = None,
    cache_dtype: str | None = None, extra_text: Path | None = None, hold_out: str | None = None, resume: bool = True,
) -> Trained:  # fmt: skip
    """Train a student on a task."""
    import torch

    from moebert_kernels.distill.loading import keep_lengths, load_model, load_tokenizer
    from moebert_kernels.distill.student import (
        check_vocabularies,
        fit_recipe,
        tokenizer_facts,
        with_extra_text,
    )  # fmt: skip
    from moebert_kernels.distill.student import (
        extra_text as read_extra_text,
    )

    loaded.split("train"), loaded.split("validation")
    tokenizer = load_tokenizer(model)
    torch.manual_seed(seed)  # a new head's weights come from torch's own generator
    student = load_model(model, loaded.task, new_head=True)
    loaded = inputs.labels_as_in(loaded, student.config)
    guide = None
    if recipe.needs_teacher:
        if teacher is None:
            raise UserError(f"teacher: expected one for the recipe {recipe.name}, got none")
        check_vocabularies(tokenizer, load_tokenizer(teacher))
        guide = load_teacher(teacher, loaded.task)
    lengths = {stage.max_length for stage in recipe.active}
    if len(lengths) > 1:
        raise UserError(f"max_length: expected the same in every stage, got {' and '.join(sorted(map(str, lengths)))}")
    length, _ = inputs.lengths_for(student.config, loaded.task, tokenizer, lengths.pop())
    keep_lengths(tokenizer, loaded.task.name, length)
    train, validation = (
        inputs.tokenized(loaded, split, tokenizer, length, None, student.config) for split in ("train", "validation")
    )
    print_recipe(recipe, length, seed)
    facts = inputs.run_facts(loaded, tokenizer, student, length, None, hold_out=hold_out, recipe=recipe.name)
    if extra_text is not None:
        if not any("soft" in stage.terms for stage in recipe.active):
            raise UserError("extra-text: expected a recipe with soft targets, as texts without labels need, got none")
        train = with_extra_text(train, read_extra_text(loaded.task, extra_text), loaded.task, tokenizer, length)
        facts["texts without labels"] = train.fingerprint
    claim(output, "distill")
    result = fit_recipe(
        student,
        recipe,
        train,
        task=loaded.task,
        output_dir=output,
        teacher=guide,
        cache=cache,
        cache_dtype=cache_dtype,
        cache_inputs=tokenizer_facts(tokenizer, length),
        evaluate=inputs.evaluator(loaded, "validation", validation, tokenizer, None, None, student.config),
        seed=seed,
        identity=facts,
        also_save=tokenizer.save_pretrained,
        resume=resume,
    )
    return Trained(result, student)
