"""Tables and charts of experiments/base_encoder.py; what is missing is named."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from encoder_arms import ARMS, DTYPES, TEACHER
from encoder_latency import PLAIN
from encoder_tasks import FILES, task_named

from moebert_kernels.files import write_text
from moebert_kernels.study.paired import paired_t

MAIN = (TEACHER, "moe", "dense", "half-depth")  # means are over the tasks that all of these have
TOGETHER = ("minilm", "mpnet-32k")  # sets of runs of one kind, whose pairs are also taken together
BASELINES = {"dense-eighth": "moe-eighth"}  # what an arm is compared with; the others with "moe"
SHAPE = "8x128"  # of the table and the chart
INTRODUCTION = (
    "# Accuracy over latency\n\n"
    "A section is a set of runs. Its name begins with the model; then come the training rows (2500) or the tokens that"
    " chose experts (32k, 48k; without either the settings of the script), and what differs: w5 and w20 the weight of"
    " the distillation terms, turn layers that are corrected in turn, u and u1 texts without labels, c1 a corrupted"
    ' copy of each row, e6 six epochs, fp32 the precision. "Kept" is the mean of student / teacher over the tasks that'
    " teacher, chosen experts, dense model and"
    " half depth all have; so are the means. The dense model of an eighth is compared with chosen experts of an eighth,"
    " all else with those of a quarter. Most scores in int8, calibrated or with token scales are of torch's libraries;"
    " speeds are of the package's kernels, in which the three are the same numbers and closer to float32's"
    " ([log](../../docs/experiments.md#2026-11-30-colas-second-seed-again-and-int8-in-the-kernel)). On the Xeon"
    " they are of the time before attention had one.\n\n"
)
LABELS = {TEACHER: "teacher, dense"} | {name: arm.label for name, arm in ARMS.items()}
Run = Mapping[str, Any]
Cells = dict[tuple[str, str, int], Run]  # by arm, task and seed


def best_tries(runs: Sequence[Run]) -> tuple[Cells, dict[tuple[str, int], list[float]]]:
    """Of each cell the run that is best on the held-out rows, among the rates that all students of its task and seed
    have tried; and these rates, by task and seed."""
    by_cell: dict[tuple[str, str, int], dict[float, Run]] = {}
    for run in runs:
        by_cell.setdefault((run["arm"], run["task"], run["seed"]), {})[run["rate"]] = run
    shared: dict[tuple[str, int], set[float]] = {}
    for (arm, task, seed), tries in by_cell.items():
        if arm != TEACHER:
            shared[task, seed] = shared.get((task, seed), set(tries)) & set(tries)
    cells = {}
    for (arm, task, seed), tries in by_cell.items():
        allowed = [run for rate, run in tries.items() if arm == TEACHER or rate in shared[task, seed]]
        if allowed:
            cells[arm, task, seed] = max(allowed, key=lambda run: run["held_out"])
    return cells, {place: sorted(rates) for place, rates in shared.items()}


class Summary:
    """What the runs of one model say together.

    Args:
        runs: of one model.
        tasks, seeds: that are wanted.
    """

    def __init__(self, runs: Sequence[Run], tasks: Sequence[str], seeds: Sequence[int]) -> None:
        self.cells, self.rates = best_tries(runs)
        self.tasks, self.seeds = list(tasks), list(seeds)
        present = {arm for arm, _, _ in self.cells}
        self.arms = [arm for arm in LABELS if arm in present]
        leading = [arm for arm in MAIN if arm in present]
        self.common = [task for task in self.tasks if all(self.of(arm, task) for arm in leading)]

    def of(self, arm: str, task: str) -> list[Run]:
        return [self.cells[arm, task, seed] for seed in self.seeds if (arm, task, seed) in self.cells]

    def score(self, arm: str, task: str) -> float | None:
        """Mean over the seeds that are there, in %."""
        found = [run["scores"]["float32"] for run in self.of(arm, task)]
        return 100 * statistics.mean(found) if found else None

    def change(self, arm: str, dtype: str) -> tuple[float, int] | None:
        """In points over float32, the mean over the common tasks that were judged in the dtype; and their number."""
        changes = []
        for task in self.common:
            scores = [run["scores"] for run in self.of(arm, task) if dtype in run["scores"]]
            if scores:
                changes.append(100 * statistics.mean(score[dtype] - score["float32"] for score in scores))
        return (statistics.mean(changes), len(changes)) if changes else None

    def mean(self, arm: str) -> tuple[float, float] | None:
        """The mean over the common tasks and its error over test examples, in %; None where a task is missing."""
        scores = [self.score(arm, task) for task in self.common]
        if not scores or None in scores:
            return None
        errors = [100 * statistics.mean(run["error"] for run in self.of(arm, task)) for task in self.common]
        return statistics.mean(map(float, scores)), math.hypot(*errors) / len(errors)  # type: ignore[arg-type]

    def kept(self, arm: str) -> float | None:
        """The mean over the common tasks of student / teacher, in %."""
        if self.mean(arm) is None or arm == TEACHER:
            return None
        shares = []
        for task in self.common:
            pairs = [(run["scores"]["float32"], run["teacher"]) for run in self.of(arm, task)]
            if min(theirs for _, theirs in pairs) <= 0:
                return None
            shares.append(statistics.mean(ours / theirs for ours, theirs in pairs))
        return 100 * statistics.mean(shares)

    def agreement(self, arm: str) -> float | None:
        """The mean over the tasks of the agreement with the teacher, in %; None where a task is missing."""
        found = [[run["agreement"] for run in self.of(arm, task) if "agreement" in run] for task in self.common]
        return 100 * statistics.mean(map(statistics.mean, found)) if found and all(found) else None

    def pairs(self, arm: str, of: Callable[[Run], float | None]) -> list[float]:
        """The chosen experts of the arm's size minus the arm in points, for each task and seed that both have."""
        base = BASELINES.get(arm, "moe")
        places = [(task, seed) for task in self.tasks for seed in self.seeds]
        both = [
            (of(self.cells[base, *place]), of(self.cells[arm, *place]))
            for place in places
            if (base, *place) in self.cells and (arm, *place) in self.cells
        ]
        return [100 * (ours - theirs) for ours, theirs in both if ours is not None and theirs is not None]

    def difference(self, arm: str, of: Callable[[Run], float | None]) -> tuple[float, float | None, int] | None:
        """The mean of `pairs`, p of the paired t-test over tasks and seeds, and the number of pairs."""
        pairs = [] if arm == "moe" else self.pairs(arm, of)
        return (statistics.mean(pairs), paired_t(pairs), len(pairs)) if pairs else None

    def missing(self) -> list[str]:
        """What is wanted and not there: an arm, and of which tasks which seeds."""
        lines = []
        for arm in LABELS:
            lacking = []
            for task in self.tasks:
                seeds = [seed for seed in self.seeds if (arm, task, seed) not in self.cells]
                if seeds:
                    lacking.append(task if seeds == self.seeds else f"{task} (seed {', '.join(map(str, seeds))})")
            if lacking:
                what = "everything" if lacking == self.tasks else ", ".join(lacking)
                lines.append(f"- {LABELS[arm]}: {what}")
        return lines


def joined_table(trained: Sequence[Summary], untrained: Sequence[Summary]) -> list[str]:
    """Chosen experts minus other arms over the pairs of several models together."""
    lines = ["| chosen MoE minus | | score | p | above 0 | agreement | p | above 0 |", "|---" * 8 + "|"]
    for arm in (*MAIN[2:], "original", *BASELINES):
        for name, summaries in (("distilled", trained), ("converted alone", untrained)):
            cells = []
            for of in (lambda run: run["scores"]["float32"], lambda run: run.get("agreement")):
                pairs = [pair for summary in summaries for pair in summary.pairs(arm, of)]
                p = paired_t(pairs)
                mean = f"{statistics.mean(pairs):+.2f}" if pairs else "missing"
                cells += [mean, "" if p is None else f"{p:.4f}", f"{sum(pair > 0 for pair in pairs)} of {len(pairs)}"]
            lines.append(f"| {LABELS[arm]} | {name} | {' | '.join(cells)} |")
    return lines


def shown(value: float | None) -> str:
    return "missing" if value is None else f"{value:.1f}"


def cpu_text(where: Mapping[str, Any]) -> str:
    return f"{where['cpu']}, " + (f"{where['threads']} threads" if where["threads"] > 1 else "CPU time of one thread")


def quartiles_text(of: Mapping[str, float]) -> str:
    return f"{of['median']:.2f} [{of['q1']:.2f}, {of['q3']:.2f}]"


def cell_text(summary: Summary, arm: str, task: str) -> str:
    runs, score = summary.of(arm, task), summary.score(arm, task)
    if score is None:
        return "missing"
    spread = f" ± {100 * statistics.stdev(run['scores']['float32'] for run in runs):.1f}" if len(runs) > 1 else ""
    lacking = "" if len(runs) == len(summary.seeds) else f" ({len(runs)} of {len(summary.seeds)})"
    return f"{score:.1f}{spread}{lacking}"


def accuracy_table(summary: Summary) -> list[str]:
    heads = " | ".join(f"{task} {task_named(task).main_metric}" for task in summary.tasks)
    ahead = "chosen MoE minus this, points | p"
    lines = [
        f"| | {heads} | mean of {', '.join(summary.common) or 'no task'} | kept | {ahead} | agreement | {ahead} |",
        "|---" * (len(summary.tasks) + 8) + "|",
    ]
    for arm in summary.arms:
        mean = summary.mean(arm)
        cells = [cell_text(summary, arm, task) for task in summary.tasks]
        cells += ["missing" if mean is None else f"{mean[0]:.1f} ± {mean[1]:.1f}"]
        cells += ["" if arm == TEACHER else shown(summary.kept(arm))]
        cells += difference_cells(summary.difference(arm, lambda run: run["scores"]["float32"]))
        cells += ["" if arm == TEACHER else shown(summary.agreement(arm))]
        cells += difference_cells(summary.difference(arm, lambda run: run.get("agreement")))
        lines.append(f"| {LABELS[arm]} | {' | '.join(cells)} |")
    return lines


def difference_cells(change: tuple[float, float | None, int] | None) -> list[str]:
    if change is None:
        return ["", ""]
    return [f"{change[0]:+.2f} (n = {change[2]})", "" if change[1] is None else f"{change[1]:.3f}"]


def dtype_table(summary: Summary, latency: Mapping[str, Any], device: str) -> list[str]:
    """Size, the mean in each dtype minus that in float32, and speeds."""
    dtypes = [dtype for dtype in DTYPES if dtype in latency or device == "cpu"]
    heads = [f"{dtype} minus float32, points" for dtype in DTYPES[1:]]
    heads += [f"times the teacher's speed, {dtype}" for dtype in dtypes]
    lines = [
        f"| | parameters, millions (met by a token) | {' | '.join(heads)} |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for arm in summary.arms:
        run = next(run for (name, _, _), run in summary.cells.items() if name == arm)
        cells = [f"{run['total_parameters'] / 1e6:.1f} ({run['active_parameters'] / 1e6:.1f})"]
        for dtype in DTYPES[1:]:
            cells.append(change_text(summary.change(arm, dtype), len(summary.common)))
        for dtype in dtypes:
            speed = speed_of(latency, arm, dtype)
            cells.append("missing" if speed is None else quartiles_text(speed))
        lines.append(f"| {LABELS[arm]} | {' | '.join(cells)} |")
    return lines


def change_text(change: tuple[float, int] | None, tasks: int) -> str:
    if change is None:
        return "missing"
    return f"{change[0]:+.2f}" + (f" ({change[1]} of {tasks} tasks)" if change[1] < tasks else "")


def speed_of(latency: Mapping[str, Any], arm: str, dtype: str) -> Any:
    """Quartiles of the speed over the teacher's in float32; None where it was not measured."""
    timed = arm if arm == TEACHER else ARMS[arm].timed_as or arm
    entry = latency.get(dtype, {}).get("shapes", {}).get(SHAPE, {}).get(timed)
    return None if entry is None else entry["speed"]


def latency_table(latency: Mapping[str, Any]) -> list[str]:
    """Every arm, dtype and shape: how many times the float32 teacher's speed."""
    shapes = list(next(iter(latency.values()))["shapes"])
    lines = [
        f"| | dtype | {' | '.join(shape.replace('x', ' x ') for shape in shapes)} |",
        "|---" * (len(shapes) + 2) + "|",
    ]
    for dtype, result in latency.items():
        for arm in result["shapes"][shapes[0]]:
            if arm != PLAIN:
                speeds = [result["shapes"][shape][arm]["speed"] for shape in shapes]
                cells = " | ".join(quartiles_text(speed) for speed in speeds)
                lines.append(f"| {LABELS[arm]} | {dtype} | {cells} |")
    return lines


def draw(summary: Summary, latency: Mapping[str, Any], file: Path, title: str) -> bool:
    """Mean accuracy over latency, every arm in every dtype, as PNG; False where no point has both."""
    points = []
    for arm in summary.arms:
        for dtype, result in latency.items():
            timed = arm if arm == TEACHER else ARMS[arm].timed_as or arm
            entry, mean = result["shapes"][SHAPE].get(timed), summary.mean(arm)
            change = (0.0, 0) if dtype == "float32" else summary.change(arm, dtype)
            if entry is not None and mean is not None and change is not None:
                # times of several runs are made comparable by the model that all of them have
                points.append((arm, dtype, 1 / entry["speed"]["median"], mean[0] + change[0], mean[1]))
    if not points:
        return False
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    markers, colours = dict(zip(DTYPES, "osDPv^", strict=True)), colormaps["tab20"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for arm, dtype, x, y, error in points:
        colour = colours[list(LABELS).index(arm) % len(colours)]
        axis.errorbar(x, y, yerr=error, color=colour, marker=markers[dtype], capsize=2, elinewidth=0.5, linestyle="")
    for arm in dict.fromkeys(point[0] for point in points):
        axis.plot([], [], "o", color=colours[list(LABELS).index(arm) % len(colours)], label=LABELS[arm])
    for dtype in dict.fromkeys(point[1] for point in points):
        axis.plot([], [], markers[dtype], color="black", label=dtype)
    axis.set(xlabel=f"time at {SHAPE.replace('x', ' x ')} tokens, relative to the teacher in float32",
             title=f"{title}: {', '.join(summary.common)}",
             ylabel=f"mean of {len(summary.common)} tasks, % (± error over test examples)")  # fmt: skip
    axis.set_xlim(0, None)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(file, dpi=120)
    return True


def report(output: Path, wanted: Mapping[str, tuple[Sequence[str], Sequence[int]]]) -> str:
    """Write table.md and a chart for each model of `wanted` (its tasks and seeds) and each that has runs."""
    parts = []
    together: dict[str, list[Summary]] = {"trained": [], "untrained": []}
    for name in dict.fromkeys((*wanted, *sorted(path.name for path in (output / "runs").glob("*")))):
        folder = output / "runs" / name
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*-*-*-*.json"))]
        runs = [run for run in runs if "arm" in run]
        found = ([t for t in FILES if any(r["task"] == t for r in runs)], sorted({r["seed"] for r in runs}))
        trained = [run for run in runs if run["rate"]]
        summary = Summary(trained, *wanted.get(name, found))
        parts.append(f"## {name}")
        if not runs:
            tasks, seeds = wanted.get(name, ((), ()))
            parts.append(f"Missing: all arms on {', '.join(tasks)}, seeds {', '.join(map(str, seeds))}.")
            continue
        settings = json.loads((folder / "settings.json").read_text())
        tries = sorted({len(rates) for rates in summary.rates.values()})
        parts.append(
            "Scores in %, means ± standard deviations over the seeds; the means of tasks have the error over the test"
            " examples. Number of learning rates that every student of a task tried:"
            f" {', '.join(map(str, tries)) or 'none'}. At most {settings['rows']:,} training rows, of which a tenth is"
            " held out;"
            f" {settings['teacher_epochs']} epochs for the teacher,"
            f" {settings['epochs']} for students, in {settings['autocast']}. {settings['choosing']:,} tokens choose"
            f" experts{', and correct layers in turn' if settings['in_turn'] else ''}; the layer-wise term and that of"
            f" the predictions have the weight {settings['weight']:g};"
            f" at most {settings['unlabelled']:,} rows without labels and {settings['corrupted']} corrupted copies of"
            " each row train students too. Agreement is the task's metric with the teacher's answers for labels."
        )
        parts.append("\n".join(accuracy_table(summary)))
        untrained = Summary(
            [run for run in runs if run["arm"] == TEACHER or not run["rate"]], summary.tasks, summary.seeds
        )
        if name in TOGETHER:
            together["trained"].append(summary)
            together["untrained"].append(untrained)
        if len(untrained.arms) > 1:
            parts.append("Converted alone, without any training of the student:")
            parts.append("\n".join(accuracy_table(untrained)))
        for device in ("cpu", "cuda"):
            files = {dtype: folder / f"latency-{device}-{dtype}.json" for dtype in DTYPES}
            latency = {dtype: json.loads(file.read_text()) for dtype, file in files.items() if file.exists()}
            if device == "cuda" and not latency:
                continue
            parts.append("\n".join(dtype_table(summary, latency, device)))
            if latency:
                where = next(iter(latency.values()))["environment"]
                machine = where["gpu"] if device == "cuda" else cpu_text(where)
                parts.append(f"Times the speed of the teacher in float32, {machine}:")
                parts.append("\n".join(latency_table(latency)))
            draw(summary, latency, output / f"chart-{name}-{device}.png", f"{name}, {device}")
        if name in wanted or not wanted:
            missing = summary.missing()
            parts.append("Missing:\n\n" + "\n".join(missing) if missing else "Nothing is missing.")
    if together["trained"]:
        parts.append(f"## {' and '.join(TOGETHER)} together\n\nOver the pairs of a task and a seed of both:")
        parts.append("\n".join(joined_table(**together)))
    text = INTRODUCTION + "\n\n".join(parts) + "\n"
    write_text(output / "table.md", text)
    return text
