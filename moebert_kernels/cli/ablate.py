"""`moebert ablate`: a recipe with parts left out, on several tasks and seeds, with paired tests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import check_output, claim
from moebert_kernels.cli.recipe import load_teacher, recipe_of, train_by_recipe
from moebert_kernels.cli.tasks import data_by_task, known_tasks
from moebert_kernels.errors import UserError, require_extra

if TYPE_CHECKING:
    from moebert_kernels.distill.recipe import Recipe


def ablate(
    ctx: typer.Context,
    model: list[str],
    teacher: list[str],
    task: list[str],
    output: o.OutputFolder,
    data: o.Data = None,
    dense_teacher: list[str] | None = None,
    config: o.AblationConfig = "microbert",
    arm: list[str] | None = None,
    seeds: o.Number = 3,
    hold_out: o.HoldOut = None,
    max_length: o.MaxLength = None,
) -> None:
    """Train a student by a recipe with parts left out, and compare: a table, a chart, retention and paired tests.

    Scores are of the test split where the data has one, else of validation, which also chooses the checkpoints. Runs
    that are done are not done again. Writes OUTPUT/report.json, table.md and chart.png.

    Args:
        model: The student before training, with or without a head; once, or as TASK=FOLDER once for each task.
        teacher: A task-routed MoE, or fine-tuned models; once, or as TASK=FOLDER once for each task.
        data: TASK=FOLDER, or TASK=NAME for a dataset on the Hub, once for each task; with one --task also what moebert
            finetune takes. Without it, the tasks' own datasets on the Hub.
        task: A task of GLUE (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli); once for each.
        dense_teacher: For the arm no-moe: fine-tuned dense models; once, or as TASK=FOLDER once for each task. Default:
            none.
        arm: full, no-fal, no-gan, no-moe, no-hidden, kd, lean or finetune; once for each. The first is what the others
            are compared with. Default: those of the first six that differ for the recipe, no-moe only with
            --dense-teacher.
        seeds: Runs of each arm on each task.
    """
    from moebert_kernels.distill.identity import check_same, model_files, row_facts
    from moebert_kernels.distill.recipe import flat
    from moebert_kernels.files import once, write_json, write_text
    from moebert_kernels.study.ablation import ARMS, DEFAULT_ARMS, draw, repeated_arms, summary, table

    require_extra("demo", "matplotlib")  # for the chart at the end of hours of training
    tasks = known_tasks(task)
    arms = arm or [name for name in DEFAULT_ARMS if dense_teacher or not ARMS[name].dense_teacher]
    unknown = [name for name in arms if name not in ARMS]
    if unknown or len(set(arms)) < len(arms):
        got = unknown[0] if unknown else ", ".join(arms)
        raise UserError(f"arm: expected some of {', '.join(ARMS)}, each once, got {got}")
    if any(ARMS[name].dense_teacher for name in arms) and not dense_teacher:
        raise UserError("dense-teacher: expected one for the arm no-moe, got none")
    students, teachers, dense = (
        _by_task(name, values, task)
        for name, values in (("model", model), ("teacher", teacher), ("dense-teacher", dense_teacher))
    )
    models = sorted({*students.values(), *teachers.values(), *dense.values()})
    check_output(output, "ablate", *models)
    for option, named in (("model", students), ("teacher", teachers), ("dense-teacher", dense)):
        for one in sorted(set(named.values())):
            inputs.check_models(**{option: one})
    files = data_by_task(data, task)
    chosen = recipe_of(ctx, config)
    for stage in chosen.stages:
        if (seed := stage.settings.get("seed")) is not None:
            raise UserError(f"seed: expected none, as the runs of an arm have --seeds' from 0 on, got {seed}")
    repeated = repeated_arms(chosen, arms)
    if arm and repeated:
        name, first = next(iter(repeated.items()))
        raise UserError(
            f"arm: expected arms that differ for the config {config}, got {name}, which does what {first} does"
        )
    arms = [name for name in arms if name not in repeated]
    data_of = {name: inputs.load_data(known, files.get(name), "train", hold_out) for name, known in tasks.items()}
    identity: dict[str, Any] = {"config": config, "hold_out": hold_out, "model": students, "teacher": teachers}
    identity |= {"dense_teacher": dense} | {f"files of {name}": model_files(name) for name in models}
    for stage in chosen.stages:
        identity |= {f"{stage.name}.{name}": one for name, one in flat(stage.settings).items()}
    for name, loaded in data_of.items():
        identity |= row_facts(loaded, of=name)
    claim(output, "ablate")
    check_same(
        once(output / "identity.json", lambda: identity), identity,
        f"output: expected a new folder, or one of the same recipe, models and data, got {output} with results of",
        " (use another --output)",
    )  # fmt: skip

    length = chosen.common("max_length")
    records, references = [], {}
    for name, loaded in data_of.items():
        for seed in range(seeds):
            for one in arms:
                guide = (dense if ARMS[one].dense_teacher else teachers)[name]
                kind = "dense-teacher" if ARMS[one].dense_teacher else "teacher"
                of_teacher = once(output / "results" / f"{name}-{kind}.json", partial(_teacher, guide, loaded, length))
                words = (f"{name}-{one}-{seed}", students[name], guide, loaded, seed)
                record = once(
                    output / "results" / f"{words[0]}.json", partial(_run, output, chosen, one, length, *words)
                )
                references[name] = record["references"]
                records.append(record | {"task": name, "arm": one, "seed": seed, "teacher_score": of_teacher["score"]})
    report = summary(records, tasks, references, arms)
    write_json(output / "report.json", report)
    write_text(output / "table.md", table(report))
    draw(report, output / "chart.png", f"Students by {config}, {seeds} seeds")
    print(table(report))


def _run(
    output: Path, recipe: Recipe, arm: str, length: int | None, name: str, student: str, teacher: str, loaded: Any,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Train a student and judge it."""
    from moebert_kernels.distill.loading import load_tokenizer
    from moebert_kernels.study.ablation import ARMS, recipe_of_arm

    print(f"\n{name}: {ARMS[arm].label}", flush=True)
    begun = time.monotonic()
    chosen = recipe_of_arm(recipe, arm).with_values({"seed": seed})
    _, trained = train_by_recipe("distill", chosen, student, teacher, loaded, output / "runs" / name)
    seconds = time.monotonic() - begun
    return _judged(trained, load_tokenizer(student), loaded, length) | {"seconds": seconds}


def _teacher(name: str, loaded: Any, length: int | None) -> dict[str, Any]:
    from moebert_kernels.distill.loading import load_tokenizer

    return _judged(load_teacher(name, loaded.task).to(inputs.device()), load_tokenizer(name), loaded, length)


def _judged(model: Any, tokenizer: Any, loaded: Any, length: int | None) -> dict[str, Any]:
    """Predictions on the test split, if the data has one, else on validation, and their main metric.

    Classes have the task's numbers, whatever those of the model are.
    """
    from moebert_kernels.data.metrics import compute_metrics
    from moebert_kernels.data.tasks import label_order

    split = "test" if "test" in loaded.splits else "validation"
    evaluator = inputs.Reader(loaded, model.config, tokenizer, length).evaluator(split)
    predictions, references = evaluator.predict(model), evaluator.references
    if loaded.task.kind == "classification":
        number = label_order(loaded.task, evaluator.task.label_names)
        predictions, references = ([number[answer] for answer in answers] for answers in (predictions, references))
    score = compute_metrics(loaded.task, predictions, references)[loaded.task.main_metric]
    return {"score": score, "split": split, "predictions": predictions, "references": references}


def _by_task(name: str, values: list[str] | None, tasks: Sequence[str]) -> dict[str, str]:
    """One value for all tasks, or TASK=VALUE for each."""
    values = values or []
    found = dict(entry.split("=", 1) for entry in values if entry.partition("=")[0] in tasks and "=" in entry)
    if not values:
        return {}
    if len(values) == 1 and not found:
        return dict.fromkeys(tasks, values[0])
    missing = [task for task in tasks if task not in found]
    if missing or len(found) < len(values):
        got = f"none for {missing[0]}" if missing else ", ".join(values)
        raise UserError(f"{name}: expected one for all tasks, or TASK=FOLDER once for each, got {got}")
    return found
