"""The state of a call: what a model's forward knows of its tokens, for the layers inside it.

Layers deep in a model of another package get only hidden states. The thread that runs the forward keeps what else they
need while it runs. If the modules kept it, other threads, replicas, copies and later calls would see it.

    model.forward -> `entered` -> layers: `current`

Gradient checkpointing runs layers again in backward, after the forward and perhaps others have ended, and perhaps in
one of autograd's threads. `RecomputedLayer` hands the call to the function that is checkpointed, so that every run of
it sees what the first one saw. `threading.local`, because torch.compile and torch.export cannot trace `contextvars`.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from moebert_kernels.grouping import Grouping

Held = TypeVar("Held")


class Groupings:
    """The groupings of a stack's layers.

    A class of its own, because Dynamo reads all of a tuple: of a dict in `Tokens`, whose keys are layers, it took the
    first key for every layer that it compiled after a graph break, and ran the first layer in the place of the others.
    """

    def __init__(self, by_layer: Mapping[nn.Module, Grouping | None] | None = None) -> None:
        self._by_layer = by_layer or {}

    def of(self, layer: nn.Module) -> Grouping | None:
        return self._by_layer.get(layer)


class Tokens(NamedTuple):
    """What one forward of a stack of layers knows of its tokens.

    Attributes:
        groupings: for each feed-forward layer of the stack that of the B * T tokens, if it is known before the first
            layer runs; else None.
        token_ids: (B, T) integers, or None.
        token_mask: (B, T or more), 0 where a token is padding, or None. With a key-value cache it begins with the
            tokens of earlier calls.
        task_ids: (B,) int64, the task of every sequence, or None.
        in_order: what one module hands to the layer behind it: hidden states in the order of the experts, and the
            grouping by which they are. None: no module may.
    """

    groupings: Groupings
    token_ids: Tensor | None = None
    token_mask: Tensor | None = None
    task_ids: Tensor | None = None
    in_order: list[tuple[Tensor, Grouping]] | None = None


class Call(NamedTuple):
    """The state of a running forward.

    Attributes:
        tokens: those of the innermost stack, or None.
        losses: the list for its routers' balance losses, each (); None: nobody collects them.
        held: what `hold` keeps for a recomputation; None outside of a checkpointed function.
        task_ids: the (B,) integers, or one for all sequences, that a model around the stack got; or None.
    """

    tokens: Tokens | None = None
    losses: list[Tensor] | None = None
    held: dict[Any, Any] | None = None
    task_ids: Tensor | int | None = None


class _Local(threading.local):
    def __init__(self) -> None:  # in each thread, so that its second forward finds what the first one compiled for
        self.call: Call | None = None


_local = _Local()


def current() -> Call:
    """The innermost call that runs in this thread; an empty one where none does."""
    return _local.call or Call()


class entered:
    """Make a call the current one of this thread; the one before it comes back at the end, after errors too."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __enter__(self) -> Call:
        self.before = _local.call
        _local.call = self.call
        return self.call

    def __exit__(self, *_: object) -> None:
        _local.call = self.before


def routed(forward: Callable[..., Any], tokens_of: Callable[[Any, dict[str, Any]], Tokens]) -> Callable[..., Any]:
    """The `forward` of a model's class, inside a call that knows its tokens.

    Args:
        forward: the function of a class, with `self`. Libraries call it directly, so hooks of `__call__` would not run.
        tokens_of: makes the tokens from the model and the named arguments of its forward.
    """
    names = argument_names(forward)

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        kwargs.pop("task_ids", None)
        with entered(current()._replace(tokens=tokens_of(self, inputs))):
            return forward(self, *args, **kwargs)

    return wrapped


def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments of a class's function behind `self`, in their order."""
    return tuple(inspect.signature(forward).parameters)[1:]


def hold(owner: object, value: Held) -> Held:
    """Return `value`; in a recomputation, the value that the first run of the same layer had.

    This is for settings that a context manager keeps on modules: backward may run after the context has ended.
    """
    held = current().held
    return value if held is None else held.setdefault(owner, value)


def checkpointed(checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint(run, *args)`, in which every run of `run` is inside the call that is current now.

    The balance losses of a run become outputs of the checkpointed function. Otherwise the reentrant form, whose first
    run has no gradients, would lose them.
    """
    if torch.compiler.is_compiling():  # what is traced is replayed, and no Python runs again
        return checkpoint(run, *args)
    tokens, losses = current()[:2]
    asked = losses is not None  # not the list itself: what is checkpointed would keep its own graph alive
    held: dict[Any, Any] = {}
    was_tuple, count = False, 0

    def run_inside(*args: Any) -> tuple[Any, ...]:
        nonlocal was_tuple, count
        found: list[Tensor] = []
        with entered(Call(tokens, found if asked else None, held)):
            output = run(*args)
        was_tuple, count = isinstance(output, tuple), len(found)
        return (*output, *found) if was_tuple else (output, *found)

    outputs = checkpoint(run_inside, *args)
    end = len(outputs) - count
    if losses is not None:
        losses.extend(outputs[end:])
    return outputs[:end] if was_tuple else outputs[0]


# The call of a layer's first run, by its hidden states: a checkpoint that others put around the layer, as FSDP's
# wrapper does, runs it again with the same tensor (the reentrant form does not).
_first_runs: Any = WeakTensorKeyDictionary()


class RecomputedLayer:
    """A base class for checkpointed layers, placed before their own class; see `checkpointed`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run: Any = super().__call__  # type: ignore[misc]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not args:
            return run(*args, **kwargs)
        call = current()
        if call.tokens is None:
            call = _first_runs.get(args[0], call)
        else:
            call = call._replace(held={} if call.held is None else call.held)
            _first_runs[args[0]] = call._replace(losses=None)
        with entered(call):
            return run(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_gradient_checkpointing_func":
            value = functools.partial(checkpointed, value)
        super().__setattr__(name, value)


@functools.cache
def recomputed_class(base: Any) -> Any:
    """Derive a `RecomputedLayer` from the class of a layer."""
    return derived_class(recomputed_class, base, (RecomputedLayer, base), {})


def derived_class(make: Callable[[Any], Any], base: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """Derive a class that replaces `base`: it has the same name, and its instances can be pickled.

    Args:
        make: the function of a module that gives this class for `base`; unpickling calls it.
        base: what other packages know, by name or by isinstance.
        bases, members: as for `type`.
    """

    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, bases, {**named, "_made_of": (make, base), "__reduce_ex__": _reduce, **members})


def drop_autocast(model: Any) -> dict[str, Any]:
    """Remove the forward that accelerate leaves on a model it has trained under autocast, in the way of the class's.

    Its unwrapping leaves the innermost function of the class's forward, without all decorators, so without routing
    too. A forward of the user's own stays.

    Returns:
        The attributes that were removed; `vars(model).update` puts them back.
    """
    own, function = vars(model), getattr(vars(model).get("forward"), "__func__", None)
    of_classes = [inspect.unwrap(base.__dict__["forward"]) for base in type(model).__mro__ if "forward" in vars(base)]
    if "_original_forward" not in own and function not in of_classes:
        return {}
    return {name: own.pop(name) for name in ("forward", "_original_forward") if name in own}


def plain_class(named: Any) -> Any:
    """The class that other packages know, of one that `derived_class` made of it."""
    while made_of := named.__dict__.get("_made_of"):
        named = made_of[1]
    return named


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    makes, named = [], type(self)
    while made_of := named.__dict__.get("_made_of"):
        make, named = made_of
        makes.append(make)
    return (_instance, (makes[::-1], named), *object.__reduce_ex__(self, protocol)[2:])


def _instance(makes: list[Callable[[Any], Any]], named: type) -> Any:
    made: Any = functools.reduce(lambda base, make: make(base), makes, named)
    return made.__new__(made)
