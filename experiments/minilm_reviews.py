"""Accuracy of the demo's recipe over seeds and expert sizes: MoE students against dense students of the same FLOPs.

    python experiments/minilm_reviews.py                  # everything that is not done yet, then the report
    python experiments/minilm_reviews.py --seeds 1        # one seed; several processes may share the work so
    python experiments/minilm_reviews.py --report         # the report of the seeds that are done, times measured anew

Per seed one teacher, one importance scoring and one cache of the teacher's outputs serve all students. A run that was
interrupted goes on. Writes results.json, table.md and chart.png into experiments/minilm_reviews.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock  # comes with torch

from moebert_kernels.bench.tables import millions, percent
from moebert_kernels.demo.data import base_model, cache_folder, movie_reviews
from moebert_kernels.demo.report import difference, label_of, write_report
from moebert_kernels.demo.run import TIMED_SHAPE, machine, step, with_times
from moebert_kernels.demo.study import FULL, Study
from moebert_kernels.distill.files import write_text

SIZES = {384: 256, 192: 128}  # expert size -> shared, two thirds
KINDS = ("moe", "dense")
NAMES = ("teacher", *(f"{kind}-{size}" for size in SIZES for kind in KINDS))
HERE = Path(__file__).resolve().parent / "minilm_reviews"

Results = Mapping[str, Mapping[str, Any]]  # name of a model -> its result


def run_seed(study: Study) -> dict[str, Any]:
    """All models of one seed, by name."""
    step(f"seed {study.seed}", "teacher")
    results = {"teacher": study.teacher()}
    for name in NAMES[1:]:
        kind, _, size = name.partition("-")
        step(f"seed {study.seed}", label_of(name))
        if kind == "moe":
            results[name] = study.student("moe", int(size), SIZES[int(size)])
        else:
            results[name] = study.student("dense", int(size))
    study.finish()
    return results


def report_of(seeds: Mapping[int, Results], times: Results) -> dict[str, Any]:
    """Everything of results.json: each model of each seed, and what the seeds say together."""
    models = {}
    for name in NAMES:
        runs = [results[name] for results in seeds.values()]
        accuracies = [run["accuracy"] for run in runs]
        models[name] = {
            "accuracy": spread(accuracies),
            "accuracy_last": spread([run["accuracy_last"] for run in runs]),
            "test_standard_error": statistics.mean(run["standard_error"] for run in runs),
            "kept": spread([run["accuracy"] / results["teacher"]["accuracy"]
                            for run, results in zip(runs, seeds.values(), strict=True)]),
            "total_parameters": runs[0]["total_parameters"],
            "active_parameters": runs[0]["active_parameters"],
            "training_seconds": spread([run["seconds"] for run in runs]),
            **{unit: times[name][unit] for unit in ("ffn_ms", "model_ms")},
        }  # fmt: skip
        if name != "teacher":
            models[name]["accuracy_before"] = spread([run["accuracy_before"] for run in runs])
    differences = {}
    for size in SIZES:
        pairs = [difference(results[f"moe-{size}"], results[f"dense-{size}"]) for results in seeds.values()]
        differences[str(size)] = {
            **spread([pair["difference"] for pair in pairs]),
            "test_standard_error": math.sqrt(statistics.mean(pair["standard_error"] ** 2 for pair in pairs)),
            "last": spread([results[f"moe-{size}"]["accuracy_last"] - results[f"dense-{size}"]["accuracy_last"]
                            for results in seeds.values()]),
            "before": spread([results[f"moe-{size}"]["accuracy_before"] - results[f"dense-{size}"]["accuracy_before"]
                              for results in seeds.values()]),
        }  # fmt: skip
    return {
        "recipe": vars(FULL),
        "test_examples": len(next(iter(seeds.values()))["teacher"]["correct"]),
        "timed": "B={} T={}, seed {}, medians of interleaved runs, fp32".format(*TIMED_SHAPE, min(seeds)),
        "machine": machine(),
        "models": models,
        "moe_minus_dense": differences,
        "seeds": {
            str(seed): [{key: value for key, value in run.items() if key not in ("correct", "path")}
                        for run in results.values()]
            for seed, results in seeds.items()
        },
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation of a few values, and the values."""
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def points(entry: Mapping[str, Any], sign: str = "") -> str:
    """A share and its spread over the seeds, in percent."""
    text = f"{100 * entry['mean']:{sign}.1f}"
    return text if entry["sd"] is None else f"{text} ± {100 * entry['sd']:.1f}"


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    models = report["models"]
    teacher = models["teacher"]
    lines = [
        f"all-MiniLM-L6-v2 on movie reviews, {len(report['seeds'])} seeds, {report['test_examples']} test sentences.",
        "Accuracy in %, mean ± standard deviation over the seeds; the test part's own standard error is"
        f" {100 * teacher['test_standard_error']:.1f} points.",
        "`accuracy` is of the epoch that validation chose, `last` of the weights after the last step.",
        "",
        "| model | before | accuracy | last | kept | parameters | active | FFN ms | model ms | speed-up |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        before = points(model["accuracy_before"]) if "accuracy_before" in model else ""
        lines.append(
            f"| {label_of(name)} | {before} | {points(model['accuracy'])} | {points(model['accuracy_last'])}"
            f" | {points(model['kept'])} |"
            f" {millions(model['total_parameters'])} | {millions(model['active_parameters'])} |"
            f" {model['ffn_ms']:.1f} | {model['model_ms']:.1f} | {teacher['model_ms'] / model['model_ms']:.2f} |"
        )
    lines += [
        "",
        f"Times: {report['timed']}, {report['machine']['torch_threads']} threads.",
        "",
        "| expert size | MoE minus dense, before | after distillation | last weights |"
        " standard error of one seed's difference |",
        "|---|---|---|---|---|",
    ]
    for size, entry in report["moe_minus_dense"].items():
        error = f"{100 * entry['test_standard_error']:.1f}"
        shares = " | ".join(points(part, "+") for part in (entry["before"], entry, entry["last"]))
        lines.append(f"| {size} | {shares} | {error} |")
    return "\n".join(lines) + "\n"


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Accuracy against time, with every seed as a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    colours = {"teacher": "#777777", "moe": "#1b6ca8", "dense": "#d98c21"}
    for name, model in report["models"].items():
        colour = colours[name.partition("-")[0]]
        values = [100 * value for value in model["accuracy"]["values"]]
        axis.scatter([model["model_ms"]] * len(values), values, color=colour, alpha=0.35, s=22)
        mean = 100 * model["accuracy"]["mean"]
        error = 100 * model["test_standard_error"] / math.sqrt(len(values))
        axis.errorbar(model["model_ms"], mean, yerr=error, color=colour, marker="o", capsize=4)
        axis.annotate(f"{label_of(name)}\n{percent(mean / 100)}", (model["model_ms"], mean), xytext=(8, -3),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axis.set_xlabel("ms for 8 sequences of 128 tokens")
    axis.set_ylabel("accuracy on the test part, %")
    axis.margins(x=0.2)
    axis.set_title(f"Distilled students of all-MiniLM-L6-v2, {len(report['seeds'])} seeds (points) and their mean")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, and report on the seeds that are complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("demo/minilm_reviews"), help="models and caches; large")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    with FileLock(arguments.work / "data.lock"):
        base, data = base_model(), movie_reviews(arguments.work / "data", cache_folder())
    studies = {seed: Study(arguments.work / f"seed-{seed}", base, data, FULL, seed) for seed in arguments.seeds}
    if not arguments.report:
        for study in studies.values():
            run_seed(study)
    complete = {seed: run_seed(study) for seed, study in studies.items() if study.has(NAMES)}
    if not complete:
        parser.exit(2, "no seed is complete yet\n")
    timed = with_times(list(complete[min(complete)].values()))
    report = report_of(complete, {result["name"]: result for result in timed})
    HERE.mkdir(exist_ok=True)
    write_report(report, HERE / "results.json")
    write_text(HERE / "table.md", table(report))
    draw(report, HERE / "chart.png")
    print(table(report))


if __name__ == "__main__":
    main()
