"""`moebert demo`: a dense teacher, a MoE student and a dense one of the same FLOPs, trained and compared."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moebert_kernels.bench.benchmark import environment
from moebert_kernels.bench.tables import percent
from moebert_kernels.bench.timing import compare_models, random_inputs
from moebert_kernels.demo.data import DATA_PACKAGE, MODEL_PACKAGE, REVIEWS, base_model, movie_reviews
from moebert_kernels.demo.report import chart, difference, text_table
from moebert_kernels.demo.study import FULL, QUICK, Recipe, Study
from moebert_kernels.distill.loading import load_model, quiet_transformers
from moebert_kernels.files import write_json

EXPERT_SIZE = 384
TIMED_SHAPE = (8, 128)


def run_demo(output: str | Path = "demo", *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run or finish the demo, print its table, and write `report.json` and `chart.png` into `output`.

    Args:
        quick: a shorter recipe on a part of the training sentences; shows the way, not the accuracy.

    Returns:
        the report.

    Raises:
        UserError: something cannot be fetched or written, or `output` holds something else.
    """
    started = time.monotonic()
    recipe = QUICK if quick else FULL
    output = Path(output)
    folder = output / f"{'quick' if quick else 'full'}-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(folder, base_model(), movie_reviews(folder / "data"), recipe, seed)

    step("1/4", f"fine-tuning the teacher, {recipe.finetune_epochs} epochs")
    teacher = study.teacher()
    step(
        "2/4",
        f"MoE student: 4 experts of {EXPERT_SIZE}, chosen by the text; {recipe.distill_epochs} epochs of distillation",
    )
    moe = study.student("moe", EXPERT_SIZE)
    step("3/4", f"dense model of the same FLOPs: {EXPERT_SIZE} neurons, the same text and distillation")
    dense = study.student("dense", EXPERT_SIZE)
    study.finish()
    step("4/4", "timing, in turns")
    results = with_times([teacher, moe, dense])

    report = make_report(results, recipe, seed) | {"seconds": time.monotonic() - started}
    write_json(output / "report.json", report)
    title = f"all-MiniLM-L6-v2 on movie reviews, {report['test_examples']} test sentences{', quick' if quick else ''}"
    chart(results, output / "chart.png", title)
    print(summary(report, output))
    return report


def step(number: str, text: str) -> None:
    """Say what comes next."""
    print(f"\n[{number}] {text}", flush=True)


def with_times(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results with `ffn_ms` and `model_ms` of their saved models, which are measured in turns."""
    with quiet_transformers():
        models = {result["name"]: load_model(result["path"], REVIEWS) for result in results}
    B, T = TIMED_SHAPE
    vocabulary = min(model.config.vocab_size for model in models.values())
    times = compare_models(models, *random_inputs(vocabulary, B, T))
    return [
        dict(result) | {unit: times[result["name"]][unit]["median"] for unit in ("ffn_ms", "model_ms")}
        for result in results
    ]


def make_report(results: Sequence[Mapping[str, Any]], recipe: Recipe, seed: int) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    by_kind = {result["name"].split("-")[0]: result for result in results}
    return {
        "model": MODEL_PACKAGE,
        "data": DATA_PACKAGE,
        "seed": seed,
        "recipe": asdict(recipe),
        "test_examples": len(results[0]["correct"]),
        "timed": "B={} T={}, medians of interleaved runs, fp32".format(*TIMED_SHAPE),
        "environment": environment(torch.device("cpu"), torch.float32),
        "results": [{name: value for name, value in result.items() if name != "correct"} for result in results],
        "moe_minus_dense": difference(by_kind["moe"], by_kind["dense"]),
        "moe_minus_teacher": difference(by_kind["moe"], by_kind["teacher"]),
    }


def summary(report: Mapping[str, Any], output: Path) -> str:
    """What the demo prints last."""
    moe = report["moe_minus_dense"]
    lines = [
        "",
        text_table(report["results"]),
        "",
        f"accuracy on {report['test_examples']} held-back sentences, ± standard error; times: {report['timed']}",
        f"MoE ahead of dense by {100 * moe['difference']:.1f} ± {100 * moe['standard_error']:.1f} points"
        f" (before distillation: {percent(report['results'][1]['accuracy_before'])} against"
        f" {percent(report['results'][2]['accuracy_before'])})",
        "",
        "saved, each with its tokenizer, for from_pretrained:",
        *(f"  {result['name']:10} {result['path']}" for result in report["results"]),
        f"report  {(output / 'report.json').resolve()}",
        f"chart   {(output / 'chart.png').resolve()}",
        f"took    {report['seconds'] / 60:.1f} min",
    ]
    return "\n".join(lines)
