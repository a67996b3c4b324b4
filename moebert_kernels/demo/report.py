"""What came out of the demo, as a table and a chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moebert_kernels.bench.tables import aligned, millions, percent
from moebert_kernels.files import replacing

Result = Mapping[str, Any]
LABELS = {"teacher": "teacher (dense)", "moe": "MoE student", "dense": "dense of the same FLOPs"}


def label_of(name: str) -> str:
    """ "moe-384" -> "MoE student, 384"."""
    kind, _, size = name.partition("-")
    return LABELS[kind] + (f", {size}" if size else "")


def difference(first: Result, second: Result) -> dict[str, float]:
    """Difference of two accuracies on the same sentences, and its standard error, which the pairing makes smaller."""
    pairs = list(zip(map(int, first["correct"]), map(int, second["correct"]), strict=True))
    mean = sum(a - b for a, b in pairs) / len(pairs)
    variance = sum((a - b - mean) ** 2 for a, b in pairs) / len(pairs)
    return {"difference": mean, "standard_error": math.sqrt(variance / len(pairs))}


def text_table(results: Sequence[Result]) -> str:
    """The table that the demo ends with. The first result is the teacher's."""
    header = ("", "before", "accuracy", "kept", "parameters", "active", "FFN ms", "model ms", "speed-up")
    teacher = results[0]
    rows = [
        (
            label_of(result["name"]),
            percent(result["accuracy_before"]) if "accuracy_before" in result else "",
            f"{percent(result['accuracy'])} ± {100 * result['standard_error']:.1f}",
            percent(result["accuracy"] / teacher["accuracy"]),
            millions(result["total_parameters"]),
            millions(result["active_parameters"]),
            f"{result['ffn_ms']:.1f}",
            f"{result['model_ms']:.1f}",
            f"{teacher['model_ms'] / result['model_ms']:.2f}",
        )
        for result in results
    ]
    return aligned([header, *rows])


def chart(results: Sequence[Result], file: Path, title: str) -> None:
    """Accuracy and times of the models side by side, as PNG."""
    from matplotlib.figure import Figure

    names = [label_of(result["name"]) for result in results]
    colours = ["#777777", "#1b6ca8", "#d98c21", "#0b3c5d", "#a65e00"][: len(results)]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    accuracy = [100 * result["accuracy"] for result in results]
    errors = [100 * result["standard_error"] for result in results]
    before = [100 * result["accuracy_before"] for result in results if "accuracy_before" in result]
    left.bar(names, accuracy, yerr=errors, color=colours, capsize=4)
    left.scatter(names[1:], before, marker="v", color="black", zorder=3, label="before distillation")
    left.set_ylim(max(0.0, min(accuracy + before) - 5), min(100.0, max(accuracy) + 3))
    left.set_ylabel("accuracy on the test part, % (± standard error)")
    left.legend(loc="lower right")
    for position, value in enumerate(accuracy):
        left.annotate(f"{value:.1f}", (position, value), xytext=(14, 4), textcoords="offset points", ha="center")

    other = [result["model_ms"] - result["ffn_ms"] for result in results]
    ffn = [result["ffn_ms"] for result in results]
    right.bar(names, ffn, color=colours, label="feed-forward layers")
    right.bar(names, other, bottom=ffn, color=colours, alpha=0.35, label="everything else")
    right.set_ylabel("ms for 8 sequences of 128 tokens")
    right.legend()
    for position, result in enumerate(results):
        right.annotate(f"{result['model_ms']:.0f}", (position, result["model_ms"]), xytext=(0, 2),
                       textcoords="offset points", ha="center")  # fmt: skip
    figure.suptitle(title)
    with replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
