"""`moebert finetune` and `moebert distill`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import check_run, claim
from moebert_kernels.cli.recipe import no_further_options, recipe_of, train_by_recipe
from moebert_kernels.cli.running import print_metrics, print_settings, run_settings
from moebert_kernels.cli.tasks import finetune_tasks, known_tasks, refuse_for_tasks
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from moebert_kernels.distill.config import FitConfig, FitResult


def finetune(
    model: o.ModelName,
    task: o.TaskNames,
    output: o.OutputFolder,
    data: o.Data = None,
    seed: o.Seed = 0,
    text_column: o.TextColumns = None,
    label_column: o.LabelColumn = "label",
    regression: o.Regression = False,
    hold_out: o.HoldOut = None,
    max_length: o.MaxLength = None,
    doc_stride: o.DocStride = None,
    batch_size: o.BatchSize = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    learning_rate: o.LearningRate = None,
    router_learning_rate: o.RouterLearningRate = None,
    accumulation: o.Accumulation = 1,
    weight_decay: o.WeightDecay = None,
    warmup_ratio: o.WarmupRatio = 0.0,
    mixed_precision: o.MixedPrecision = "no",
    eval_steps: o.EvalSteps = None,
    save_steps: o.SaveSteps = 500,
    patience: o.Patience = None,
    label_smoothing: o.LabelSmoothing = 0.0,
    gradient_mask: o.GradientMask = 0.0,
    shared_fold: o.SharedFold = False,
    task_temperature: o.TaskTemperature = 1.0,
    restart: o.Restart = False,
    force: o.ForceRestart = False,
) -> None:
    """Fine-tune a pretrained model on a task, or on several: the teacher. Writes OUTPUT/best, judged on validation."""
    from moebert_kernels.distill.loading import load_model, load_tokenizer
    from moebert_kernels.distill.multi_task import MEAN
    from moebert_kernels.distill.presets import DEFAULT, preset_for

    check_run(output, "finetune", restart, force, model)
    inputs.check_models(model=model)
    if len(task) > 1:
        refuse_for_tasks(
            text_column=text_column, label_column=None if label_column == "label" else label_column,
            regression=regression or None, doc_stride=doc_stride, label_smoothing=label_smoothing or None,
            gradient_mask=gradient_mask or None,
        )  # fmt: skip
        first = next(iter(known_tasks(task).values()))
        config = _fit_config(
            DEFAULT, first, seed, epochs, max_steps, learning_rate, batch_size, accumulation,
            weight_decay, warmup_ratio, mixed_precision, eval_steps, save_steps, patience, shared_fold=shared_fold,
            router_learning_rate=router_learning_rate,
        )  # fmt: skip
        config = replace(config, best_metric=MEAN)
        finetune_tasks(model, task, data, hold_out, output, config, task_temperature, max_length, not restart)
        return
    if task_temperature != 1.0:
        raise UserError(f"task-temperature: expected it with several --task alone, got {task_temperature}")
    wanted = inputs.make_task(task[0], text_column, label_column, regression)
    loaded = inputs.load_data(wanted, data, "train", hold_out)
    loaded.split("train"), loaded.split("validation")
    tokenizer = load_tokenizer(model)
    _seed_new_weights(seed)
    student = load_model(model, loaded.task, new_head=True)
    preset = preset_for(task[0])
    config = _fit_config(
        preset, loaded.task, seed, epochs, max_steps, learning_rate, batch_size, accumulation,
        weight_decay, warmup_ratio, mixed_precision, eval_steps, save_steps, patience, label_smoothing=label_smoothing,
        shared_fold=shared_fold, router_learning_rate=router_learning_rate,
    )  # fmt: skip
    result = _train(
        "finetune", student, tokenizer, loaded, config, output, max_length, doc_stride, not restart, gradient_mask,
        {"hold_out": hold_out},
    )  # fmt: skip
    _say(result, loaded.task.main_metric)


def distill(
    ctx: typer.Context,
    model: o.ModelName,
    task: o.TaskName,
    output: o.OutputFolder,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="The fine-tuned dense model; with --recipe also a task-routed MoE. Default: none, which a few recipes"
            " allow.",
        ),
    ] = None,
    recipe: o.RecipeName = None,
    extra_text: o.ExtraText = None,
    data: o.Data = None,
    seed: o.Seed = 0,
    distill_weight: Annotated[
        float | None,
        typer.Option(
            "--distill-weight",
            min=0.0,
            help="Of the distillation terms; the task's loss has 1. Default: by task, see below.",
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            help="default masks padding; paper is the published loss, for a model converted with --route-padding.",
        ),
    ] = "default",
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="Keep the teacher's outputs in this folder: computed once for several students. Default: not kept.",
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            "--cache-dtype",
            help="float32, float16 or bfloat16. Default: float16; with --recipe the teacher's own, float32 as a rule.",
        ),
    ] = None,
    teacher_dropout: Annotated[
        bool, typer.Option("--teacher-dropout", help="Leave the teacher's dropout on, as the original code did.")
    ] = False,
    text_column: o.TextColumns = None,
    label_column: o.LabelColumn = "label",
    regression: o.Regression = False,
    hold_out: o.HoldOut = None,
    max_length: o.MaxLength = None,
    doc_stride: o.DocStride = None,
    batch_size: o.BatchSize = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    learning_rate: o.LearningRate = None,
    router_learning_rate: o.RouterLearningRate = None,
    accumulation: o.Accumulation = 1,
    weight_decay: o.WeightDecay = None,
    warmup_ratio: o.WarmupRatio = 0.0,
    mixed_precision: o.MixedPrecision = "no",
    eval_steps: o.EvalSteps = None,
    save_steps: o.SaveSteps = 500,
    patience: o.Patience = None,
    label_smoothing: o.LabelSmoothing = 0.0,
    gradient_mask: o.GradientMask = 0.0,
    shared_fold: o.SharedFold = False,
    restart: o.Restart = False,
    force: o.ForceRestart = False,
) -> None:
    """Train a converted MoE model to follow its teacher layer by layer, or a small dense student by a --recipe, whose
    values any further --KEY VALUE overrides. Writes OUTPUT/best."""
    from moebert_kernels.distill.loading import check_reach, is_moe, load_config, load_model, load_tokenizer
    from moebert_kernels.distill.presets import preset_for
    from moebert_kernels.distill.teacher_cache import TeacherCache
    from moebert_kernels.distill.token_objective import TokenObjective

    check_run(output, "distill", restart, force, model, teacher)
    inputs.check_models(model=model, teacher=teacher)
    if distill_weight is not None and not math.isfinite(distill_weight):
        raise UserError(f"distill-weight: expected a number of at least 0, got {distill_weight}")
    if recipe is not None:
        chosen = recipe_of(ctx, recipe)
        wanted = inputs.make_task(task, text_column, label_column, regression, teacher)
        trained = train_by_recipe(
            chosen, model, teacher, inputs.load_data(wanted, data, "train", hold_out), output, seed=seed, cache=cache,
            cache_dtype=cache_dtype, extra_text=extra_text, hold_out=hold_out, resume=not restart,
        )  # fmt: skip
        _say(trained.result, wanted.main_metric)
        return
    no_further_options(ctx)
    for name, value in (("teacher", teacher), ("extra-text", extra_text)):
        if (name == "teacher") == (value is None):
            expected = "one" if value is None else "it with --recipe alone"
            raise UserError(f"{name}: expected {expected}, got {'none' if value is None else value}")
    if is_moe(config := load_config(teacher)):
        raise UserError(f"teacher: expected a dense model, got a MoE (model_type {config.model_type!r})")
    wanted = inputs.make_task(task, text_column, label_column, regression, teacher)
    loaded = inputs.load_data(wanted, data, "train", hold_out)
    loaded.split("train"), loaded.split("validation")
    tokenizer = load_tokenizer(model)
    student, guide = load_model(model, loaded.task), load_model(teacher, loaded.task)
    values = preset_for(task)
    weight = values.distill_weight if distill_weight is None else distill_weight
    objective = _objective(loaded.task, student, preset, cache)
    if isinstance(objective, TokenObjective):  # follows predictions alone, whatever the widths
        terms: tuple[str, ...] = ("prediction",)
    else:
        terms = ("hidden", "prediction")
        _check_student(student, guide, model)
    config = _fit_config(
        values, loaded.task, seed, epochs, max_steps, learning_rate, batch_size, accumulation,
        weight_decay, warmup_ratio, mixed_precision, eval_steps, save_steps, patience, label_smoothing=label_smoothing,
        shared_fold=shared_fold, router_learning_rate=router_learning_rate,
        weights=dict.fromkeys(terms, weight), teacher_dropout=teacher_dropout,
    )  # fmt: skip

    def teacher_for(batches: Any) -> Any:
        check_reach("teacher", guide.config, max(int(batches.features.lengths.max()), batches.pad_to or 0))
        return guide if cache is None else TeacherCache.build(
            guide, batches, cache, dtype=cache_dtype or "float16", device=inputs.device()
        )  # fmt: skip

    result = _train(
        "distill", student, tokenizer, loaded, config, output, max_length, doc_stride, not restart, gradient_mask,
        {
            "hold_out": hold_out, "distill_weight": weight, "preset": preset,
            "cache_dtype": cache and (cache_dtype or "float16"),
        },
        objective, teacher_for,
    )  # fmt: skip
    _say(result, loaded.task.main_metric)


def _objective(task: Any, student: Any, preset: str, cache: Path | None) -> Any:
    """Layer by layer for encoders, the predictions of tokens for language models and text to text."""
    from moebert_kernels.distill.objectives import LayerwiseObjective
    from moebert_kernels.distill.token_objective import TokenObjective

    by_token = task.kind == "lm" or student.config.is_encoder_decoder
    if not by_token:
        return LayerwiseObjective(task.kind, preset=cast(Any, preset))  # which refuses unknown names
    if preset != "default":
        raise UserError(f"preset: expected 'default' for a model that predicts tokens, got {preset!r}")
    if cache is not None:
        raise UserError(f"cache: expected none for a model that predicts tokens, got {cache}")
    return TokenObjective(causal=task.kind == "lm")


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


def _fit_config(
    preset: Any, task: Any, seed: int, epochs: int | None, max_steps: int | None, learning_rate: float | None,
    batch_size: int | None, accumulation: int, weight_decay: float | None, warmup_ratio: float, mixed_precision: str,
    eval_steps: int | None, save_steps: int, patience: int | None, **more: Any,
) -> FitConfig:  # fmt: skip
    from moebert_kernels.distill.config import FitConfig

    return FitConfig(
        epochs=epochs or preset.epochs,
        max_steps=max_steps,
        learning_rate=preset.learning_rate if learning_rate is None else learning_rate,
        batch_size=batch_size or max(1, preset.batch_size // accumulation),
        accumulation=accumulation,
        weight_decay=preset.weight_decay if weight_decay is None else weight_decay,
        warmup_ratio=warmup_ratio,
        mixed_precision=mixed_precision,  # type: ignore[arg-type]  # FitConfig checks it
        seed=seed,
        eval_steps=eval_steps,
        save_steps=save_steps,
        patience=patience,
        best_metric=task.main_metric,
        greater_is_better=task.greater_is_better,
        **more,
    )


def _train(
    command: str, student: Any, tokenizer: Any, loaded: Any, config: FitConfig, output: Path, max_length: int | None,
    doc_stride: int | None, resume: bool, gradient_mask: float, options: dict[str, Any], objective: Any = None,
    teacher_for: Any = None,
) -> FitResult:  # fmt: skip
    from moebert_kernels.distill.features import Batches
    from moebert_kernels.distill.loading import keep_lengths
    from moebert_kernels.distill.loop import fit
    from moebert_kernels.nn import GradientMask

    loaded = inputs.labels_as_in(loaded, student.config)
    length, doc_stride = inputs.lengths_for(student.config, loaded.task, tokenizer, max_length, doc_stride)
    keep_lengths(tokenizer, loaded.task.name, length, doc_stride)
    pad_to = inputs.padding_for(student.config, length)
    lengths = {"max_length": length, "doc_stride": doc_stride, "gradient_mask": gradient_mask or None}
    print_settings(run_settings(config) | lengths | options)
    features = {
        split: inputs.tokenized(loaded, split, tokenizer, length, doc_stride, student.config)
        for split in ("train", "validation")
    }
    batches = Batches(features["train"], config.batch_size, config.seed, bucket=pad_to is None, pad_to=pad_to)
    claim(output, command)
    return fit(
        student,
        batches,
        config=config,
        output_dir=output,
        objective=objective,
        teacher=teacher_for(batches) if teacher_for is not None else None,
        evaluate=inputs.evaluator(
            loaded, "validation", features["validation"], tokenizer, None, pad_to, student.config
        ),
        identity=inputs.run_facts(loaded, tokenizer, student, length, doc_stride, **options),
        also_save=tokenizer.save_pretrained,
        gradient_mask=GradientMask(student, gradient_mask, seed=config.seed) if gradient_mask else None,
        resume=resume,
    )


def _seed_new_weights(seed: int) -> None:
    """A new head's weights come from torch's own generator."""
    import torch

    torch.manual_seed(seed)


def _say(result: FitResult, metric: str) -> None:
    print_metrics(result.best_metrics, f"best on validation by {metric}, step {result.best_step}")
    print(f"saved in {result.model_dir}")
