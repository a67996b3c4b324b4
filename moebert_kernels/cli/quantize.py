"""`moebert quantize`: a model for inference on a CPU, beside the one that it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import already_written, call_of, data_files, tokenizer_of, write_model
from moebert_kernels.cli.running import print_metrics
from moebert_kernels.errors import UserError

_ROWS, _AT_ONCE = 512, 32  # of the texts that calibrate


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
    calibrate: Annotated[bool | None, typer.Option("--calibrate/--no-calibrate")] = None,
    force: o.Force = False,
) -> None:
    """Make a model, dense or MoE, one for inference on a CPU. With --task its scores before and after are printed.

    AutoModel loads the result where moebert_kernels.serve was imported. Activations are quantised in each call, by what
    they are.

    Args:
        dtype: int8, int8-token (a scale for each token), int8-bfloat16 (all else in bfloat16), bfloat16 or float32.
        tokens: Of a typical call, all sequences together: engines are compared at it.
        calibrate: With int8, find the layers that need a scale for each token by 2,048 tokens of text: of --task's
            training texts, of those of --split where it has none, or without --task of those of --data (rows of a
            table, lines of a text file). Default: where there are texts.
    """
    from moebert_kernels.distill.loading import load_as_saved, load_model, load_tokenizer
    from moebert_kernels.serve import describe, prepare

    reads = task is not None or texts.data
    judging = {"split": None if split == "validation" else split, "batch_size": batch_size}
    o.check_unused("--task", task is None, o.given(texts, "data", "text_column", "max_length") | judging)
    o.check_unused("--task or --data", not reads, o.given(texts))
    inputs.check_models(model=model)
    if calibrate and dtype != "int8":
        raise UserError(f"calibrate: expected it with --dtype int8 alone, got --dtype {dtype}")
    if calibrate and task is None and not texts.data:
        raise UserError("calibrate: expected texts (--task, or --data FILE), got none")
    calibrates = calibrate is not False and dtype == "int8"
    if task is None and texts.data and not calibrates:
        raise UserError("data: expected --task too, since without it texts only calibrate int8, got none")
    identity = call_of(ctx, **{"files of data": data_files(texts.data)})
    if already_written(output, identity, force, model):
        return
    if calibrate is None and calibrates and task is None and not texts.data:
        inputs.say("int8 is not calibrated, for which texts are needed: --data FILE, or --task NAME")
    tokenizer = load_tokenizer(model) if reads else tokenizer_of(model)
    evaluate: Callable[[Any], Any] | None = None
    reader: inputs.Reader | None = None
    if task is None:
        source = load_as_saved(model)
        if texts.data:
            name = "lm" if inputs.generates(source.config) else "custom"
            loaded = inputs.unlabelled(texts.make_task(name), texts.data)
            reader = inputs.Reader(loaded, source.config, tokenizer, texts.max_length, labels=False)
    else:
        split = inputs.split_called(split)
        loaded = texts.load(task, split, model)
        source = load_model(model, loaded.task)
        reader = texts.read(loaded, source.config, tokenizer)
        evaluate = reader.evaluator(split, batch_size)
        _say_scores("as it was", evaluate, source)
    batches = _batches(reader, split) if calibrates and reader is not None else None
    before = _mib(source)
    prepared = prepare(source.eval(), dtype, tokens=tokens, batches=batches)
    print(describe(prepared))
    if evaluate is not None:
        _say_scores(dtype, evaluate, prepared)
    write_model(output, prepared, tokenizer, identity)
    print(f"{before:,.0f} MiB of weights became {_mib(prepared):,.0f} MiB")


def _batches(reader: inputs.Reader, split: str) -> Iterator[Any]:
    """Texts drawn at random, in that order: sorted by length they would be the longest ones."""
    name = "train" if "train" in reader.data.splits else split
    rows = reader.data.split(name).shuffle(seed=0)
    texts = reader.split(name, rows.select(range(min(_ROWS, len(rows)))))
    return (texts.collate(range(n, min(n + _AT_ONCE, len(texts)))) for n in range(0, len(texts), _AT_ONCE))


def _say_scores(name: str, evaluate: Callable[[Any], Any], model: Any) -> None:
    start = time.perf_counter()
    metrics = evaluate(model)
    print_metrics(metrics, f"{name}, in {time.perf_counter() - start:.1f} s")


def _mib(model: Any) -> float:
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
