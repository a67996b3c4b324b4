"""`moebert finetune` and `moebert distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import check_output
from moebert_kernels.cli.recipe import arguments, check_settings, finish, recipe_of, train_by_recipe
from moebert_kernels.cli.tasks import finetune_tasks, known_tasks, refuse_for_tasks
from moebert_kernels.errors import UserError


def finetune(
    ctx: typer.Context,
    model: o.ModelName,
    task: o.TaskNames,
    output: o.OutputFolder,
    texts: inputs.Texts,
    config: o.FinetuneConfig = None,
    seed: o.Seed = 0,
    task_temperature: Annotated[float, typer.Option(min=1.0)] = 1.0,
    force: o.Force = False,
) -> None:
    """Fine-tune a pretrained model on a task, or on several: the teacher. Writes OUTPUT/best, judged on validation.

    Every training argument of transformers is an option by its name.

    Args:
        task_temperature: Of several tasks: 1 draws them in proportion to their data, more draws small ones more often.
    """
    check_output(output, "finetune", model)
    inputs.check_models(model=model)
    inputs.check_trainable(model)
    recipe = recipe_of(ctx, config, _preset(ctx, task[0] if len(task) == 1 else ""))
    if recipe.needs_teacher:
        name, got = ("config", config) if config is not None else ("objective", recipe.active[-1].objective)
        raise UserError(f"{name}: expected one without a teacher, which moebert distill follows, got {got}")
    if len(task) > 1:
        known_tasks(task)
        refuse_for_tasks(
            text_column=texts.text_column, label_column=None if texts.label_column == "label" else texts.label_column,
            regression=texts.regression or None, doc_stride=texts.doc_stride,
        )  # fmt: skip
        check_settings(output, recipe, not force, task=task, hold_out=texts.hold_out)
        finetune_tasks(model, task, texts, output, recipe, task_temperature, not force)
        return
    if task_temperature != 1.0:
        raise UserError(f"task-temperature: expected it with several --task alone, got {task_temperature}")
    check_settings(output, recipe, not force, task=task[0], hold_out=texts.hold_out)
    loaded = texts.load(task[0])
    result, _ = train_by_recipe(
        "finetune", recipe, model, None, loaded, output, hold_out=texts.hold_out, resume=not force
    )  # fmt: skip
    finish(result, loaded.task.main_metric)


def distill(
    ctx: typer.Context,
    model: o.ModelName,
    task: o.TaskName,
    output: o.OutputFolder,
    texts: inputs.Texts,
    teacher: str | None = None,
    config: o.Config = None,
    extra_text: Path | None = None,
    corrupted_copies: Annotated[int, typer.Option(min=0)] = 0,
    seed: o.Seed = 0,
    force: o.Force = False,
) -> None:
    """Train a converted MoE model to follow its teacher layer by layer, or a small dense student as a --config says.
    Writes OUTPUT/best.

    Every training argument of transformers is an option by its name.

    Args:
        teacher: The fine-tuned dense model; with --config also a task-routed MoE. Default: none, which a few recipes
            allow.
        extra_text: Texts without labels to follow the teacher on, a table with the task's text columns. Default: none.
        corrupted_copies: Of each training text, with 15 % of its tokens exchanged, to follow the teacher on without
            labels. Each costs as many steps as the texts.
    """
    from moebert_kernels.distill.loading import is_moe, load_config

    check_output(output, "distill", model, teacher)
    inputs.check_models(model=model, teacher=teacher)
    inputs.check_trainable(model)
    settings = None
    if config is None:
        if teacher is None:
            raise UserError("teacher: expected one, got none")
        if is_moe(of_teacher := load_config(teacher)):
            raise UserError(f"teacher: expected a dense model, got a MoE (model_type {of_teacher.model_type!r})")
        settings = _preset(ctx, task)
        weight, given = settings.pop("distill_weight", 1.0), arguments(ctx.args)
        if "objective" not in given:
            by_token = task == "lm" or load_config(model).is_encoder_decoder
            terms = ("prediction",) if by_token else ("hidden", "prediction")
            settings |= {
                "objective": "tokens" if by_token else "layerwise", "loss_weights": dict.fromkeys(terms, weight),
            }  # fmt: skip
    recipe = recipe_of(ctx, config, settings)
    check_settings(output, recipe, not force, task=task, hold_out=texts.hold_out)
    loaded = texts.load(task, model=teacher)
    result, _ = train_by_recipe(
        "distill", recipe, model, teacher, loaded, output, new_head=config is not None, extra_text=extra_text,
        corrupted_copies=corrupted_copies, hold_out=texts.hold_out, resume=not force,
    )  # fmt: skip
    finish(result, loaded.task.main_metric)


def _preset(ctx: typer.Context, task: str) -> dict[str, Any]:
    """The settings of a task; a batch is its share of what is listed where steps accumulate several."""
    settings = o.preset_for(task)
    del settings["max_length"]  # which holds as far as the model reaches
    if ctx.command.name == "finetune":
        del settings["distill_weight"]
    accumulated = str(arguments(ctx.args).get("gradient_accumulation_steps", 1))
    if accumulated.isdigit() and int(accumulated):
        size = settings["per_device_train_batch_size"] // int(accumulated)
        settings["per_device_train_batch_size"] = max(1, size)
    return settings
