"""How everything here is measured: checked first, then timed in turn with what it is compared with.

A provider computes something; a case is providers that belong side by side, on one device in one dtype. Before anything
is timed, every provider passes the gate (benchmarks/gate.py) or is refused. Rounds are interleaved, so that a slow
minute of the machine hits all providers alike, and ratios are taken round by round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.clocks import Timer
from benchmarks.model import ROUTING, Cost
from moebert_kernels.bench.clocks import quartiles

Outputs = tuple[Tensor, ...]
MAX_ROUNDS = 200
SHORT_TOKENS, CALLS_PER_REPLAY = 256, 20
ENOUGH_FOR_P99 = 100  # calls; with fewer, the 99th percentile is the maximum by another name


@dataclass(frozen=True)
class Target:
    """What a suite is made for.

    Attributes:
        device: where all tensors live.
        dtype: of inputs and weights.
        smoke: tiny shapes, which try the code and prove nothing.
    """

    device: torch.device
    dtype: torch.dtype
    smoke: bool = False

    @classmethod
    def of(cls, device: str | None = None, smoke: bool = False) -> Target:
        """float32 on a CPU, bfloat16 on a GPU; None: the GPU if there is one."""
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(chosen, torch.float32 if chosen.type == "cpu" else torch.bfloat16, smoke)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Provider:
    """One way to compute something.

    Attributes:
        run: computes it; returns all that is checked.
        reference: the same outputs from a plain computation in the given dtype.
        arrange: brings the outputs into the reference's form; not timed.
        slow: takes minutes; timed once, on the call that is checked.
        capture: False: timed eagerly by the wall clock on a GPU, as a caller sees it who waits.
        cost: of one call, where it is not the case's, as of a dense layer beside experts.
        checked: computes what the gate looks at where `run` cannot: it draws at random (dropout), or updates weights.
        facts: of the provider, neither times nor costs, e.g. {"saved_mib": 12.5}; they go into the result.
    """

    run: Callable[[], Outputs]
    reference: Callable[[torch.dtype], Outputs]
    arrange: Callable[[Outputs], Outputs] | None = None
    slow: bool = False
    capture: bool = True
    cost: Cost | None = None
    checked: Callable[[], Outputs] | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """Stands in a case for a provider that cannot run here, with the reason: not installed, needs sm_90, ..."""

    reason: str


@dataclass(frozen=True)
class Requirement:
    """`provider` must be at least `at_least` times as fast as `over`, or as the fastest of several.

    Attributes:
        over: those that are skipped do not count; one that is refused fails the requirement.
        at_least: see above.
        eager: `over` cannot be captured, and is compared all the same with replays of a graph.
    """

    provider: str
    over: str | tuple[str, ...]
    at_least: float
    eager: bool = False

    @property
    def others(self) -> tuple[str, ...]:
        return (self.over,) if isinstance(self.over, str) else self.over


@dataclass(frozen=True)
class Limit:
    """`provider` must take at most `at_most_ms` (median, warm)."""

    provider: str
    at_most_ms: float


@dataclass(frozen=True)
class Case:
    """Providers measured side by side.

    Attributes:
        name: readable and unique in its file.
        parameters: shapes and whatever else a reader of the result needs: "op" or "model", "direction", "T", ... With
            "tokens", of one call, the result says tokens per second.
        providers: names, in the order of the table; known before anything is built.
        build: makes the providers, or says why one cannot run; big tensors are allocated here and not before.
        baseline: the provider that the table's ratios are over.
        requires: what must hold at these shapes on the device that they are for.
        cost: of one call of a provider that names no other.
        seconds: of timing.
        min_rounds: made even past that time.
    """

    name: str
    parameters: Mapping[str, Any]
    providers: tuple[str, ...]
    build: Callable[[], Mapping[str, Provider | Skipped]]
    baseline: str
    requires: tuple[Requirement | Limit, ...] = ()
    cost: Cost | None = None
    seconds: float = 1.0
    min_rounds: int = 7

    @property
    def calls_per_replay(self) -> int:
        """Of an op that takes microseconds, a graph holds this many calls: a launch and two events cost as much."""
        op, few = self.parameters.get("op"), self.parameters.get("T", SHORT_TOKENS + 1) <= SHORT_TOKENS
        return CALLS_PER_REPLAY if op in ROUTING or (op and few) else 1

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the parameters, if they name one."""
        return getattr(torch, str(self.parameters["dtype"])) if "dtype" in self.parameters else None


@dataclass
class Samples:
    """Times of one provider in milliseconds.

    Attributes:
        rounds: one time per round; entry i is of the same round for all providers of a case.
        cold: the same with an emptied L2 before each call; empty where that is not measured.
        calls: every single call; empty where only several in a row are timed.
    """

    rounds: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)


def measure(
    timers: Mapping[str, Timer], *, seconds: float, min_rounds: int = 7, warmup_rounds: int = 2
) -> dict[str, Samples]:
    """Time every provider once a round, in an order that changes from round to round.

    Args:
        timers: by provider, from `benchmarks.clocks`.
        seconds: rounds are added until this much time has passed, at most MAX_ROUNDS.
        min_rounds: rounds made even past that time.
        warmup_rounds: rounds that are thrown away, within the same time; one is enough if it takes all of it.
    """
    samples = {name: Samples() for name in timers}
    if not timers:
        return samples
    order = list(timers)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for done in range(-warmup_rounds, MAX_ROUNDS):
        late = time.perf_counter() > end
        if late and done >= min_rounds:
            break
        if late and -warmup_rounds < done < 0:
            continue
        shuffle(order)
        for name in order:
            warm_ms, cold_ms = timers[name].warm_ms(), timers[name].cold_ms()
            if done >= 0:
                samples[name].rounds.append(statistics.median(warm_ms))
                samples[name].calls += warm_ms if timers[name].calls == 1 else []
                samples[name].cold += [statistics.median(cold_ms)] if cold_ms else []
    return samples


def latency(calls: list[float]) -> tuple[float, float] | None:
    """50th and 99th percentile of single calls; None of fewer than ENOUGH_FOR_P99."""
    if len(calls) < ENOUGH_FOR_P99:
        return None
    percentiles = statistics.quantiles(calls, n=100, method="inclusive")
    return percentiles[49], percentiles[98]


def fastest(rounds: Mapping[str, list[float]], names: tuple[str, ...]) -> str | None:
    """The one with the lowest median; None if none has a time."""
    timed = [name for name in names if rounds.get(name)]
    return min(timed, key=lambda name: statistics.median(rounds[name]), default=None)


def speed_ratio(
    rounds: Mapping[str, list[float]], provider: str, over: str | tuple[str, ...]
) -> dict[str, float] | None:
    """How many times as fast as `over` the provider is: quartiles over rounds. None if one of them has no time.

    Rounds are paired; a provider that was timed once is compared with every round of the other. Over several: over the
    one with the lowest median.
    """
    ours, other = rounds.get(provider), fastest(rounds, (over,) if isinstance(over, str) else over)
    if not ours or other is None:
        return None
    theirs = rounds[other]
    most = max(len(ours), len(theirs))
    ours, theirs = (times * most if len(times) == 1 else times for times in (ours, theirs))
    return quartiles([b / a for a, b in zip(ours, theirs, strict=True)])
