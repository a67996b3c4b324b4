"""`moebert merge` and `moebert student`: dense models that transformers alone can load."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import already_written, call_of, tokenizer_of, write_model
from moebert_kernels.errors import UserError, about


def merge(
    ctx: typer.Context, model: o.ModelName, output: o.OutputFolder, task: str | None = None, force: o.Force = False
) -> None:
    """Turn a task-routed MoE into the dense model that it is for one task: transformers alone can serve it.

    Args:
        task: One of the model's tasks. Default: none, for a model with one expert.
    """
    from moebert_kernels.convert import merge as merged
    from moebert_kernels.distill.loading import load_as_saved

    inputs.check_models(model=model)
    identity = call_of(ctx)
    if already_written(output, identity, force, model):
        return
    write_model(output, merged(load_as_saved(model), task), tokenizer_of(model), identity)


def student(
    ctx: typer.Context,
    model: str,
    output: o.OutputFolder,
    task: str | None = None,
    shape: str | None = None,
    layers: o.AtLeastOne = None,
    hidden_size: o.AtLeastOne = None,
    intermediate_size: o.AtLeastOne = None,
    heads: o.AtLeastOne = None,
    init: str = "layers",
    teacher_layer: list[int] | None = None,
    seed: o.Seed = 0,
    force: o.Force = False,
) -> None:
    """Make a small dense model with a teacher's head and labels, to be distilled or fine-tuned.

    Args:
        model: The teacher: a dense model, or a task-routed MoE together with --task.
        task: Of a task-routed MoE: the task. Default: none.
        shape: 4l-312, 6l-384, 6l-768 or 3l-384. Without it the teacher's sizes.
        layers: Number of layers. Default: the shape's.
        hidden_size: Width of its states. Default: the shape's.
        intermediate_size: Feed-forward neurons. Default: the shape's.
        heads: Heads of attention. Default: the shape's.
        init: layers: every k-th of the teacher's; random; or a model whose weights to start from.
        teacher_layer: With --init layers: which of them, once for each, counted from 1. Default: every k-th.
    """
    from moebert_kernels.convert import describe_layer_map, layer_map, make_student
    from moebert_kernels.distill.loading import load_as_saved, load_encoder, load_tokenizer

    other = None if init in ("layers", "random") else init
    inputs.check_models(model=model, init=other)
    inputs.check_trainable(model)
    if other is not None:
        with about("init", "model"):
            inputs.check_trainable(other)
    identity = call_of(ctx)
    if already_written(output, identity, force, model, init):
        return
    teacher = _dense_teacher(load_as_saved(model), task)
    sizes = {
        "num_hidden_layers": layers, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
    }  # fmt: skip
    sizes = {name: size for name, size in sizes.items() if size is not None}
    given: Any = init
    wanted: Any = None
    if init in ("layers", "random"):
        wanted = replace(_shape(shape, teacher.config), **sizes)
    else:
        given = load_encoder(init)
        if load_tokenizer(init).get_vocab() != load_tokenizer(model).get_vocab():
            raise UserError(f"init: expected a model with the teacher's vocabulary, got {init} with another")
        if shape or sizes:
            wanted = replace(_shape(shape, given.config), **sizes)
    with about("layers", "layer_map"):
        made = make_student(teacher, wanted, given, layers=teacher_layer, seed=seed)
    M, N = made.config.num_hidden_layers, teacher.config.num_hidden_layers
    pairs = layer_map(M, N) if teacher_layer is None else dict(enumerate(teacher_layer, 1))
    print(f"{sum(p.numel() for p in made.parameters()):,} parameters; {describe_layer_map(pairs)}")
    write_model(output, made, tokenizer_of(model), identity)


def _dense_teacher(model: Any, task: str | None) -> Any:
    from moebert_kernels.convert import merge as merged
    from moebert_kernels.layers import moe_config

    moe = moe_config(model.config)
    if moe is not None and moe.is_task_routed:
        return merged(model, task)
    if task is not None:
        raise UserError(f"task: expected none with a model that does not route by task, got {task!r}")
    return model


def _shape(name: str | None, config: Any) -> Any:
    """The preset of this name, or the sizes of a model."""
    from moebert_kernels.convert import STUDENT_SHAPES, StudentShape

    if name is None:
        fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        return StudentShape(*(getattr(config, field) for field in fields))
    if name not in STUDENT_SHAPES:
        raise UserError(f"shape: expected one of {', '.join(STUDENT_SHAPES)}, got {name!r}")
    return STUDENT_SHAPES[name]
