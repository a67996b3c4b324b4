"""How everything here is measured: checked first, then timed in turn with what it is compared with.

A provider computes something; a case is providers that belong side by side. Before anything is timed, every provider's
outputs are held against a float64 reference by the bound that the tests use, and one that fails is refused. Rounds are
interleaved, so that a slow minute of the machine hits all providers alike, and ratios are taken round by round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.accuracy import error_and_bound

Outputs = tuple[Tensor, ...]
MAX_ROUNDS = 200


@dataclass(frozen=True)
class Provider:
    """One way to compute something.

    Attributes:
        run: computes it; returns all that is checked.
        reference: the same outputs from a plain computation in the given dtype.
        arrange: brings the outputs into the reference's form; not timed.
        slow: takes minutes; timed once, on the call that is checked.
    """

    run: Callable[[], Outputs]
    reference: Callable[[torch.dtype], Outputs]
    arrange: Callable[[Outputs], Outputs] | None = None
    slow: bool = False


@dataclass(frozen=True)
class Requirement:
    """`provider` must be at least `at_least` times as fast as `over`."""

    provider: str
    over: str
    at_least: float


@dataclass(frozen=True)
class Case:
    """Providers measured side by side.

    Attributes:
        name: readable and unique in its file.
        parameters: shapes and whatever else a reader of the result needs.
        providers: names, in the order of the table; known before anything is built.
        build: makes the providers; big tensors are allocated here and not before.
        baseline: the provider that the table's ratios are over.
        requires: what must hold at these shapes.
    """

    name: str
    parameters: Mapping[str, Any]
    providers: tuple[str, ...]
    build: Callable[[], dict[str, Provider]]
    baseline: str
    requires: tuple[Requirement, ...] = ()


@dataclass
class Checked:
    """What passed the gate and what did not.

    Attributes:
        runs: name -> callable of the providers that may be timed.
        error_shares: name -> worst error as a share of what is allowed.
        refused: name -> reason.
        slow_ms: name -> the one time of a slow provider.
    """

    runs: dict[str, Callable[[], Outputs]] = field(default_factory=dict)
    error_shares: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    slow_ms: dict[str, float] = field(default_factory=dict)


class Refused(Exception):
    """A provider's outputs are not what its reference says."""


def check(providers: Mapping[str, Provider]) -> Checked:
    """Run every provider once and hold its outputs against its reference; see `Checked`."""
    checked = Checked()
    references: dict[tuple[Any, torch.dtype], Outputs] = {}  # several providers share one
    for name, provider in providers.items():
        try:
            with poisoned_memory():
                start = time.perf_counter()
                got = provider.run()
                elapsed_ms = (time.perf_counter() - start) * 1e3
            if provider.arrange is not None:
                got = provider.arrange(got)
            for dtype in (got[0].dtype, torch.float64):
                if (provider.reference, dtype) not in references:
                    references[provider.reference, dtype] = provider.reference(dtype)
            same_dtype = references[provider.reference, got[0].dtype]
            checked.error_shares[name] = worst_error_share(
                got, same_dtype, references[provider.reference, torch.float64]
            )
        except Exception as error:  # a provider that cannot run is a result, and must not stop the others
            first_line = (str(error).splitlines() or [""])[0]
            checked.refused[name] = (
                first_line if isinstance(error, Refused) else f"{type(error).__name__}: {first_line}"
            )
            continue
        if provider.slow:
            checked.slow_ms[name] = elapsed_ms
        else:
            checked.runs[name] = provider.run
    return checked


def worst_error_share(got: Outputs, same_dtype: Outputs, exact: Outputs) -> float:
    """Largest error as a share of what `error_and_bound` allows.

    Raises:
        Refused: another number of outputs, another shape, a value that is not finite, or an error past the bound.
    """
    if len(got) != len(exact):
        raise Refused(f"outputs: expected {len(exact)}, got {len(got)}")
    worst = 0.0
    for i, (g, s, e) in enumerate(zip(got, same_dtype, exact, strict=True)):
        if g.shape != e.shape:
            raise Refused(f"output {i}: expected shape {tuple(e.shape)}, got {tuple(g.shape)}")
        not_finite = int((~torch.isfinite(g.detach())).sum())
        if not_finite:
            raise Refused(f"output {i}: {not_finite} of {g.numel()} values are not finite or never written")
        if g.numel() == 0:
            continue
        error, bound = error_and_bound(g, s, e)
        largest = float(error.max())
        if largest > bound:
            raise Refused(f"output {i}: expected an error of at most {bound:.1e}, got {largest:.1e}")
        worst = max(worst, largest / bound if bound else 0.0)
    return worst


_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """NaN in all memory from torch's Python allocators: a row left unwritten shows, whatever lay there before."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.detach().fill_(float("nan"))
            return tensor

        return wrapper

    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    try:
        for owner, name, allocate in originals:
            setattr(owner, name, poisoned(allocate))
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)


def measure(
    runs: Mapping[str, Callable[[], Any]], *, seconds: float, min_rounds: int = 7, warmup_rounds: int = 2
) -> dict[str, list[float]]:
    """Time every callable once a round, in an order that changes from round to round.

    Args:
        runs: name -> callable on the CPU; it has finished when it returns.
        seconds: rounds are added until this much time has passed, at most MAX_ROUNDS.
        min_rounds: rounds made even past that time.
        warmup_rounds: rounds that are thrown away, within the same time.

    Returns:
        name -> milliseconds of each round; entry i of every list is of the same round.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    if not runs:
        return samples
    order = list(runs)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for done in range(-warmup_rounds, MAX_ROUNDS):
        if done >= min_rounds and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            elapsed_ms = (time.perf_counter() - start) * 1e3
            if done >= 0:
                samples[name].append(elapsed_ms)
    return samples


def spread(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def speed_ratio(samples: Mapping[str, list[float]], provider: str, over: str) -> tuple[float, float, float] | None:
    """How many times as fast as `over` the provider is: quartiles over rounds. None if one of them has no time.

    Rounds are paired; a provider that was timed once is compared with every round of the other.
    """
    ours, theirs = samples.get(provider), samples.get(over)
    if not ours or not theirs:
        return None
    rounds = max(len(ours), len(theirs))
    ours, theirs = (times * rounds if len(times) == 1 else times for times in (ours, theirs))
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])
