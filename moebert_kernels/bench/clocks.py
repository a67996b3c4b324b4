"""Clocks: a CPU's wall clock, and on a GPU CUDA events around replays of a CUDA graph, with a warm and a cold L2.

A call that cannot be captured (it waits for the device) is timed eagerly, and the result says so. The device gets work
before the first event, so that it is never idle while Python launches the replays: events time the device alone. Eager
calls that take Python longer than the device are timed as Python makes them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from moebert_kernels.graphs import captured

FLUSHED_BYTES = 256 * 2**20  # four times the L2 of an H200
DELAYS = 4  # writes of that many bytes take longer than Python needs for a round's launches
CALLS = 5  # timed in one round


class Timer(Protocol):
    """Times one callable.

    Attributes:
        how: "graph" or "eager" on a GPU, None on a CPU.
        not_captured: why there is no graph, or "".
        calls: in a row that one warm time is the mean of.
    """

    how: str | None
    not_captured: str
    calls: int

    def finished(self) -> None:
        """One call, returning when all its work is done."""
        ...

    def replayed(self) -> Any:
        """What a replay of the graph computes; None where there is no graph."""
        ...

    def warm_ms(self) -> list[float]:
        """Milliseconds of each call of a round."""
        ...

    def cold_ms(self) -> list[float]:
        """The same with an emptied L2 before each call; empty where that is not measured."""
        ...


class WallTimer:
    """One call a round by the wall clock; it has finished when it returns."""

    not_captured = ""
    calls = 1

    def __init__(self, run: Callable[[], Any], how: str | None = None) -> None:
        self.finished, self.how = run, how

    def replayed(self) -> None:
        return None

    def warm_ms(self) -> list[float]:
        start = time.perf_counter()
        self.finished()
        return [(time.perf_counter() - start) * 1e3]

    def cold_ms(self) -> list[float]:
        return []


class GpuTimer:
    """Replays of a CUDA graph, or eager calls where `run` cannot be captured; events time both."""

    def __init__(self, run: Callable[[], Any], flushed: torch.Tensor, calls: int = 1) -> None:
        self.how, self.not_captured, self.calls = "eager", "", 1
        self.call = self.row = run
        self.outputs: Any = None
        self.flushed = flushed
        try:
            call, outputs = captured(run)
            row = captured(run, calls)[0] if calls > 1 else call
            self.call, self.outputs, self.row, self.calls, self.how = call, outputs, row, calls, "graph"
        except Exception as error:  # whatever a library raises when it may not wait for the device
            self.not_captured = first_line(error)
            torch.cuda.synchronize()

    def finished(self) -> None:
        self.call()
        torch.cuda.synchronize()

    def replayed(self) -> Any:
        if self.how == "graph":
            self.finished()
        return self.outputs

    def warm_ms(self) -> list[float]:
        for _ in range(DELAYS):
            self.flushed.zero_()
        self.row()
        return [ms / self.calls for ms in self._timed(lambda: None, self.row)]

    def cold_ms(self) -> list[float]:
        return self._timed(self.flushed.zero_, self.call)

    def _timed(self, before: Callable[[], object], call: Callable[[], object]) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
        for start, end in pairs:
            before()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def timer(run: Callable[[], Any], device: torch.device, capture: bool = True, calls: int = 1) -> Timer:
    """The clock of `device` around `run`; without `capture` the wall clock, on a GPU until all work is done.

    Args:
        calls: in a row in one graph, of whose replay a warm time is the share: for calls as short as a launch.
    """
    if device.type == "cpu":
        return WallTimer(run)
    if capture:
        return GpuTimer(run, _flushed(device), calls)

    def finished() -> None:
        run()
        torch.cuda.synchronize()

    return WallTimer(finished, "eager")


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Most memory that one call holds beyond what was there before it, in MiB; None on a CPU.

    It is called once before, since the first call may allocate what stays, such as an optimizer's state.
    """
    if device.type == "cpu":
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


_BUFFERS: dict[torch.device, torch.Tensor] = {}


def _flushed(device: torch.device) -> torch.Tensor:
    """What is overwritten to empty the L2: one buffer per device, for all timers."""
    if device not in _BUFFERS:
        _BUFFERS[device] = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    return _BUFFERS[device]


def quartiles(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        return {"q1": values[0], "median": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}
