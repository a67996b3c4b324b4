"""From a command's words to a recipe, and from a recipe to a trained model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli.outputs import claim
from moebert_kernels.cli.running import print_metrics, print_settings
from moebert_kernels.errors import UserError, about

if TYPE_CHECKING:
    from moebert_kernels.data.tasks import Task
    from moebert_kernels.distill.recipe import Recipe
    from moebert_kernels.distill.run import RunResult

_OWN = ("seed", "max_length", "doc_stride")  # options of the commands that a recipe can say too

_OF_TEACHER = ("objective_options", "teacher_dropout", "teacher_outputs", "teacher_outputs_dtype")


def recipe_of(ctx: typer.Context, config: str | None, settings: Mapping[str, Any] | None = None) -> Recipe:
    """What a command was told: its --config, or else `settings`, with the values of the command line.

    Raises:
        UserError: an unknown name, with the nearest known one, or a value that cannot be one of it.
    """
    from moebert_kernels.distill.recipe import Recipe, Stage, load_recipe

    if settings is None or config is not None:
        recipe = load_recipe(config or "")
    else:
        recipe = Recipe(f"moebert {ctx.command.name}", (Stage(settings=dict(settings)),))
    own = {
        name: ctx.params[name] for name in _OWN
        if name in ctx.params and ctx.get_parameter_source(name).name == "COMMANDLINE"
    }  # fmt: skip
    return recipe.with_values(own | arguments(ctx.args))


def arguments(words: Sequence[str]) -> dict[str, Any]:
    """["--key", "value", "--flag", "--other=value"] as a mapping; several values of a key are a list."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UserError(f"options: expected --NAME VALUE, got {word}")
        values = [value] if equals else []
        while rest and not equals and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        values = [os.path.expanduser(one) for one in values]  # of --teacher_outputs=~/kept, which a shell leaves alone
        found[key.replace("-", "_")] = "true" if not values else values[0] if len(values) == 1 else values
    return found


def check_settings(output: Path, recipe: Recipe, resume: bool, **facts: Any) -> None:
    """Refuse an `output` with a run of other settings before any data is read; see `train_stages` for the rest.

    And settings of a teacher where there is none to follow.
    """
    from moebert_kernels.distill.run import check_folder

    for name in () if recipe.needs_teacher else _OF_TEACHER:
        for stage in recipe.active:
            if value := stage.settings.get(name):
                raise UserError(f"{name}: expected none without a teacher that is followed, got {value!r}")
    if resume:
        check_folder(output, recipe.active[-1], facts)


def print_recipe(recipe: Recipe, lengths: Mapping[str, Any]) -> None:
    """Print what each stage does, as it would be typed."""
    from moebert_kernels.distill.run import DEFAULTS

    for stage in recipe.active:
        print_settings(
            {"seed": DEFAULTS["seed"], **stage.settings, **lengths},
            prefix=f"{stage.name}." if len(recipe.active) > 1 else "",
        )


def load_teacher(name: str, task: Task) -> Any:
    """A teacher for one task: as it is, or of a task-routed MoE the dense model that it is for the task.

    Raises:
        UserError: no such model, or one of another task or with other classes.
    """
    from moebert_kernels.convert import merge
    from moebert_kernels.distill.loading import check_labels, load_as_saved, load_config, load_model
    from moebert_kernels.layers import moe_config

    with about("teacher", "model"):
        moe = moe_config(load_config(name))
        if moe is not None and moe.is_task_routed:
            teacher = merge(load_as_saved(name), task.name)
            check_labels(task, teacher.config)
            return teacher
        return load_model(name, task)


def train_by_recipe(
    command: str, recipe: Recipe, model: str, teacher: str | None, loaded: Any, output: Path, *, new_head: bool = True,
    extra_text: Path | None = None, corrupted_copies: int = 0, hold_out: str | None = None, resume: bool = True,
) -> tuple[RunResult, Any]:  # fmt: skip
    """Train a model on a task; the run's result, and the model with the best weights."""
    import torch

    from moebert_kernels.data import extra
    from moebert_kernels.distill.identity import check_vocabularies
    from moebert_kernels.distill.loading import load_model, load_tokenizer
    from moebert_kernels.distill.run import DEFAULTS, train_stages

    loaded.split("train"), loaded.split("validation")
    tokenizer = load_tokenizer(model)
    seed = recipe.common("seed")
    seed = DEFAULTS["seed"] if seed is None else seed
    torch.manual_seed(seed)  # a new head's weights come from torch's generator
    student = load_model(model, loaded.task, new_head=new_head).float()  # bfloat16 would round most steps away
    guide = None
    if recipe.needs_teacher:
        if teacher is None:
            raise UserError(f"teacher: expected one for {recipe.name}, got none")
        check_vocabularies(tokenizer, load_tokenizer(teacher))
        guide = load_teacher(teacher, loaded.task)
        if any(stage.objective == "layerwise" for stage in recipe.active):
            _check_student(student, guide, model)
    given = (recipe.common("max_length"), recipe.common("doc_stride"))
    reader = inputs.Reader(loaded, student.config, tokenizer, *given)
    print_recipe(recipe, {"max_length": reader.max_length, "doc_stride": reader.doc_stride})
    train, evaluator, facts = prepared(reader)
    facts |= {"task": loaded.task.name, "hold_out": hold_out}
    for name, asked in (("extra-text", extra_text), ("corrupted-copies", corrupted_copies)):
        if asked and guide is None:
            raise UserError(f"{name}: expected a teacher to follow on texts without labels, got none")
    if extra_text is not None:
        train = extra.with_extra_text(train, extra.extra_text(loaded.task, extra_text))
    if corrupted_copies:
        train = extra.with_corrupted_copies(train, corrupted_copies, seed)
    if extra_text is not None or corrupted_copies:
        facts["texts without labels"] = train.fingerprint
    claim(output, command)
    result = train_stages(
        student,
        recipe,
        train,
        output_dir=output,
        evaluate=evaluator,
        best_metric=loaded.task.main_metric,
        greater_is_better=loaded.task.greater_is_better,
        teacher=guide,
        identity=facts,
        resume=resume,
    )
    return result, student


def prepared(reader: inputs.Reader, of: str = "") -> tuple[Any, Any, dict[str, Any]]:
    """The training data, what judges on the validation data, and the facts that a run on them must keep to.

    The tokenizer is told how the texts are cut. `of` stands before the facts of one of several tasks.
    """
    from moebert_kernels.distill.loading import keep_lengths

    task, lengths = reader.data.task.name, {"max_length": reader.max_length, "doc_stride": reader.doc_stride}
    keep_lengths(reader.tokenizer, task, **lengths)
    facts = {f"{name} of {of}" if of else name: length for name, length in lengths.items()}
    return reader.split("train"), reader.evaluator("validation"), facts


def _check_student(student: Any, teacher: Any, name: str) -> None:
    """Raise UserError for a dense student that is as wide as its teacher: nobody means to train that."""
    from moebert_kernels.convert.sites import common_width, find_sites
    from moebert_kernels.distill.loading import is_moe

    if is_moe(student.config):
        return
    kind, ours, theirs = student.config.model_type, find_sites(student), find_sites(teacher)
    if kind != teacher.config.model_type or common_width(ours) >= common_width(theirs):
        raise UserError(
            f"model: expected a MoE checkpoint, or a dense one narrower than the teacher, got {name}, which is a dense"
            f" {kind}; moebert convert makes a MoE"
        )


def finish(result: RunResult, metric: str) -> None:
    """Print where a run ended, and leave its processes."""
    from moebert_kernels.distill.processes import end_processes

    print_metrics(result.best_metrics, f"best on validation by {metric}, step {result.best_step}")
    print(f"saved in {result.model_dir}")
    end_processes()
