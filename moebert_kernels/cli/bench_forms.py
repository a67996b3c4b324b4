"""`moebert bench --form`: two models in all forms in which a CPU serves them, or as saved, with their scores."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.bench.benchmark import sizes_of
from moebert_kernels.bench.clocks import WallTimer, quartiles
from moebert_kernels.bench.tables import aligned
from moebert_kernels.bench.timing import evaluating, interleaved
from moebert_kernels.cli import inputs
from moebert_kernels.cli.outputs import check_output_file
from moebert_kernels.distill.loading import load_encoder, load_model, load_tokenizer
from moebert_kernels.errors import UserError, require_extra
from moebert_kernels.files import replacing
from moebert_kernels.layers import moe_config, set_task
from moebert_kernels.serve.forms import FORMS, forms_of

ALL = "all"
CHART = "moebert bench"  # a chart says in its metadata what drew it
COLOURS = {"model": "#c8321e", "against": "#444444"}


def check_forms(
    forms: list[str], task: str | None, dtype: str | None, chart: Path | None, output: Path | None
) -> tuple[str, ...]:
    """The forms that are meant.

    Raises:
        UserError: a form that is none, options that do not go together, or a chart that would replace another file.
        MissingExtra: a chart without matplotlib.
    """
    if unknown := [form for form in forms if form not in (*FORMS, ALL)]:
        raise UserError(f"form: expected one of {', '.join((*FORMS, ALL))}, got {unknown[0]!r}")
    if dtype is not None:
        raise UserError(f"dtype: expected none with --form, which names it, got {dtype}")
    if chart is not None:
        if task is None:
            raise UserError("chart: expected --task too, whose score it shows, got none")
        require_extra("demo", "matplotlib")
        check_output_file(chart, is_chart, "chart.png", "chart")
        if output is not None and chart.resolve() == output.resolve():
            raise UserError(f"chart: expected another file than --output, got {chart}")
    return FORMS if ALL in forms else tuple(dict.fromkeys(forms))


def load_encoders(paths: Mapping[str, str]) -> dict[str, Any]:
    """Without heads; under task routing for the first task, because all of them take equally long."""
    models = {name: load_encoder(path) for name, path in paths.items()}
    for encoder in models.values():
        moe = moe_config(encoder.config)
        if moe is not None and moe.is_task_routed:
            set_task(encoder, next(iter(moe.tasks or ())))
    return models


def run_forms(
    paths: dict[str, str], forms: tuple[str, ...], rounds: int,
    batches: Callable[[Sequence[Any]], list[tuple[Any, Any]]], loaded: Any, split: str,
) -> dict[str, Any]:  # fmt: skip
    """Load the models, time and score them; what goes into the result beside the environment.

    Raises:
        UserError: no form runs here.
    """
    scores = None
    if loaded is None:
        models = load_encoders(paths)
    else:
        models = {name: load_model(path, loaded.task) for name, path in paths.items()}
        scores = {  # each reads the texts with its own tokenizer, and numbers the classes in its own way
            name: inputs.Reader(loaded, model.config, load_tokenizer(paths[name])).evaluator(split)
            for name, model in models.items()
        }
    sizes = {
        name: {"path": paths[name]} | ({} if hasattr(model, "prepared") else sizes_of(model))  # no parameters any more
        for name, model in models.items()
    }
    result = compare_forms(models, forms, batches(list(models.values())), rounds, scores)
    if not result["baseline"]:
        (name, reason), *_ = result["left_out"].items()
        raise UserError(f"form: expected one that runs here, got none ({name}: {reason})")
    return {"rounds": rounds, "models": sizes} | result


def compare_forms(
    models: Mapping[str, Any],
    forms: Sequence[str],
    batches: Sequence[tuple[Tensor, Tensor]],
    rounds: int,
    scores: Mapping[str, Callable[[Any], Mapping[str, float]]] | None = None,
) -> dict[str, Any]:
    """Times of all models in all forms, and their scores.

    Args:
        models: of transformers in float32 on the CPU, by name. Ratios are over the last one's first form.
        forms: names of `moebert_kernels.serve.forms.FORMS`.
        batches: ids and mask, each (B, T) int64. Engines are chosen for the first one.
        rounds: each calls every model in every form once.
        scores: by the model's name what gives metrics of its forms on a task, or None.

    Returns:
        `baseline`, "against float32" for instance; `left_out`, name -> why a form does not run here; `scores`, name ->
        metrics; `cases`, one for each batch: its shape, and `forms`, name -> `ms` and `speed` over the baseline, each
        {"q1", "median", "q3"}.

    Raises:
        UserError: a form that is none.
    """
    made: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    ids, mask = batches[0]
    with tempfile.TemporaryDirectory() as folder, evaluating(models.values()):
        for name, model in models.items():
            first = {"input_ids": ids, "attention_mask": mask}
            for form, found in forms_of(model, tuple(forms), first, Path(folder) / name):
                if isinstance(found, str):
                    left_out[f"{name} {form}"] = found
                else:
                    made[f"{name} {form}"] = found
        *_, last = models
        baseline = next((name for name in made if name.startswith(f"{last} ")), next(iter(made), ""))
        scored = {name: dict(scores[name.partition(" ")[0]](form)) for name, form in made.items() if scores is not None}
        cases = []
        for ids, mask in batches:
            runs = {
                name: WallTimer(partial(form, input_ids=ids, attention_mask=mask)).warm_ms
                for name, form in made.items()
            }
            with torch.inference_mode():
                times = interleaved(runs, rounds)
            entries = {
                name: {
                    "ms": quartiles(ms),
                    "speed": quartiles([base / own for base, own in zip(times[baseline], ms, strict=True)]),
                }
                for name, ms in times.items()
            }
            shape = {"batch_size": ids.shape[0], "length": ids.shape[1], "real_tokens": int(mask.sum())}
            cases.append(shape | {"forms": entries})
    return {"baseline": baseline, "left_out": left_out, "scores": scored, "cases": cases}


def forms_table(result: Mapping[str, Any]) -> str:
    """What is printed: a row for each batch and form, with the scores behind it."""
    metrics = list(next(iter(result["scores"].values()), {}))
    rows = [("", "", "ms", f"over {result['baseline']}", *metrics)]
    for case in result["cases"]:
        first = f"B={case['batch_size']} T={case['length']}, {case['real_tokens']} real tokens"
        for name, entry in case["forms"].items():
            ms, speed = entry["ms"], entry["speed"]
            scores = (f"{result['scores'][name][metric]:.4f}" for metric in metrics)
            cells = f"{ms['median']:.2f}", f"{speed['median']:.2f} [{speed['q1']:.2f}, {speed['q3']:.2f}]"
            rows.append((first, name, *cells, *scores))
            first = ""
    lines = [aligned(rows), *(f"{name} is left out: {reason}" for name, reason in result["left_out"].items())]
    where = result["environment"]
    lines.append(
        f"median [quartiles] of {result['rounds']} rounds in turns, {where['threads']} threads, {where['device']}"
    )
    return "\n".join(lines)


def forms_chart(result: Mapping[str, Any], file: Path) -> None:
    """The first metric over the median time of the first batch, as PNG."""
    from matplotlib.figure import Figure

    case, metric = result["cases"][0], next(iter(next(iter(result["scores"].values()))))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for model, colour in COLOURS.items():
        names = [name for name in case["forms"] if name.startswith(f"{model} ")]
        ms = [case["forms"][name]["ms"]["median"] for name in names]
        scores = [result["scores"][name][metric] for name in names]
        axes.scatter(ms, scores, color=colour, label=result["models"][model]["path"])
        for name, x, y in zip(names, ms, scores, strict=True):
            axes.annotate(name.partition(" ")[2], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(
        f"ms for {case['batch_size']} x {case['length']} tokens, {result['environment']['threads']} threads"
    )
    axes.set_ylabel(metric)
    if statistics.median(axes.get_xlim()) > 0:
        axes.set_xlim(left=0)
    axes.legend(loc="best", fontsize=8)
    with replacing(file) as partial_file:
        figure.savefig(partial_file, format="png", dpi=120, metadata={"Software": CHART})


def is_chart(file: Path) -> bool:
    """Whether `forms_chart` wrote a file."""
    with file.open("rb") as content:
        return f"Software\0{CHART}".encode() in content.read(1024)
