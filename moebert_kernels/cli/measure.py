"""`moebert eval`, `moebert bench`, `moebert doctor` and `moebert demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.running import check_writable, print_metrics
from moebert_kernels.errors import UserError


def evaluate(
    model: o.ModelName,
    task: o.TaskName,
    data: o.Data = None,
    output: o.OptionalOutputFile = None,
    seed: o.Seed = 0,
    split: o.Split = "validation",
    text_column: o.TextColumns = None,
    label_column: o.LabelColumn = "label",
    regression: o.Regression = False,
    max_length: o.MaxLength = None,
    doc_stride: o.DocStride = 128,
    batch_size: o.BatchSize = 64,
) -> None:
    """Evaluate a model, dense or MoE, with the task's metrics. Nothing in it is random."""
    from moebert_kernels.distill.loading import load_model, load_tokenizer

    if output is not None:
        check_writable(output.absolute().parent)
    loaded = inputs.load_data(inputs.make_task(task, text_column, label_column, regression, model), data, split)
    judged, tokenizer = load_model(model, loaded.task).to(inputs.device()), load_tokenizer(model)
    loaded = inputs.labels_as_in(loaded, judged.config)
    length = inputs.max_length_for(judged.config, loaded.task, max_length)
    pad_to = inputs.padding_for(judged.config, length)
    result: dict[str, Any] = {"model": str(model), "task": loaded.task.name, "splits": {}}
    for name in inputs.splits_named(loaded, split):
        features = inputs.tokenized(loaded, name, tokenizer, length, doc_stride, judged.config)
        metrics = inputs.evaluator(loaded, name, features, batch_size or 64, pad_to)(judged)
        result["splits"][name] = metrics | {"examples": len(loaded.split(name))}
        print_metrics(metrics, f"{name} ({len(loaded.split(name))} examples)")
    if output is not None:
        _write_json(output, result)


def bench(
    model: o.ModelName,
    baseline: Annotated[str, typer.Option("--baseline", help="The model to compare with.")],
    task: o.OptionalTaskName = None,
    data: o.Data = None,
    output: o.OptionalOutputFile = None,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 8,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of each sequence, without --task.")] = 128,
    split: o.Split = "validation",
    text_column: o.TextColumns = None,
    label_column: o.LabelColumn = "label",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each runs both models once.")] = 21,
) -> None:
    """Compare the speed of two models: medians of runs in turns, on random tokens or on a batch of a task's."""
    from moebert_kernels.demo.report import aligned, millions
    from moebert_kernels.demo.timing import interleaved_medians, parameter_counts, random_inputs
    from moebert_kernels.distill.loading import load_encoder
    from moebert_kernels.doctor import self_test

    if output is not None:
        check_writable(output.absolute().parent)
    broken = [op for op, result in self_test().items() if not result["ok"]]
    if broken:
        raise UserError(f"{broken[0]}: expected to agree with its reference, got something else; see moebert doctor")
    models = {name: load_encoder(path).to(inputs.device()) for name, path in (("model", model), ("baseline", baseline))}
    if task is None:
        vocabulary = min(encoder.config.vocab_size for encoder in models.values())
        for encoder in models.values():
            if length > encoder.config.max_position_embeddings:
                positions = encoder.config.max_position_embeddings
                raise UserError(f"length: expected at most {positions}, the model's positions, got {length}")
        ids, mask = random_inputs(vocabulary, batch_size or 8, length, seed)
    else:
        ids, mask = _first_batch(model, task, data, split, text_column, label_column, batch_size or 8)
    times = interleaved_medians(models, ids, mask, rounds)
    rows = [("", "parameters", "active", "FFN ms", "model ms")]
    for name, encoder in models.items():
        counts = parameter_counts(encoder)
        times[name] |= counts
        rows.append((name, millions(counts["total_parameters"]), millions(counts["active_parameters"]),
                     f"{times[name]['ffn_ms']:.1f}", f"{times[name]['model_ms']:.1f}"))  # fmt: skip
    speedup = times["baseline"]["model_ms"] / times["model"]["model_ms"]
    print(aligned(rows))
    print(
        f"speed-up {speedup:.2f} (B={ids.shape[0]} T={ids.shape[1]}, {int(mask.sum())} real tokens, {inputs.device()})"
    )
    if output is not None:
        _write_json(output, {"shape": list(ids.shape), "real_tokens": int(mask.sum()), "speedup": speedup, **times})


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For bug reports.")] = False) -> None:
    """Say what runs each op here and why, and test each against its reference. Exit status 1: one disagrees."""
    from moebert_kernels.doctor import run

    raise typer.Exit(run(as_json))


def demo(
    output: o.OutputFolder = Path("demo"),
    seed: o.Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A short recipe: the way, not the accuracy.")] = False,
) -> None:
    """Fine-tune, convert and distil all-MiniLM-L6-v2 on movie reviews, and compare. Run again, it goes on."""
    from moebert_kernels.demo import run_demo

    check_writable(output)
    run_demo(output, quick=quick, seed=seed)


def _first_batch(
    model: str, task: str, data: list[str] | None, split: str, text_column: list[str] | None, label_column: str, B: int
) -> tuple[Any, Any]:
    """Ids and mask of the split's first sentences, padded as in evaluation."""
    from moebert_kernels.distill.features import tokenize
    from moebert_kernels.distill.loading import load_config, load_tokenizer

    loaded = inputs.load_data(inputs.make_task(task, text_column, label_column, False), data, split)
    rows = loaded.split(split)
    length = inputs.max_length_for(load_config(model), loaded.task, None)
    features = tokenize(rows.select(range(min(B, len(rows)))), loaded.task, load_tokenizer(model), length)
    batch = features.collate(range(min(B, len(features))))
    return batch["input_ids"], batch["attention_mask"]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from moebert_kernels.distill.checkpoint import write_text

    write_text(path, json.dumps(content, indent=1) + "\n")
    print(f"saved in {path}")
