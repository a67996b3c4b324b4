"""`moebert eval`, `moebert bench`, `moebert doctor` and `moebert demo`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import check_output, check_output_file, claim, is_result
from moebert_kernels.cli.running import print_metrics
from moebert_kernels.errors import UserError, require_extra

if TYPE_CHECKING:
    from moebert_kernels.data.tasks import TaskData


def evaluate(
    model: o.ModelName,
    task: o.TaskName,
    texts: inputs.Texts,
    output: o.OptionalOutputFile = None,
    split: o.Split = "validation",
    batch_size: o.EvaluationBatchSize = None,
) -> None:
    """Evaluate a model, dense or MoE, with the task's metrics. Nothing in it is random."""
    from moebert_kernels.distill.loading import load_model, load_tokenizer

    if output is not None:
        check_output_file(output, is_result("splits"), "result.json")
    split = inputs.split_called(split)
    inputs.check_models(model=model)
    loaded = texts.load(task, split, model)
    judged = load_model(model, loaded.task).to(inputs.device())
    reader = texts.read(loaded, judged.config, load_tokenizer(model))
    result: dict[str, Any] = {"model": model, "task": task, "splits": {}}
    for name in inputs.splits_named(loaded, split):
        evaluator = reader.evaluator(name, batch_size)
        metrics, examples = evaluator(judged), len(evaluator.split)
        result["splits"][name] = metrics | {"examples": examples}
        print_metrics(metrics, f"{name} ({examples} examples)")
    if output is not None:
        _save(output, result)


def bench(
    model: o.ModelName,
    against: str,
    table: inputs.Table,
    task: o.OptionalTaskName = None,
    output: o.OptionalOutputFile = None,
    seed: o.Seed = 0,
    batch_size: Annotated[list[int] | None, typer.Option(min=1)] = None,
    length: Annotated[list[int] | None, typer.Option(min=1)] = None,
    split: o.Split = "validation",
    dtype: str | None = None,
    rounds: o.Number = 21,
    form: list[str] | None = None,
    chart: Path | None = None,
) -> None:
    """Compare the speed of two models: medians of runs in turns, on random tokens or on a task's padded batches.

    The ops are checked against their reference first. On a GPU, CUDA events time replays of CUDA graphs.

    Args:
        against: The model to compare with.
        batch_size: Sequences at once; may be repeated. Default: 8.
        length: Tokens of each random sequence, with --task at most of each text; may be repeated. Default: 128, with
            --task the preset's.
        dtype: float32, bfloat16 or float16. Default: float32, on a GPU bfloat16.
        rounds: Each times both models once.
        form: On a CPU: compare the models in these forms, with their scores where --task is given: float32, compiled,
            packed, bfloat16, int8, int8-token, int8-bfloat16, onnx, onnx-int8, or all; may be repeated. What moebert
            quantize made is measured as it was saved, whatever the forms. Default: one form, by --dtype.
        chart: With --form and --task: a PNG of the scores over the times. Default: none.
    """
    import torch

    from moebert_kernels.bench.benchmark import chosen_dtype, compare, environment, sizes_of, text_table
    from moebert_kernels.cli.bench_forms import check_forms, forms_chart, forms_table, load_encoders, run_forms
    from moebert_kernels.distill.loading import is_prepared, load_config
    from moebert_kernels.doctor import self_test

    if output is not None:
        check_output_file(output, is_result("cases"), "bench.json")
    if chart is not None and not form:
        raise UserError("chart: expected --form too, whose forms it shows, got none")
    forms = check_forms(form, task, dtype, chart, output) if form else ()
    split = inputs.split_called(split)
    judged = {"split": None if split == "validation" else split}
    o.check_unused("--task", task is None, o.given(table) | judged)
    o.check_unused("random tokens, which --task replaces", task is not None, {"seed": seed or None})
    inputs.check_models(model=model, against=against)
    device = torch.device("cpu") if forms else inputs.device()
    wanted = chosen_dtype(dtype, device)
    broken = [op for op, result in self_test().items() if not result["ok"]]
    if broken:
        raise UserError(f"{broken[0]}: expected to agree with its reference, got something else; see moebert doctor")
    paths = {"model": model, "against": against}
    for path in () if forms else paths.values():
        if is_prepared(load_config(path)):
            raise UserError(f"form: expected one, such as float32, with {path}, which is measured as it was quantized")
    loaded = None if task is None else table.load(task, split, model)

    def batches_of(models: Iterable[Any]) -> list[tuple[Any, Any]]:
        if loaded is None:
            return _random_batches(models, batch_size or [8], length or [128], seed)
        return _task_batches(model, loaded, split, batch_size or [8], length or [None])

    if forms:
        found = run_forms(paths, forms, rounds, batches_of, loaded, split)
        result: dict[str, Any] = {"environment": environment(device, wanted), **found}
        print(forms_table(result))
        if output is not None:
            _save(output, result)
        if chart is not None:
            forms_chart(result, chart)
            print(f"saved in {chart}")
        return
    models = {name: encoder.to(device, wanted) for name, encoder in load_encoders(paths).items()}
    result = {
        "environment": environment(device, wanted), "rounds": rounds,
        "models": {name: {"path": str(paths[name])} | sizes_of(encoder) for name, encoder in models.items()},
        "cases": [compare(models, ids, mask, rounds) for ids, mask in batches_of(models.values())],
    }  # fmt: skip
    print(text_table(result))
    if output is not None:
        _save(output, result)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For bug reports.")] = False) -> None:
    """Report which backend runs each op on this machine and why, and test each op. The exit status is 1 if an op
    disagrees with its reference."""
    from moebert_kernels.doctor import run

    raise typer.Exit(run(as_json))


def demo(output: o.OutputFolder = Path("demo"), seed: o.Seed = 0, quick: bool = False) -> None:
    """Fine-tune, convert and distil all-MiniLM-L6-v2 on movie reviews, and compare. Run again, it goes on.

    Args:
        quick: A short recipe: the way, not the accuracy.
    """
    from moebert_kernels.demo.run import run_demo

    require_extra("demo", "matplotlib")
    check_output(output, "demo")
    claim(output, "demo")
    run_demo(output, quick=quick, seed=seed)


def _random_batches(
    models: Iterable[Any], batch_sizes: list[int], lengths: list[int], seed: int
) -> list[tuple[Any, Any]]:
    """Ids and mask of random tokens, one batch for each size and length."""
    from moebert_kernels.bench.timing import random_inputs
    from moebert_kernels.convert.batches import longest_input

    models = list(models)
    positions = min(longest_input(model.config) or max(lengths) for model in models)
    if max(lengths) > positions:
        raise UserError(f"length: expected at most {positions}, the models' positions, got {max(lengths)}")
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    return [random_inputs(vocabulary, B, T, seed) for B in batch_sizes for T in lengths]


def _task_batches(
    model: str, loaded: TaskData, split: str, batch_sizes: list[int], lengths: Sequence[int | None]
) -> list[tuple[Any, Any]]:
    """Ids and mask of the split's first texts, padded as in evaluation."""
    from moebert_kernels.distill.loading import load_config, load_tokenizer

    config, tokenizer, rows = load_config(model), load_tokenizer(model), loaded.split(split)
    rows = rows.select(range(min(max(batch_sizes), len(rows))))
    batches = []
    for length in lengths:
        features = inputs.Reader(loaded, config, tokenizer, length, labels=False).split(split, rows)
        for B in batch_sizes:
            if len(features) < B:
                raise UserError(f"batch-size: expected at most {len(features)}, the rows of {split}, got {B}")
            batch = features.collate(range(B))
            batches.append((batch["input_ids"], batch["attention_mask"]))
    return batches


def _save(path: Path, content: dict[str, Any]) -> None:
    from moebert_kernels.files import write_json

    write_json(path, content)
    print(f"saved in {path}")
