"""Models whose layers route by task: how a forward is told the task, and heads for several tasks in one classifier."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import MoEConfig, moe_config
from moebert_kernels.nn.context import argument_names, current, derived_class, entered
from moebert_kernels.nn.task_router import checked_task_ids


def set_task(model: nn.Module, name: str | None) -> None:
    """Use this task in forwards that get no `task_ids`; None: such forwards raise. It is not saved with the model.

    Raises:
        UserError: there is no such task, or the model does not route by task.
    """
    config = moe_config(getattr(model, "config", None)) or MoEConfig()
    _set_default(model, None if name is None else config.task_id(name))


def get_task(model: nn.Module) -> str | None:
    """The task that `set_task` set, or a model's only task."""
    config, number = moe_config(getattr(model, "config", None)), getattr(model, "moe_task", None)
    return None if config is None or number is None else list(config.tasks or ())[number]


def install_tasks(model: Any, config: MoEConfig) -> None:
    """Give the forward of a model the argument `task_ids`."""
    _set_default(model, 0 if len(config.tasks or ()) == 1 else None)
    made: Any = task_class
    model.__class__ = made(type(model))


def _set_default(model: nn.Module, number: int | None) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            object.__setattr__(module, "moe_task", number)


def task_ids_of(stack: Any, given: Tensor | int | None, like: Tensor) -> Tensor:
    """The task of every sequence, (B,) int64 on the device of `like` (B, ...).

    Args:
        stack: a model whose layers route by task.
        given: the `task_ids` of its forward. None: those of the model around it, else the task of `set_task`.

    Raises:
        UserError: no task was given, or an id is out of range.
    """
    names = stack.config.quantization_config.tasks
    given = current().task_ids if given is None else given
    given = stack.moe_task if given is None else given
    if given is None:
        raise UserError(f"task_ids: expected an id for each of {', '.join(names)}, or set_task before, got None")
    return checked_task_ids(given, len(names), like.shape[0], like.device)


@functools.cache
def task_class(base: Any) -> type:
    """The class of a model whose forward takes `task_ids`, (B,) integers or one for all sequences.

    With `task_labels` the logits (B, C) are those of the batch's task. In a batch of several tasks, C is the largest
    number of classes, and the columns that a sequence's task lacks hold the dtype's lowest number. The loss is a
    mean over B: cross-entropy, or the squared error where a task has no classes.
    """
    names = argument_names(base.forward)
    has_heads = "ForSequenceClassification" in base.__name__  # of such a model the encoder can be loaded alone

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, task_ids: Tensor | int | None = None, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        config = self.config.quantization_config
        if not has_heads or config.task_labels is None:
            with entered(current()._replace(task_ids=task_ids)):
                return base.forward(self, **inputs)
        like = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
        if like is None:
            raise UserError("input_ids: expected token ids or inputs_embeds, got neither")
        task_ids = _one_if_all_are(self.moe_task if task_ids is None else task_ids)
        checked = task_ids_of(self, task_ids, like)
        labels = inputs.pop("labels", None)
        in_dictionary = inputs.pop("return_dict", None)
        with entered(current()._replace(task_ids=task_ids if isinstance(task_ids, int) else checked)):
            output = base.forward(self, **inputs, return_dict=True)
        if isinstance(task_ids, int):
            output.logits = output.logits[:, rows_of(config, task_ids)].contiguous()
        else:
            output.logits = _of_tasks(output.logits, checked, config)
        if labels is not None:
            is_score = torch.tensor([not config.task_labels[name] for name in config.tasks])
            output = type(output)(
                loss=_losses(output.logits, labels, is_score.to(checked.device)[checked]).mean(), **output
            )
        as_tuple = not (self.config.return_dict if in_dictionary is None else in_dictionary)
        return output.to_tuple() if as_tuple else output

    signature = inspect.signature(base.forward)
    task_ids = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [*signature.parameters.values()]
    last = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:last], task_ids, *parameters[last:]]
    )
    return derived_class(task_class, base, (base,), {"forward": forward})


def rows_of(config: MoEConfig, task_id: int) -> slice:
    """Which rows of the classifier are a task's head."""
    counts = config.outputs_per_task
    start = sum(counts[:task_id])
    return slice(start, start + counts[task_id])


def row_names(config: MoEConfig) -> list[str]:
    """Names of the rows of the classifier: "task: class", or the task of a score."""
    labels = config.task_labels or {}
    return [f"{task}: {label}" if label else task for task in config.tasks or () for label in labels[task] or [""]]


def _one_if_all_are(task_ids: Tensor | int | None) -> Tensor | int | None:
    """A batch's task as an int, if it has only one. While torch compiles, a tensor counts as several tasks."""
    if not isinstance(task_ids, Tensor) or torch.compiler.is_compiling():
        return task_ids
    found = set(task_ids.flatten().tolist()) if not task_ids.is_floating_point() else set()
    return found.pop() if len(found) == 1 else task_ids


def _of_tasks(logits: Tensor, task_ids: Tensor, config: MoEConfig) -> Tensor:
    """Pick the logits of each sequence's own task, (B, largest C), from those of all tasks, (B, sum of C)."""
    per_task = config.outputs_per_task
    counts = torch.tensor(per_task, device=logits.device)
    starts = counts.cumsum(0) - counts
    column = torch.arange(max(per_task), device=logits.device)
    exists = column < counts[task_ids, None]
    columns = (starts[task_ids, None] + column).where(exists, 0)
    return logits.gather(1, columns).masked_fill(~exists, torch.finfo(logits.dtype).min)


def _losses(logits: Tensor, labels: Tensor, is_score: Tensor) -> Tensor:
    """Of each sequence the squared error of its first logit, or the cross-entropy; (B,), in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    squared = (logits[:, 0] - labels).square()
    classes = labels.to(torch.int64).masked_fill(is_score, 0)
    return squared.where(is_score, F.cross_entropy(logits, classes, reduction="none"))
