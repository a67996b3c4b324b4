"""CUDA graphs: a call is captured once, and a replay costs one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

DEVICE = "cuda"
PLAIN = (bool, int, float, str, type(None))

Result = TypeVar("Result")


def captured(run: Callable[[], Any], calls: int = 1) -> tuple[Callable[[], None], Any]:
    """So many calls of `run` in a row as a CUDA graph, and where a replay leaves the last one's outputs.

    `run` is called three times before. A replay costs one launch and allocates nothing.

    Raises:
        Exception: it cannot be captured. One that waits for the device is told before, where torch notices: a capture
            that fails leaves torch on its stream, and the allocator in the belief that it goes on.
    """
    with _elsewhere(), _as_if_capturing():
        for _ in range(2):
            run()
    rehearsed(run)

    def several() -> Any:
        for _ in range(calls):
            outputs = run()
        return outputs

    return recorded(several)


def rehearsed(run: Callable[[], Result]) -> Result:
    """`run()`, in the way that a capture will see; one that waits for the device raises."""
    with _elsewhere(), _as_if_capturing(), _waiting_is_an_error():
        return run()


def recorded(run: Callable[[], Result], pool: Any = None) -> tuple[Callable[[], None], Result]:
    """A call of `run`, which was rehearsed, as a CUDA graph: nothing is computed yet.

    Args:
        run: what is captured.
        pool: memory that graphs share whose outputs are read before the next of them runs.
    """
    caller, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    # other threads, such as that which pins batches, may call the device meanwhile
    capture = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    with torch.cuda.stream(caller), capture:  # the outer one takes the caller's stream up again
        outputs = run()
    return graph.replay, outputs


def input_key(inputs: Mapping[str, Any]) -> Hashable:
    """What a graph is for: shapes, dtypes and plain values. None: no key can say it."""
    key: list[Hashable] = [torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)]
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            key.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, PLAIN):
            key.append((name, type(value), value))
        else:
            return None
    return tuple(key)


def is_capturing() -> bool:
    """Whether what runs is captured, or rehearsed for it, and may not wait for the device."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # a torch without CUDA
        return False


@contextmanager
def _elsewhere() -> Iterator[None]:
    """On a stream of its own, behind the caller's and before it."""
    caller, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(caller)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # the caller goes on after an error too, and may free what is still read
        caller.wait_stream(stream)


@contextmanager
def _as_if_capturing() -> Iterator[None]:
    """Code that asks whether it is captured, as transformers' masks do, takes the way that a capture will see."""
    asked = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = asked


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
