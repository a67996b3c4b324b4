"""`moebert quantize`: a model for inference on a CPU, beside the one that it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import already_written, write_files
from moebert_kernels.errors import UserError

_ROWS, _AT_ONCE = 512, 32  # of the texts that calibrate


def quantize(
    model: o.ModelName,
    output: o.OutputFolder,
    dtype: str = "int8",
    tokens: o.Number = 128,
    task: o.OptionalTaskName = None,
    data: o.Data = None,
    split: o.Split = "validation",
    text_column: o.TextColumns = None,
    label_column: o.LabelColumn = "label",
    regression: o.Regression = False,
    max_length: o.MaxLength = None,
    batch_size: o.EvaluationBatchSize = None,
    calibrate: Annotated[bool | None, typer.Option("--calibrate/--no-calibrate")] = None,
    force: o.Force = False,
) -> None:
    """Make a model, dense or MoE, one for inference on a CPU. With --task its scores before and after are printed.

    AutoModel loads the result where moebert_kernels.serve was imported. Activations are quantised in each call, by what
    they are.

    Args:
        dtype: int8, int8-token (a scale for each token), bfloat16 or float32.
        tokens: Of a typical call, all sequences together: engines are compared at it.
        calibrate: With int8, find the layers that need a scale for each token by 512 training texts of --task, by those
            of --split where it has none, or without --task by the texts of --data. Default: where there are texts.
    """
    from moebert_kernels.distill.identity import model_files
    from moebert_kernels.distill.loading import load_as_saved, load_model, load_tokenizer
    from moebert_kernels.serve import describe, prepare

    inputs.check_models(model=model)
    if calibrate and dtype != "int8":
        raise UserError(f"calibrate: expected it with --dtype int8 alone, got --dtype {dtype}")
    if calibrate and task is None and not data:
        raise UserError("calibrate: expected texts (--task, or --data FILE), got none")
    calibrates = calibrate is not False and dtype == "int8" and (task is not None or bool(data))
    if task is None and data and not calibrates:
        raise UserError("data: expected --task too, since without it texts only calibrate int8, got none")
    identity = {
        "command": "quantize", "model": str(Path(model)), "dtype": dtype, "tokens": tokens,
        "calibrated by": f"{task}, {data}" if calibrates else None, "files of the model": model_files(model),
    }  # fmt: skip
    if already_written(output, identity, force, model):
        return
    tokenizer = load_tokenizer(model)
    scores: Callable[[Any], str] | None = None
    batches: Iterator[Any] | None = None
    if task is None:
        source = load_as_saved(model)
        if calibrates:
            loaded = inputs.unlabelled(inputs.make_task("custom", text_column, label_column, False), data)
    else:
        wanted = inputs.make_task(task, text_column, label_column, regression, model)
        loaded = inputs.load_data(wanted, data, inputs.split_called(split))
        source = load_model(model, loaded.task)
        scores = _scores(source.config, loaded, split, tokenizer, max_length, batch_size)
        print(f"as it was: {scores(source)}")
    if calibrates:
        batches = _texts(source.config, loaded, split, tokenizer, max_length)
    before = _mib(source)
    prepared = prepare(source.eval(), dtype, tokens=tokens, batches=batches)
    print(describe(prepared))
    if scores is not None:
        print(f"{dtype}: {scores(prepared)}")
    write_files(output, prepared.save_pretrained, identity, tokenizer)
    print(f"{before:,.0f} MiB of weights became {_mib(prepared):,.0f} MiB; saved in {output}")


def _texts(config: Any, loaded: Any, split: str, tokenizer: Any, max_length: int | None) -> Iterator[Any]:
    """Batches of texts drawn at random, in their order: sorted by length they would be the longest ones."""
    from moebert_kernels.data.tasks import TaskData

    name = "train" if "train" in loaded.splits else inputs.split_called(split)
    rows = loaded.split(name).shuffle(seed=0)
    some = TaskData(loaded.task, {name: rows.select(range(min(_ROWS, len(rows))))})
    length, stride = inputs.lengths_for(config, loaded.task, tokenizer, max_length)
    texts = inputs.tokenized(some, name, tokenizer, length, stride, config)
    return (texts.collate(range(n, min(n + _AT_ONCE, len(texts)))) for n in range(0, len(texts), _AT_ONCE))


def _scores(
    config: Any, loaded: Any, split: str, tokenizer: Any, max_length: int | None, batch_size: int | None
) -> Callable[[Any], str]:
    """A function that evaluates a model on a split and gives its metrics as text."""
    evaluate = evaluation(config, loaded, split, tokenizer, max_length, batch_size)

    def scores(model: Any) -> str:
        start = time.perf_counter()
        metrics = evaluate(model)
        seconds = time.perf_counter() - start
        return ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()) + f", in {seconds:.1f} s"

    return scores


def evaluation(
    config: Any, loaded: Any, split: str, tokenizer: Any, max_length: int | None, batch_size: int | None
) -> Callable[[Any], Any]:
    """A function that gives the metrics of a model of this configuration on a split."""
    from moebert_kernels.distill.evaluation import Evaluator

    name = inputs.splits_named(loaded := inputs.labels_as_in(loaded, config), inputs.split_called(split))[0]
    length, stride = inputs.lengths_for(config, loaded.task, tokenizer, max_length, None)
    return Evaluator(inputs.tokenized(loaded, name, tokenizer, length, stride, config), batch_size, progress=True)


def _mib(model: Any) -> float:
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
