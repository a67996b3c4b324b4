"""Arms of a comparison: a recipe with parts left out, what its runs gave, and what they say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moebert_kernels.data.tasks import Task
from moebert_kernels.distill.recipe import Recipe
from moebert_kernels.errors import UserError
from moebert_kernels.files import replacing
from moebert_kernels.study.paired import Judged, bootstrap_interval, bootstrap_scores, paired_t

Record = Mapping[str, Any]  # of one run: task, arm, seed, score, teacher_score, predictions, seconds
ROUNDS = 1000  # of the bootstrap
_FEATURES = {"loss_weights.embedding": 0, "loss_weights.hidden": 0}
_NO_SENTENCES = {"loss_weights.alignment": 0, "loss_weights.adversarial": 0}


@dataclass(frozen=True)
class Arm:
    """What a comparison changes in its recipe."""

    label: str
    values: Mapping[str, Any] = field(default_factory=dict)
    dense_teacher: bool = False  # a fine-tuned dense model in place of the mixture of experts


ARMS = {
    "full": Arm("full"),
    "no-fal": Arm("-FAL", {"loss_weights.alignment": 0}),
    "no-gan": Arm("-GAN", {"loss_weights.adversarial": 0}),
    "no-moe": Arm("-MoE", dense_teacher=True),
    "no-hidden": Arm("-hidden", _FEATURES),
    "lean": Arm("lean", _FEATURES | {"loss_weights.adversarial": 0, "objective_options.pool_first": True}),
    "kd": Arm("KD only", _FEATURES | _NO_SENTENCES),
    "finetune": Arm("fine-tuned alone", _FEATURES | _NO_SENTENCES | {"loss_weights.soft": 0, "loss_weights.task": 1}),
}
DEFAULT_ARMS = ("full", "no-fal", "no-gan", "no-moe", "no-hidden", "kd")


def recipe_of_arm(recipe: Recipe, arm: str) -> Recipe:
    """The recipe as an arm changes it.

    The epochs of a stage that it leaves without a term go to the last one: all arms train for as many epochs in all.
    """
    changed = recipe.with_values(ARMS[arm].values)
    kept = [stage.name for stage in changed.active]
    idle = [stage for stage in recipe.active if stage.name not in kept]
    if not idle:
        return changed
    last = changed.active[-1]
    values = {
        f"{last.name}.{name}": sum(stage.settings[name] for stage in (last, *idle))
        for name in ("num_train_epochs", "max_steps")
        if name in last.settings and all(name in stage.settings for stage in idle)
    }
    return changed.with_values(values)


def repeated_arms(recipe: Recipe, arms: Iterable[str]) -> dict[str, str]:
    """Arms that do what "full" or another one before them does, with that one's name."""
    seen = {_does(recipe, False): "full"}
    repeated = {}
    for arm in arms:
        first = seen.setdefault(_does(recipe_of_arm(recipe, arm), ARMS[arm].dense_teacher), arm)
        if first != arm:
            repeated[arm] = first
    return repeated


def _does(recipe: Recipe, dense_teacher: bool) -> str:
    """What tells the arms apart: all settings, without weights of 0."""
    stages = [(stage.name, sorted({**stage.settings, "loss_weights": sorted(stage.weights.items())}.items(), key=str))
              for stage in recipe.active]  # fmt: skip
    return repr((stages, dense_teacher))


def summary(
    records: Iterable[Record], tasks: Mapping[str, Task], references: Mapping[str, Sequence[Any]],
    arms: Sequence[str], rounds: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores, retentions and differences of arms over tasks and seeds, JSON-able.

    Args:
        records: runs; seeds for which an arm or a task lacks one are left out.
        tasks, references: by name; the examples' true labels or scores, in the order of the predictions.
        arms: in the order of the table; the first is the baseline, which the others are compared with.
        rounds: of the bootstrap; None: `ROUNDS`.

    Returns:
        "tasks", "metrics", "seeds", "examples" and "arms": of each its "score" by task, the "average" over tasks and
        the "retention" (the mean over tasks of student / teacher; None where a teacher's score is not above 0), each
        {"mean", "sd", "values"} over seeds, the "teacher" scores, and the "difference" from the baseline: "mean" over
        tasks and seeds, "p" of the paired t-test over them, "low" and "high" of the 95 % bootstrap interval over
        examples.

    Raises:
        UserError: no seed is complete.
    """
    baseline = arms[0]
    runs = {(record["arm"], record["task"], record["seed"]): record for record in records}
    seeds = [
        seed
        for seed in sorted({seed for _, _, seed in runs})
        if all((arm, task, seed) in runs for arm in arms for task in tasks)
    ]
    if not seeds:
        raise UserError(f"ablation: expected a seed with runs of {', '.join(arms)} on {', '.join(tasks)}, got none")
    resampled = {}
    for arm in arms:
        judged = {
            name: Judged(task, references[name], [runs[arm, name, seed]["predictions"] for seed in seeds])
            for name, task in tasks.items()
        }
        resampled[arm] = bootstrap_scores(judged, rounds or ROUNDS)

    def of(arm: str, key: str, task: str, seed: int) -> float:
        return runs[arm, task, seed][key]

    entries = {}
    for arm in arms:
        scores = {task: [of(arm, "score", task, seed) for seed in seeds] for task in tasks}
        teacher = {task: [of(arm, "teacher_score", task, seed) for seed in seeds] for task in tasks}
        kept = None  # a teacher at or below 0, which a correlation can be, leaves nothing to keep
        if min(map(min, teacher.values())) > 0.0:
            shares = [np.divide(scores[task], teacher[task]) for task in tasks]
            kept = spread([float(share) for share in np.mean(shares, axis=0)])
        differences = [
            of(arm, "score", task, seed) - of(baseline, "score", task, seed) for task in tasks for seed in seeds
        ]
        low, high = bootstrap_interval(resampled[arm], resampled[baseline])
        entries[arm] = {
            "label": ARMS[arm].label,
            "score": {task: spread(values) for task, values in scores.items()},
            "average": spread([statistics.mean(values) for values in zip(*scores.values(), strict=True)]),
            "retention": kept,
            "teacher": {task: spread(values) for task, values in teacher.items()},
            "seconds": statistics.mean(of(arm, "seconds", task, seed) for task in tasks for seed in seeds),
            "difference": {
                "mean": statistics.mean(differences), "p": paired_t(differences), "low": low, "high": high,
            },
        }  # fmt: skip
    return {
        "tasks": list(tasks),
        "metrics": {name: task.main_metric for name, task in tasks.items()},
        "examples": {name: len(references[name]) for name in tasks},
        "seeds": seeds,
        "baseline": baseline,
        "arms": entries,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation of a few values, and the values."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": sd, "values": list(values)}


def points(entry: Mapping[str, Any]) -> str:
    """A share and its spread over the seeds, in percent."""
    text = f"{100 * entry['mean']:.1f}"
    return text if entry["sd"] is None else f"{text} ± {100 * entry['sd']:.1f}"


def table(report: Mapping[str, Any]) -> str:
    """A `summary` as Markdown."""
    tasks, baseline = report["tasks"], report["arms"][report["baseline"]]["label"]
    names = [f"{task} ({report['metrics'][task]})" for task in tasks]
    teachers: dict[str, str] = {}
    for entry in report["arms"].values():
        cells = " | ".join(points(entry["teacher"][task]) for task in tasks)
        average = statistics.mean(entry["teacher"][task]["mean"] for task in tasks)
        teachers.setdefault(f"| {cells} | {100 * average:.1f} | | | | |", entry["label"])
    lines = [
        f"Scores in %, mean ± standard deviation over {len(report['seeds'])} seeds, on"
        f" {', '.join(f'{count} {task}' for task, count in report['examples'].items())} examples."
        " `kept` is the mean over tasks of student / teacher.",
        f"`difference`: from {baseline}, over tasks and seeds; p: paired t-test over tasks and seeds; 95 %: paired"
        " bootstrap over examples.",
        "",
        f"| | {' | '.join(names)} | average | kept | difference | p | 95 % |",
        "|---" * (len(tasks) + 6) + "|",
    ]
    for cells, label in teachers.items():
        lines.append(f"| teacher{'' if len(teachers) == 1 else f' of {label}'} {cells}")
    for arm, entry in report["arms"].items():
        cells = " | ".join(points(entry["score"][task]) for task in tasks)
        change = entry["difference"]
        compared = "| | "
        if arm != report["baseline"]:
            p = "" if change["p"] is None else f"{change['p']:.3f}"
            low, high = (f"{100 * change[side]:+.1f}" for side in ("low", "high"))
            compared = f"{100 * change['mean']:+.1f} | {p} | {low} to {high}"
        kept = "" if entry["retention"] is None else points(entry["retention"])
        lines.append(f"| {entry['label']} | {cells} | {points(entry['average'])} | {kept} | {compared} |")
    return "\n".join(lines) + "\n"


def draw(report: Mapping[str, Any], file: Path, title: str) -> None:
    """Averages over tasks of all arms, as PNG: each seed a point, means with standard errors, the teacher a line."""
    from matplotlib.figure import Figure

    arms = list(report["arms"].values())
    figure = Figure(figsize=(1.2 * len(arms) + 2.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for at, entry in enumerate(arms):
        values = [100 * value for value in entry["average"]["values"]]
        axis.scatter([at] * len(values), values, color="#1b6ca8", alpha=0.4, s=22)
        error = 100 * (entry["average"]["sd"] or 0.0) / math.sqrt(len(values))
        axis.errorbar(at, statistics.mean(values), yerr=error, color="#0b3c5d", marker="o", capsize=5)
        axis.annotate(f"{statistics.mean(values):.1f}", (at, statistics.mean(values)), xytext=(8, -3),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    teacher = statistics.mean(entry["mean"] for entry in arms[0]["teacher"].values())
    axis.axhline(100 * teacher, color="#777777", linestyle="--", label=f"teacher of {arms[0]['label']}")
    axis.set_xticks(range(len(arms)), [entry["label"] for entry in arms])
    axis.set_ylabel("mean of the tasks' scores, %")
    axis.margins(x=0.12, y=0.15)
    axis.legend()
    axis.set_title(title)
    with replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
