"""A student trained by a recipe: its stages one after another, one cache of the teacher's outputs for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moebert_kernels.data.files import split_name
from moebert_kernels.data.tasks import Task, load_task
from moebert_kernels.distill.checkpoint import model_fingerprint
from moebert_kernels.distill.config import FitResult, Metrics
from moebert_kernels.distill.features import Batches, Features, tokenize
from moebert_kernels.distill.identity import tokenizer_digest
from moebert_kernels.distill.loading import check_reach
from moebert_kernels.distill.loop import MAPS, check_fit, fit
from moebert_kernels.distill.microbert import MicroBertObjective
from moebert_kernels.distill.recipe import Recipe
from moebert_kernels.distill.teacher import TeacherInfo, check_one_head, teacher_info
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def fit_recipe(
    student: nn.Module,
    recipe: Recipe,
    train: Features,
    *,
    task: Task,
    output_dir: Path,
    teacher: nn.Module | TeacherCache | None = None,
    cache: Path | None = None,
    cache_dtype: str | None = None,
    cache_inputs: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], Metrics],
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    also_save: Callable[[Path], object] | None = None,
    resume: bool = True,
) -> FitResult:
    """Train `student`; an interrupted call, made again, goes on where it was.

    What does not fit in any of the stages is found before the first one trains. A map of the same two states as in an
    earlier stage goes on from there.

    Args:
        student: a transformers model for the task; holds the weights of the result's `model_dir` at the end.
        recipe: stages without a term are skipped. The last stage writes into `output_dir`, the others into
            `output_dir/NAME`; only the last is evaluated, as the first ones may leave the head untrained.
        train: see `with_extra_text` for texts without labels.
        teacher: of the same task, or its cached outputs; None for recipes that need none.
        cache: keep the teacher's outputs in this folder; sentence vectors alone where no stage needs more.
        cache_dtype, cache_inputs: see `TeacherCache.build`.

    Raises:
        UserError: as `fit` and `TeacherCache.build`; a recipe without terms, or one that needs a teacher and got none;
            texts longer than one of the models takes.
    """
    stages = recipe.active
    if recipe.needs_teacher and teacher is None:
        raise UserError(f"teacher: expected one for the recipe {recipe.name}, got none")
    if recipe.needs_teacher:
        check_one_head("model", student)
    objectives = [stage.objective(task) for stage in stages]
    configs = [replace(stage.fit_config(task, seed), patience=None) for stage in stages[:-1]]
    configs.append(stages[-1].fit_config(task, seed))
    student_config: Any = student.config
    check_reach("model", student_config, int(train.lengths.max()))
    source: nn.Module | TeacherCache | None = teacher
    if recipe.needs_teacher and isinstance(teacher, nn.Module):
        teacher_config: Any = teacher.config
        check_reach("teacher", teacher_config, int(train.lengths.max()))
    if recipe.needs_teacher and cache is not None:
        if not isinstance(teacher, nn.Module):
            raise UserError(f"cache: expected none with a teacher's cached outputs, got {cache}")
        info = _to_be_cached(student, objectives, teacher, cache_dtype, pooled=all(stage.is_lean for stage in stages))
        batches = Batches(train, stages[0].batch_size, seed)
        source = _cached(teacher, info, batches, cache, cache_dtype, cache_inputs)
    facts = {**(identity or {}), "model weights": model_fingerprint(student)}
    runs: list[dict[str, Any]] = [
        {
            "train": Batches(train, stage.batch_size, seed),
            "config": config,
            "output_dir": output_dir if stage is stages[-1] else output_dir / stage.name,
            "objective": objective,
            "teacher": None if objective is None else source,
            "evaluate": evaluate if stage is stages[-1] else None,
            "identity": {**facts, "stage": stage.name},
            "resume": resume,
        }
        for stage, objective, config in zip(stages, objectives, configs, strict=True)
    ]
    for run in runs:
        check_fit(student, **run)
    carried: dict[tuple[int, int], Tensor] = {}
    for run, objective in zip(runs, objectives, strict=True):
        if objective is not None:
            objective.first_maps = carried
        result = fit(student, **run, also_save=also_save)
        if objective is not None and objective.maps is not None and run is not runs[-1]:
            carried = carried | _trained_maps(objective, run["output_dir"])
    return result


def _trained_maps(objective: MicroBertObjective, folder: Path) -> dict[tuple[int, int], Tensor]:
    """The maps that a finished stage left in its folder, whether it was trained now or earlier."""
    file = folder / MAPS
    if not file.exists():
        raise UserError(
            f"stages: expected the maps of the finished one in {file}, got none (use another output folder)"
        )
    return objective.named_maps(load_file(file))


def _to_be_cached(
    student: Any, objectives: Sequence[MicroBertObjective | None], teacher: Any, dtype: str | None, pooled: bool
) -> TeacherInfo:
    """What a cache for these objectives will hold, which each of them accepts.

    Raises:
        UserError: one does not.
    """
    some = [objective for objective in objectives if objective is not None]
    ours, theirs = (model.config.get_text_config().num_hidden_layers for model in (student, teacher))
    layers = sorted({layer for o in some for layer in o.pairs(ours, theirs).values()}) or [theirs]
    info = replace(teacher_info(teacher, layers), stored_as=dtype or "as it computes", pooled=pooled)
    for objective in some:
        objective.check(student, info)
    return info


def _cached(
    teacher: nn.Module, info: TeacherInfo, batches: Batches, folder: Path, dtype: str | None,
    inputs: Mapping[str, Any] | None,
) -> TeacherCache:  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TeacherCache.build(
        teacher.to(device),
        batches,
        folder,
        layers=info.layers,
        pooled=info.pooled,
        dtype=dtype,
        inputs=inputs,
        device=device,
    )


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """What decides how texts become token ids, for `TeacherCache.build`."""
    return {"tokens of the tokenizer": tokenizer_digest(tokenizer), "max_length": max_length}


def check_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless the same ids are the same tokens to student and teacher."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    by_id = [{number: token for token, number in vocabulary.items()} for vocabulary in (theirs, ours)]
    number = min(i for i in {*by_id[0], *by_id[1]} if by_id[0].get(i) != by_id[1].get(i))
    wanted, got = (repr(tokens[number]) if number in tokens else "none" for tokens in by_id)
    raise UserError(
        f"vocabulary: expected the teacher's {len(theirs)} tokens, where {number} is {wanted}, got {len(ours)} tokens,"
        f" where it is {got}"
    )


def extra_text(task: Task, file: Path) -> Dataset:
    """Rows with the task's text columns, of a tsv, csv or jsonl file; labels, if it has any, are not read.

    Raises:
        UserError: another format, or a column that is missing.
    """
    if split_name(file)[1] == ".txt" or file.is_dir():
        columns = ", ".join(task.text_columns)
        raise UserError(f"extra-text: expected a tsv, csv or jsonl file with {columns}, got {file}")
    rows = load_task(replace(task, kind="lm"), {"train": file}).train  # running text has no labels either
    return rows.add_column("label", [0] * len(rows))


def with_extra_text(
    train: Features, extra: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Features:
    """The training features and, after them, those of texts without labels, which `labelled` tells apart."""
    more = tokenize(extra, task, tokenizer, max_length)
    labels = train.targets["labels"]
    types = None if train.token_type_ids is None else train.token_type_ids + (more.token_type_ids or [])
    return Features(
        train.input_ids + more.input_ids,
        {
            "labels": np.concatenate([labels, np.zeros(len(more), dtype=labels.dtype)]),
            "labelled": np.arange(len(train) + len(more)) < len(train),
        },
        train.padding_id,
        types,
        cut=train.cut + more.cut,
        longest=max(train.longest, more.longest),
    )
