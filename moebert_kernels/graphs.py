"""CUDA graphs: a call is captured once, and a replay costs one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def captured(run: Callable[[], Any], calls: int = 1) -> tuple[Callable[[], None], Any]:
    """So many calls of `run` in a row as a CUDA graph, and where a replay leaves the last one's outputs.

    A replay costs one launch and allocates nothing.

    Raises:
        Exception: it cannot be captured. One that waits for the device is told before, where torch notices: a capture
            that fails leaves torch on its stream, and the allocator in the belief that it goes on.
    """
    caller = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(caller)
    with torch.cuda.stream(stream), _as_if_capturing():
        for _ in range(2):
            run()
        with _waiting_is_an_error():
            run()
    caller.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(caller), torch.cuda.graph(graph):  # the outer one takes the caller's stream up again
        for _ in range(calls):
            outputs = run()
    return graph.replay, outputs


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
