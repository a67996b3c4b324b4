"""Inference on a GPU by replays of CUDA graphs: a forward of a small batch costs less than its launches do."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from moebert_kernels import graphs
from moebert_kernels.errors import UserError
from moebert_kernels.nn.context import argument_names, derived_class


def use_cuda_graphs(model: Any, most: int = 32) -> Any:
    """Let a model's forwards without gradients be replayed from CUDA graphs, one for each shape of their inputs.

    The first forward with new shapes runs four times and is captured; the next ones copy their inputs and replay. Let
    the tokenizer pad to few lengths (`pad_to_multiple_of=64`). What cannot be captured runs as before, after one
    warning with the reason: a forward that waits for the GPU, inputs or outputs that are neither tensors nor plain
    values (as a key-value cache), and shapes beyond `most`. So do forwards with gradients and in training. Threads that
    call the model must share one CUDA stream.

    Args:
        model: of transformers, with all weights on the current GPU; changed, and returned. A graph reads the weights
            where they are: changes in place are seen, and what replaces weights (`to`, `half`) must come before.
        most: graphs that are kept. Each holds the memory that a forward takes.

    Raises:
        UserError: not a model of transformers on one GPU, or `most` is no integer of at least 1.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: expected a model of transformers, got {type(model).__name__}")
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or torch.device(next(iter(devices))).type != graphs.DEVICE:
        raise UserError(f"model: expected all weights on one GPU, got them on {', '.join(sorted(devices)) or 'none'}")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise UserError(f"most: expected an integer of at least 1, got {most!r}")
    if not isinstance(vars(model).get("cuda_graphs"), Graphs):
        kind: Any = type(model)
        model.__class__ = replaying_class(kind)
    object.__setattr__(model, "cuda_graphs", Graphs(most))
    return model


@functools.cache
def replaying_class(base: Any) -> type:
    """The class of a model whose forward is replayed."""
    names = argument_names(base.forward)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        run = functools.partial(base.forward, self)
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return run(**inputs)
        return self.cuda_graphs(run, inputs, getattr(self, "moe_task", None))

    return derived_class(replaying_class, base, (base,), {"forward": forward})


class Graphs:
    """Graphs of a forward by the shapes of its inputs; a copy of a model has none yet."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._ready: dict[Hashable, Any] = {}  # replay, inputs and outputs; None: runs as before
        self._lock = threading.Lock()  # of the graphs' own inputs and outputs

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.most,)

    def __call__(self, run: Callable[..., Any], inputs: Mapping[str, Any], task: int | None = None) -> Any:
        """What `run` gives of the inputs. `task`: that of `set_task`, which a graph keeps."""
        key = graphs.input_key({**inputs, "moe_task": task})
        if key is None:
            self._warn("an input is neither a tensor nor a plain value")
            return run(**inputs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        with self._lock:
            if key not in self._ready:
                if len(self._ready) >= self.most:
                    self._warn(f"there are {self.most} graphs already; pad to fewer lengths")
                    return run(**inputs)
                self._ready[key] = self._captured(run, inputs, tensors)
            if self._ready[key] is not None:
                replay, own, outputs = self._ready[key]
                for name, value in tensors.items():
                    own[name].copy_(value)
                replay()
                return pytree.tree_map_only(Tensor, Tensor.clone, outputs)
        return run(**inputs)

    def _captured(self, run: Callable[..., Any], inputs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        with torch.inference_mode(False):  # or no later call could write to them
            own = {name: value.clone() for name, value in tensors.items()}
        try:
            replay, outputs = graphs.captured(lambda: run(**{**inputs, **own}))
        except Exception as error:  # whatever a library raises when it may not wait for the device
            self._warn(str(error).partition("\n")[0] or type(error).__name__)
            return None
        others = {type(x).__name__ for x in pytree.tree_leaves(outputs) if not isinstance(x, (Tensor, *graphs.PLAIN))}
        if others:  # a key-value cache: every replay would return, and write over, the same one
            self._warn(f"an output is a {', '.join(sorted(others))}; for decoders pass use_cache=False")
            return None
        return replay, own, outputs

    def _warn(self, reason: str) -> None:
        message = f"cuda graphs: expected a forward that can be replayed, got one that runs as before: {reason}"
        warnings.warn(message, stacklevel=4)  # which Python shows once for each place and text
