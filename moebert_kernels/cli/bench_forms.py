"""`moebert bench --form`: dense and converted in float32, bfloat16, int8 and ONNX, or as saved, with their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moebert_kernels.cli import inputs
from moebert_kernels.errors import UserError, require_extra

ALL = "all"


def check_forms(forms: list[str], task: str | None, dtype: str | None, chart: Path | None) -> tuple[str, ...]:
    """The forms that are meant.

    Raises:
        UserError: a form that is none, or options that do not go together.
        MissingExtra: a chart without matplotlib.
    """
    from moebert_kernels.serve.forms import FORMS

    if unknown := [form for form in forms if form not in (*FORMS, ALL)]:
        raise UserError(f"form: expected one of {', '.join((*FORMS, ALL))}, got {unknown[0]!r}")
    if dtype is not None:
        raise UserError(f"dtype: expected none with --form, which names it, got {dtype}")
    if chart is not None:
        if task is None:
            raise UserError("chart: expected --task too, whose score it shows, got none")
        require_extra("demo", "matplotlib")
    return FORMS if ALL in forms else tuple(dict.fromkeys(forms))


def load_encoders(paths: Mapping[str, str]) -> dict[str, Any]:
    """Without heads; under task routing for the first task, because all of them take equally long."""
    from moebert_kernels.distill.loading import load_encoder
    from moebert_kernels.layers import moe_config, set_task

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
    from moebert_kernels.bench.benchmark import sizes_of
    from moebert_kernels.demo.forms import compare_forms
    from moebert_kernels.distill.loading import load_model, load_tokenizer

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
