"""Models whose layers route: token ids reach every layer, and balance losses reach the model's loss.

The model stays transformers': `install_routing` gives some modules in it a class made for their own class.

- A stack, which gets `input_ids` and holds layers: its forward groups the tokens of all layers before the first runs.
- A layer that transformers checkpoints: every run of it sees the routing of its first one. Where its feed-forward is a
  function that transformers may call in chunks, it is one whose signature is known.
- The model itself: with a learned router, its forward adds the balance loss to `loss`. As every model inside it, it
  resizes the hash tables with the vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moebert_kernels.errors import UserError
from moebert_kernels.layers.feed_forward import MoEFeedForward
from moebert_kernels.layers.tasks import install_tasks, task_ids_of
from moebert_kernels.nn.context import (
    Groupings,
    RecomputedLayer,
    Tokens,
    argument_names,
    current,
    derived_class,
    entered,
    recomputed_class,
    routed,
)
from moebert_kernels.nn.hash_router import HashRouter, group_by_hash

_NO_TEXT = {"pixel_values", "input_features", "input_values"}  # inputs of image and audio encoders
# Dynamo of torch 2.11 could not trace a form of `chunked_class`; models without that class are only slower.
CHUNKS_ARE_TRACED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def takes_token_ids(module: nn.Module) -> bool:
    """Whether this is a model of transformers whose forward has `input_ids`."""
    return isinstance(module, PreTrainedModel) and "input_ids" in inspect.signature(module.forward).parameters


def stack_of(model: nn.Module, name: str) -> Any:
    """The innermost model around the module of this dotted name that gets token ids; None: there is none.

    The layers of an image or audio encoder have none, even if a model around it takes text as well as images.
    """
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if takes_token_ids(module):
            return module
        if not _NO_TEXT.isdisjoint(inspect.signature(module.forward).parameters):
            return None
    return None


def install_routing(model: Any, names: list[str]) -> None:
    """Let token ids reach the layers at these dotted names, and their balance losses reach the model's loss."""
    stacks: dict[Any, list[MoEFeedForward]] = {}
    for name in names:
        stacks.setdefault(stack_of(model, name), []).append(model.get_submodule(name))
    for stack, layers in stacks.items():
        if stack is not None:
            _change_class(stack, stack_class)
            object.__setattr__(stack, "moe_layers", layers)  # a list, and so no submodule: the layers have their places
            for layer in layers:
                layer.is_told_tokens = True
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 0  # it saves memory alone, and a chunk has neither its ids nor its mask
        if isinstance(module, PreTrainedModel):
            _change_class(module, resizing_class)
        if isinstance(module, GradientCheckpointingLayer) and not isinstance(module, RecomputedLayer):
            _change_class(module, recomputed_class)
            if "_gradient_checkpointing_func" in vars(module):  # enabled before, and now taken note of
                module._gradient_checkpointing_func = module._gradient_checkpointing_func
            if hasattr(module, "feed_forward_chunk") and CHUNKS_ARE_TRACED:
                _change_class(module, chunked_class)
    config = model.config.quantization_config
    if config.is_learned:
        _change_class(model, balanced_class)
    if config.is_task_routed:
        install_tasks(model, config)


def _change_class(module: Any, make: Callable[[Any], type]) -> None:
    module.__class__ = make(type(module))


def moe_layers(model: nn.Module) -> list[MoEFeedForward]:
    """All layers of a converted model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, MoEFeedForward)]


@functools.cache
def stack_class(base: type) -> type:
    """The class of a stack whose forward tells its layers the tokens."""
    return derived_class(stack_class, base, (base,), {"forward": routed(base.forward, tokens_of)})  # type: ignore[attr-defined]


def tokens_of(stack: Any, inputs: Mapping[str, Any]) -> Tokens:
    """What the layers of a stack, one with `moe_layers`, are told of the arguments of its forward.

    Raises:
        UserError: no token ids under hash routing, no task under task routing, or one out of range.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    config, layers = stack.config.quantization_config, stack.moe_layers
    if not isinstance(mask, Tensor) or mask.ndim != 2 or (config.is_hash_routed and config.route_padding):
        mask = None  # other routers know themselves whether they route padding
    groupings: list[Any] = [None] * len(layers)
    routers = [layer.router for layer in layers]
    task_ids = inputs.get("task_ids")
    if config.is_task_routed:
        like = ids if ids is not None else inputs.get("inputs_embeds")
        if like is None:
            raise UserError("input_ids: expected token ids or inputs_embeds, got neither")
        task_ids = task_ids_of(stack, task_ids, like)
    elif task_ids is not None:
        raise UserError(f"task_ids: expected none with router={config.router!r}, got some")
    if isinstance(routers[0], HashRouter):
        if ids is None:
            got = "none" if inputs.get("inputs_embeds") is None else "inputs_embeds alone"
            raise UserError(f"input_ids: expected token ids, which hash routing needs, got {got}")
        if not torch.compiler.is_compiling():  # see `Groupings`
            groupings = group_by_hash(routers, ids, None if mask is None else mask[:, -ids.shape[-1] :]) or groupings
    return Tokens(Groupings(dict(zip(layers, groupings, strict=True))), ids, mask, task_ids, in_order=[])


@functools.cache
def resizing_class(base: Any) -> type:
    """The class of a model whose `resize_token_embeddings` also resizes the hash tables."""

    @functools.wraps(base.resize_token_embeddings)
    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        embeddings = base.resize_token_embeddings(self, *args, **kwargs)
        for stack in self.modules():
            for layer in getattr(stack, "moe_layers", ()):
                size = stack.get_input_embeddings().num_embeddings
                if isinstance(layer.router, HashRouter) and layer.router.vocab_size != size:
                    layer.router.resize(size)  # new tokens get random experts
        return embeddings

    return derived_class(resizing_class, base, (base,), {"resize_token_embeddings": resize_token_embeddings})


@functools.cache
def chunked_class(base: Any) -> type:
    """The class of a layer such as BERT's, whose `feed_forward_chunk` has its signature ready.

    transformers inspects it in each layer of each forward, which takes a twentieth of a very small model's time.
    """
    chunk: Any = base.feed_forward_chunk

    # A function: of a property that gives a bound one, Dynamo makes a call of itself after a graph break.
    @functools.wraps(chunk)
    def feed_forward_chunk(self: Any, *args: Any, **kwargs: Any) -> Any:
        return chunk(self, *args, **kwargs)

    feed_forward_chunk.__signature__ = inspect.signature(chunk)  # type: ignore[attr-defined]
    return derived_class(chunked_class, base, (base,), {"feed_forward_chunk": feed_forward_chunk})


@contextmanager
def balance_losses() -> Iterator[list[Tensor]]:
    """Collect the balance losses, each (), of the layers of forwards inside; the models' own `loss` is without them."""
    losses: list[Tensor] = []
    with entered(current()._replace(losses=losses)):
        yield losses


def summed_losses(losses: Sequence[Tensor]) -> Tensor:
    """The balance loss () of a forward: the sum of its layers', which may be on several devices."""
    total = losses[0]
    for loss in losses[1:]:
        total = total.to(loss.device) + loss
    return total


@functools.cache
def balanced_class(base: type) -> type:
    """The class of a model with learned routers: its `loss` contains the balance loss with the configured weight."""
    names = argument_names(base.forward)  # type: ignore[attr-defined]

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        weight = self.config.quantization_config.balance_weight
        inputs = dict(zip(names, args, strict=False)) | kwargs
        labelled = any(inputs.get(name) is not None for name in ("labels", "start_positions"))
        if not weight or not labelled or current().losses is not None:
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        with balance_losses() as losses:
            output = base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        loss = output[0] if isinstance(output, tuple) else output.get("loss")
        if loss is None or loss.ndim:  # the class wants labels of another name, too
            return output
        balance = weight * summed_losses(losses)
        if isinstance(output, tuple):
            return (output[0] + balance.to(output[0].device), *output[1:])
        output.loss = output.loss + balance.to(output.loss.device)
        return output

    return derived_class(balanced_class, base, (base,), {"forward": forward})
