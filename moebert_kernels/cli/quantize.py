"""`moebert quantize`: a model for inference on a CPU, beside the one that it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import already_written, call_of, write_files
from moebert_kernels.cli.running import print_metrics


def quantize(
    ctx: typer.Context,
    model: o.ModelName,
    output: o.OutputFolder,
    texts: inputs.Texts,
    dtype: str = "int8",
    tokens: o.Number = 128,
    task: o.OptionalTaskName = None,
    split: o.Split = "validation",
    batch_size: o.EvaluationBatchSize = None,
    force: o.Force = False,
) -> None:
    """Make a model, dense or MoE, one for inference on a CPU. With --task its scores before and after are printed.

    AutoModel loads the result where moebert_kernels.serve was imported. Nothing is calibrated: activations are
    quantised in each call, by what they are.

    Args:
        dtype: int8, int8-token (a scale for each token), bfloat16 or float32.
        tokens: Of a typical call, all sequences together: engines are compared at it.
    """
    from moebert_kernels.distill.loading import load_as_saved, load_model, load_tokenizer
    from moebert_kernels.serve import describe, prepare

    inputs.check_models(model=model)
    identity = call_of(ctx)
    if already_written(output, identity, force, model):
        return
    tokenizer = load_tokenizer(model)
    evaluate: Callable[[Any], Any] | None = None
    if task is None:
        source = load_as_saved(model)
    else:
        split = inputs.split_called(split)
        loaded = texts.load(task, split, model)
        source = load_model(model, loaded.task)
        evaluate = texts.read(loaded, source.config, tokenizer).evaluator(split, batch_size)
        _say_scores("as it was", evaluate, source)
    before = _mib(source)
    prepared = prepare(source.eval(), dtype, tokens=tokens)
    print(describe(prepared))
    if evaluate is not None:
        _say_scores(dtype, evaluate, prepared)
    write_files(output, prepared.save_pretrained, identity, tokenizer)
    print(f"{before:,.0f} MiB of weights became {_mib(prepared):,.0f} MiB; saved in {output}")


def _say_scores(name: str, evaluate: Callable[[Any], Any], model: Any) -> None:
    start = time.perf_counter()
    metrics = evaluate(model)
    print_metrics(metrics, f"{name}, in {time.perf_counter() - start:.1f} s")


def _mib(model: Any) -> float:
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
