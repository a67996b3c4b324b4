"""Ways to compute the same on a CPU, in turns in one process, with what each one's speed must be.

Before anything is timed, each way's outputs are compared with the float32 model that it was made of. A way that is too
far from it is left out, and the result says so. Ratios are medians over rounds, of the two times in the same round,
with their quartiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import environment, load_average, results_folder
from benchmarks.measuring import Target
from moebert_kernels.bench.clocks import WallTimer, quartiles
from moebert_kernels.bench.timing import interleaved
from moebert_kernels.files import write_json

# relative distance of the outputs from those of the float32 model, whose weights are random, by what a name contains
ALLOWED = {"float32": 1e-4, "int8": 0.15, "bfloat16": 0.05}


Run = Callable[..., Tensor]


class Way(NamedTuple):
    """One way.

    Attributes:
        source: the name of the way that it has to agree with.
        run: what is timed, of the inputs of a case.
    """

    source: str
    run: Run


def check(
    ways: Mapping[str, Way], inputs: tuple[Tensor, ...], counted: Tensor | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """The relative distance of each way from its source, and of those that are too far away, which are not timed, why.

    Args:
        counted: which rows of the outputs; None: all.
    """
    distances, left_out = {}, {}
    for name, (source, run) in ways.items():
        want, got = (r(*inputs).float() for r in (ways[source].run, run))
        if counted is not None:
            want, got = want[counted], got[counted]
        distances[name] = float((got - want).norm() / want.norm())
        allowed = next(bound for dtype, bound in ALLOWED.items() if dtype in name)
        if not distances[name] <= allowed:
            left_out[name] = f"expected a distance of at most {allowed} from {source}, got {distances[name]:.3g}"
    return distances, left_out


def ratio(times: Mapping[str, list[float]], ours: str, over: str) -> list[float]:
    """Quartiles of how many times as fast `ours` is."""
    return list(quartiles([b / a for a, b in zip(times[ours], times[over], strict=True)]).values())


def measured(
    title: Mapping[str, int], ways: Mapping[str, Way], inputs: Sequence[tuple[Tensor, ...]], rounds: int, baseline: str,
    required: Sequence[tuple[str, str, float | None]],
) -> dict[str, Any]:  # fmt: skip
    """One case, printed: milliseconds of each way, ratios over `baseline`, and what held of `required`.

    Rounds take the inputs in turn. A requirement is `ours`, `over`, and how many times as fast.
    """
    with torch.inference_mode():
        timers = {name: WallTimer(partial(_next, way.run, cycle(inputs))) for name, way in ways.items()}
        times = interleaved({name: timer.warm_ms for name, timer in timers.items()}, rounds)
    case: dict[str, Any] = {**title, "rounds": rounds, "load_average": load_average(), "ms": {}, "over": {}}
    print(f"\n{' '.join(f'{k}={v}' for k, v in title.items())}, {rounds} rounds, load {case['load_average']}")
    for name in ways:
        case["ms"][name] = list(quartiles(times[name]).values())
        q1, median, q3 = case["over"][name] = ratio(times, name, baseline)
        print(f"  {name:24} {case['ms'][name][1]:9.2f} ms   {median:5.2f} [{q1:.2f}, {q3:.2f}] of {baseline}")
    for ours, over, least in required:
        if least is not None and ours in ways and over in ways:
            q1, median, q3 = ratio(times, ours, over)
            case.setdefault("required", []).append([ours, over, least, [q1, median, q3]])
            word = "held  " if median >= least else "MISSED"
            print(f"  {word} {ours} over {over}: {median:.2f} [{q1:.2f}, {q3:.2f}], at least {least}")
    return case


def _next(run: Run, inputs: Iterator[tuple[Tensor, ...]]) -> Tensor:
    return run(*next(inputs))


def finished(result: dict[str, Any], name: str | None, required: Sequence[tuple[str, str, Any]]) -> int:
    """Print what was missed and left out, write the result as serving/`name`.json (None: nowhere); the exit status.

    A way of ours in `required` that was left out is missed.
    """
    target = Target.of("cpu")
    result["environment"] = environment(target) | {"load_average_after": load_average()}
    missed = [
        f"{ours} over {over} at {' '.join(f'{k}={v}' for k, v in case.items() if isinstance(v, int) and k != 'rounds')}"
        for case in result["cases"]
        for ours, over, least, (_, median, _) in case.get("required", ())
        if median < least
    ]
    left_out = result["left_out"]
    ours_out = [way for way in dict.fromkeys(ours for ours, *_ in required) if way in left_out]
    missed += [f"{way}, which is left out" for way in ours_out]
    print(f"\n{len(missed)} requirements missed", *missed, sep="\n  ")
    print(f"{len(left_out)} ways left out", *(f"{way}: {why}" for way, why in left_out.items()), sep="\n  ")
    if name is not None:
        file = results_folder(target) / "serving" / f"{name}.json"
        write_json(file, result)
        print(f"written to {file}")
    return 1 if missed else 0
