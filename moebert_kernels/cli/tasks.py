"""Several tasks in one model: what `moebert finetune` with several --task does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebert_kernels.cli import inputs
from moebert_kernels.cli.outputs import claim
from moebert_kernels.cli.recipe import finish, prepared, print_recipe
from moebert_kernels.errors import UserError

_DATA = "data: expected TASK=FOLDER, or TASK=NAME for a dataset on the Hub, for tasks among {tasks}, got {got}"


def known_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Tasks with one label or score per row, by name.

    Raises:
        UserError: no name, one twice, or one of a task of another kind or with unknown classes.
    """
    from moebert_kernels.data.tasks import get_task

    if not names or len(set(names)) < len(names):
        raise UserError(f"task: expected different tasks, got {', '.join(names) or 'none'}")
    tasks = {}
    for name in names:
        if name == "custom" or get_task(name).kind not in ("classification", "regression"):
            raise UserError(f"task: expected tasks of GLUE, which several can share a model, got {name!r}")
        tasks[name] = get_task(name)
    return tasks


def refuse_for_tasks(**options: Any) -> None:
    """Raise UserError for the first of these options that is given: they are for one task."""
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name.replace('_', '-')}: expected it with one --task alone, got {value!r}")


def finetune_tasks(
    name: str, tasks: Sequence[str], texts: inputs.Texts, output: Path, recipe: Any, temperature: float, resume: bool
) -> None:
    """Train one task-routed model on several tasks, judged by the mean of their main metrics."""
    from moebert_kernels.distill.loading import load_as_saved, load_tokenizer
    from moebert_kernels.distill.multi_task import MEAN, JoinedTasks, MultiTaskEvaluator, load_report
    from moebert_kernels.distill.run import train_stages
    from moebert_kernels.layers import moe_config

    known, files = known_tasks(tasks), data_by_task(texts.data, tasks)
    student, tokenizer = load_as_saved(name).float(), load_tokenizer(name)  # bfloat16 would round most steps away
    moe = moe_config(student.config)
    if moe is None or moe.task_labels is None:
        raise UserError(
            f"model: expected one with a head for each of several tasks, got a {type(student).__name__} in {name};"
            " moebert convert --router task makes one"
        )
    for task_name in known:
        moe.task_id(task_name)  # which refuses others
    facts: dict[str, Any] = {"task": list(tasks), "hold_out": texts.hold_out, "task_temperature": temperature}
    max_length = recipe.common("max_length")
    print_recipe(recipe, {"max_length": max_length})
    splits: dict[str, Any] = {}
    evaluators: dict[str, Any] = {}
    for task_name, task in known.items():
        loaded = inputs.load_data(task, files.get(task_name), "train", texts.hold_out)
        reader = inputs.Reader(loaded, student.config, tokenizer, max_length)
        splits[task_name], evaluators[task_name], of_task = prepared(reader, task_name)
        facts |= of_task
    main = {task_name: task.main_metric for task_name, task in known.items()}
    claim(output, "finetune")
    result = train_stages(
        student,
        recipe,
        JoinedTasks(splits, moe.tasks or (), temperature=temperature),
        output_dir=output,
        evaluate=MultiTaskEvaluator(evaluators, main),
        best_metric=MEAN,
        identity=facts,
        resume=resume,
    )
    print("\n".join(load_report(student)))
    finish(result, "the mean")


def data_by_task(data: Sequence[str] | None, tasks: Sequence[str]) -> dict[str, list[str]]:
    """What --data says, by task; of one task its name may be left out."""
    found: dict[str, list[str]] = {}
    for entry in data or ():
        task, equals, place = entry.partition("=")
        if len(tasks) == 1 and task != tasks[0]:
            task, equals, place = tasks[0], "=", entry
        if not equals or task not in tasks:
            raise UserError(_DATA.format(tasks=", ".join(tasks), got=entry))
        found.setdefault(task, []).append(place)
    return found
