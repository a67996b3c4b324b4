"""`moebert importance`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import check_output_file
from moebert_kernels.cli.sizes import check_same_scores, holds_scores, say_scores


def importance(
    model: o.ModelName,
    task: o.TaskName,
    output: o.OutputFile,
    texts: inputs.Texts,
    seed: o.Seed = 0,
    split: str = "train",
    max_examples: o.AtLeastOne = None,
    batch_size: o.Number = 32,
    force: o.Force = False,
) -> None:
    """Score every feed-forward neuron of a fine-tuned dense model, in one backward pass per batch.

    Args:
        split: The split to score on. validation is what the original code does.
        max_examples: Score on so many examples, drawn by --seed. Default: all.
        batch_size: Sequences at once.
    """
    from moebert_kernels.convert.sites import common_width, find_sites
    from moebert_kernels.distill.loading import load_model, load_tokenizer
    from moebert_kernels.distill.scoring import score_split

    check_output_file(output, holds_scores, "importance.safetensors")
    split = inputs.split_called(split)
    inputs.check_models(model=model)
    inputs.check_dense(model)
    loaded = texts.load(task, split, model)
    teacher = load_model(model, loaded.task)
    common_width(find_sites(teacher))  # which refuses others
    reader = texts.read(loaded, teacher.config, load_tokenizer(model))
    rows = _joined([reader.data.split(name) for name in inputs.splits_named(loaded, split)])
    if max_examples is not None and max_examples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(max_examples))
    features = reader.split(split, rows)
    facts = {
        "split": split, "task": task, "max_length": reader.max_length, "doc_stride": reader.doc_stride,
        "max_examples": max_examples, "seed": seed if max_examples else None, "hold_out": texts.hold_out,
    }  # fmt: skip
    if output.exists() and not force:
        check_same_scores(output, teacher, facts, features)
        say_scores(output)
        print(f"{output} is there already")
        return
    read = ", ".join(str(Path(one)) for one in texts.data or ()) or f"the Hub's {task}"
    score_split(
        teacher.to(inputs.device()), features, output, batch_size=batch_size, data=read, split=split, task=task,
        call=facts,
    )  # fmt: skip
    say_scores(output)
    print(f"saved in {output}")


def _joined(parts: list[Any]) -> Any:
    """Splits one after another, with rows numbered anew."""
    from datasets import concatenate_datasets

    from moebert_kernels.data.held_out import numbered

    return parts[0] if len(parts) == 1 else numbered(concatenate_datasets(parts))
