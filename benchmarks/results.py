"""From cases to committed results: check, time, judge the requirements, print a table, write JSON case by case.

Format 2, one file per suite: {"format_version", "what", "smoke", "environment", "settings", "roof": {"tflops",
"gbytes_per_s"}, "cases", "not_run": [names], "broken": {name: error}, "seconds"}. A case: {"name", "parameters",
"baseline", "providers": {name: times, or {"refused": reason}, or {"skipped": reason}}, "requirements", "cost",
"seconds"}.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import clocks
from benchmarks.environment import environment, load_average
from benchmarks.gate import Checked, check
from benchmarks.measuring import (
    Case,
    Limit,
    Requirement,
    Samples,
    Target,
    fastest,
    latency,
    measure,
    speed_ratio,
)
from benchmarks.model import Cost
from moebert_kernels.bench.clocks import quartiles
from moebert_kernels.files import write_json

FORMAT_VERSION = 2
WIDE_SPREAD = 0.2  # between the quartiles, of the median
# A ratio of two times is read to two digits: 0.996 is not a loss against 1.0.
DIGITS = 2
# in the environments of runs that go on with each other
SAME = ("commit", "sources", "cpu", "gpu", "threads", "torch", "transformers", "triton", "withheld")
# GPUs that requirements are judged on. Limits are of an H200 that copies at this rate; see `at_most_ms`.
JUDGED_GPUS, GBYTES_PER_S = ("H100", "H200"), 4300.0


def run_case(
    case: Case, target: Target, roof: Mapping[str, float], *, seconds: float, min_rounds: int, judge: bool = True
) -> dict[str, Any]:
    """Build, check, time and judge one case.

    Args:
        case: see `Case`.
        target: what it was made for.
        roof: from `clocks.roof`.
        seconds: of timing; building and checking come on top.
        min_rounds: see `measure`.
        judge: False where the requirements say nothing.

    Returns:
        The case as plain data.
    """
    start = time.perf_counter()
    checked = check(case.build(), case.dtype)
    checked_at = time.perf_counter()
    peaks = {name: clocks.peak_mib(provider.run, target.device) for name, provider in checked.passed.items()}
    timers = {
        name: clocks.timer(provider.run, target.device, provider.capture, case.calls_per_replay)
        for name, provider in checked.passed.items()
    }
    samples = measure(timers, seconds=seconds, min_rounds=min_rounds)
    for name, timer in timers.items():
        if (outputs := timer.replayed()) is not None:
            checked.judge_again(name, outputs)
    samples = {name: of_provider for name, of_provider in samples.items() if name in checked.passed}
    samples |= {name: Samples(rounds=[elapsed_ms]) for name, elapsed_ms in checked.slow_ms.items()}
    rounds = {name: of_provider.rounds for name, of_provider in samples.items()}

    entries: dict[str, Any] = {}
    for name in case.providers:
        if name in checked.refused or name in checked.skipped:
            entries[name] = _without_time(checked, name)
            continue
        entry = _times(samples[name]) | {"error_share_of_bound": round(checked.error_shares[name], 3)}
        if (ratio := speed_ratio(rounds, name, case.baseline)) is not None:
            entry["speed_over_baseline"] = _quartiles(ratio)
        if peaks.get(name) is not None:
            entry["peak_mib"] = round(peaks[name], 1)
        if name in timers and timers[name].how:
            entry["how"] = timers[name].how
        if name in timers and timers[name].not_captured:
            entry["not_captured"] = timers[name].not_captured
        if name in timers and timers[name].calls > 1:
            entry["calls_per_replay"] = timers[name].calls
        if "tokens" in case.parameters:
            entry["tokens_per_s"] = _digits(1e3 * case.parameters["tokens"] / entry["median_ms"])
        if name in checked.passed:
            entry |= checked.passed[name].facts
        cost = (checked.passed[name].cost if name in checked.passed else None) or case.cost
        entries[name] = entry | (_shares(cost, entry["median_ms"], roof) if cost else {})
    result = {
        "name": case.name,
        "parameters": dict(case.parameters),
        "baseline": case.baseline,
        "providers": entries,
        "requirements": [
            judged(scaled(requirement, case.cost, roof) if target.on_gpu else requirement, rounds, entries)
            for requirement in (case.requires if judge else ())
            if not (isinstance(requirement, Requirement) and _all_skipped(requirement.others, checked))
        ],
    }
    if case.cost:
        result["cost"] = _cost(case.cost, roof)
    return result | {
        "seconds": {"check": round(checked_at - start, 1), "time": round(time.perf_counter() - checked_at, 1)}
    }


def scaled(requirement: Requirement | Limit, cost: Cost | None, roof: Mapping[str, float]) -> Requirement | Limit:
    """A limit for the GPU in hand: more time in proportion to a lower bandwidth, if moving the bytes is most of it.

    What is bound by products or by launches, and every ratio, is the same on all `JUDGED_GPUS`.
    """
    if not isinstance(requirement, Limit) or cost is None or roof["gbytes_per_s"] >= GBYTES_PER_S:
        return requirement
    if 2 * cost.memory_ms(GBYTES_PER_S) < requirement.at_most_ms:
        return requirement
    return replace(requirement, at_most_ms=_digits(requirement.at_most_ms * GBYTES_PER_S / roof["gbytes_per_s"]))


def judged(
    requirement: Requirement | Limit, rounds: Mapping[str, list[float]], entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A requirement as plain data, with what was measured, whether it passed, and notes on what was compared."""
    if isinstance(requirement, Limit):
        times = rounds.get(requirement.provider)
        median = _digits(statistics.median(times)) if times else None
        passed = median is not None and median <= requirement.at_most_ms
        return {"provider": requirement.provider, "at_most_ms": requirement.at_most_ms, "median_ms": median,
                "passed": passed}  # fmt: skip
    ratio = speed_ratio(rounds, requirement.provider, requirement.over)
    refused = [f"{name} is refused" for name in requirement.others if "refused" in entries[name]]
    unlike = _timed_differently(requirement, rounds, entries)
    skipped = {name: entries[name]["skipped"] for name in requirement.others if "skipped" in entries[name]}
    notes = [*refused, *unlike, *(f"without {name}: {reason}" for name, reason in skipped.items())]
    fit = ratio is not None and not refused and (requirement.eager or not unlike)
    return {
        "provider": requirement.provider,
        "over": requirement.over if isinstance(requirement.over, str) else "best of " + ", ".join(requirement.over),
        "at_least": requirement.at_least,
        "speed": None if ratio is None else _quartiles(ratio),
        "passed": fit and round(ratio["median"], DIGITS) >= requirement.at_least,
    } | ({"notes": notes} if notes else {})


def _timed_differently(
    requirement: Requirement, rounds: Mapping[str, list[float]], entries: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A note if one is a graph's replay and the other is not: an eager time holds what Python adds."""
    both = requirement.provider, fastest(rounds, requirement.others)
    how = {name: entries[name]["how"] for name in both if name and "how" in entries[name]}
    return ["timed differently: " + ", ".join(f"{k} {v}" for k, v in how.items())] if len({*how.values()}) > 1 else []


def run_suite(
    what: str,
    cases: Sequence[Case],
    target: Target,
    *,
    seconds: float | None = None,
    min_rounds: int | None = None,
    threads: int = 2,
    folder: Path | None = None,
    only: str | None = None,
) -> dict[str, Any]:
    """Run the cases of a file in order, printing each as it is done.

    Args:
        what: the suite's name.
        cases: what it measures on `target`.
        target: see `Target`.
        seconds: of timing for each case; None: as the case says. With smoke shapes: none.
        min_rounds: see `measure`; None: as the case says. With smoke shapes: 1.
        threads: of torch on the CPU.
        folder: `<folder>/<what>.json` is written after each case; those that an earlier, cut
            run of the same commit on the same device left there are kept.
        only: one case's name; the others stand as an earlier run left them, or in "not_run".

    Returns:
        The result, as saved.
    """
    torch.set_num_threads(threads)
    if target.smoke:
        seconds, min_rounds = 0.0, 1
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "what": what, "smoke": target.smoke, "environment": environment(target),
        "settings": {"seconds_per_case": seconds, "min_rounds": min_rounds, "threads": threads},
        "roof": clocks.roof(target.device, target.dtype, target.smoke), "cases": [],
        "not_run": [case.name for case in cases], "broken": {}, "seconds": 0.0,
    }  # fmt: skip
    earlier = _earlier(folder, result, only) if folder else {"cases": {}, "broken": {}}
    gpu = result["environment"].get("gpu", "")
    judge = not target.smoke and (not target.on_gpu or any(name in gpu for name in JUDGED_GPUS))
    start = time.perf_counter()
    for case in cases:
        if case.name in earlier["broken"]:
            result["broken"][case.name] = earlier["broken"][case.name]
            result["not_run"].remove(case.name)
            continue
        if case.name in earlier["cases"]:
            entry = earlier["cases"][case.name]
        elif only not in (None, case.name):
            continue
        else:
            lasting = case.seconds if seconds is None else seconds
            rounds = case.min_rounds if min_rounds is None else min_rounds
            try:
                entry = run_case(case, target, result["roof"], seconds=lasting, min_rounds=rounds, judge=judge)
            except Exception as error:  # such as no memory for the inputs: must not cost the other cases
                result["broken"][case.name] = clocks.first_line(error)
                result["not_run"].remove(case.name)
                print(f"{case.name}: {result['broken'][case.name]}", flush=True)
                if clocks.device_lost():
                    break
                continue
            print(table(entry), flush=True)
            gc.collect()
        result["cases"].append(entry)
        result["not_run"].remove(case.name)
        result["environment"]["load_average_after"] = load_average()
        result["seconds"] = round(time.perf_counter() - start, 1)
        if folder:
            save(result, folder)
    if folder:
        save(result, folder)
    return result


def table(entry: dict[str, Any]) -> str:
    """One case as text for a terminal."""
    width = max(len(name) for name in entry["providers"])
    seconds = entry["seconds"]
    lines = [f"{entry['name']} (checked in {seconds['check']:.1f} s, timed in {seconds['time']:.1f} s)"]
    if cost := entry.get("cost"):
        lines[0] += f"; roof {cost['roof_ms']:.3f} ms, bound by {cost['bound_by']}"
    for name, numbers in entry["providers"].items():
        if "median_ms" not in numbers:
            (kind, reason), *_ = numbers.items()
            lines.append(f"  {name:{width}}  {kind.upper() if kind == 'refused' else kind}: {reason}")
            continue
        line = f"  {name:{width}}  {numbers['median_ms']:10.3f} ms [{numbers['q1_ms']:.3f}, {numbers['q3_ms']:.3f}]"
        line += f" x{numbers['rounds']}"
        if cold := numbers.get("cold"):
            line += f"  cold {cold['median_ms']:.3f} ms"
        if "share_of_roof" in numbers:
            line += f"  {numbers['share_of_roof']:4.0%} of roof"
        if ratio := numbers.get("speed_over_baseline"):
            line += f"   {_ratio_text(ratio)} {entry['baseline']}"
        lines.append(line + ("  (eager)" if numbers.get("how") == "eager" else ""))
    lines += [f"  {requirement_text(requirement)}" for requirement in entry["requirements"]]
    return "\n".join(lines)


def requirement_text(requirement: dict[str, Any]) -> str:
    """One judged requirement as a line."""
    verdict = "pass" if requirement["passed"] else "FAIL"
    if "at_most_ms" in requirement:
        median = requirement["median_ms"]
        got = "not measured" if median is None else f"{median} ms"
        return f"{verdict}: {requirement['provider']} {got}, wanted <= {requirement['at_most_ms']} ms"
    speed = requirement["speed"]
    got = "not measured" if speed is None else _ratio_text(speed)
    text = f"{verdict}: {requirement['provider']} {got} {requirement['over']}, wanted >= {requirement['at_least']}x"
    return "; ".join([text, *requirement.get("notes", [])])


def failures(result: dict[str, Any]) -> list[str]:
    """What a run must not hide: refused providers and missed requirements, one line each."""
    lines = [f"{name}: {reason}" for name, reason in result.get("broken", {}).items()]
    for case in result["cases"]:
        for name, numbers in case["providers"].items():
            if "refused" in numbers:
                lines.append(f"{case['name']}: {name} refused: {numbers['refused']}")
        lines += [f"{case['name']}: {requirement_text(r)}" for r in case["requirements"] if not r["passed"]]
    return lines


def busy_warning(result: dict[str, Any]) -> str:
    """A line if times spread so far that the machine must have had other work, else ""."""
    times = [n for case in result["cases"] for n in case["providers"].values() if n.get("rounds", 0) > 1]
    wide = sum(n["q3_ms"] - n["q1_ms"] > WIDE_SPREAD * n["median_ms"] for n in times)
    if wide * 10 <= len(times):
        return ""
    return f"{result['what']}: {wide} of {len(times)} times spread over more than {WIDE_SPREAD:.0%}: measure again"


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write `<folder>/<what>.json`, whole or not at all."""
    path = folder / f"{result['what']}.json"
    write_json(path, result)
    return path


def load(path: Path) -> dict[str, Any]:
    """A result of this format.

    Raises:
        ValueError: another format.
    """
    result = json.loads(path.read_text())
    if result.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {result.get('format_version')}")
    return result


def _earlier(folder: Path, result: dict[str, Any], only: str | None) -> dict[str, dict[str, Any]]:
    """What an earlier run of the same code on the same device did, without `only`: "cases", "broken", by name."""
    nothing: dict[str, dict[str, Any]] = {"cases": {}, "broken": {}}
    path = folder / f"{result['what']}.json"
    if not path.exists():
        return nothing
    try:
        earlier = load(path)
    except ValueError:
        return nothing
    same = all(earlier["environment"].get(k) == result["environment"].get(k) for k in SAME)
    resumable = same and earlier["smoke"] == result["smoke"] and earlier["settings"] == result["settings"]
    if not resumable or not (earlier["not_run"] or only):
        return nothing
    found = {"cases": {case["name"]: case for case in earlier["cases"]}, "broken": earlier["broken"]}
    return {kind: {name: was for name, was in of_kind.items() if name != only} for kind, of_kind in found.items()}


def _without_time(checked: Checked, name: str) -> dict[str, str]:
    return {"refused": checked.refused[name]} if name in checked.refused else {"skipped": checked.skipped[name]}


def _all_skipped(names: tuple[str, ...], checked: Checked) -> bool:
    return all(name in checked.skipped for name in names)


def _times(samples: Samples) -> dict[str, Any]:
    entry: dict[str, Any] = _median_and_quartiles(samples.rounds) | {"rounds": len(samples.rounds)}
    if samples.cold:
        entry["cold"] = _median_and_quartiles(samples.cold)
    if percentiles := latency(samples.calls):
        entry |= {"p50_ms": _digits(percentiles[0]), "p99_ms": _digits(percentiles[1])}
    return entry


def _median_and_quartiles(values: list[float]) -> dict[str, float]:
    found = quartiles(values)
    return {f"{name}_ms": _digits(found[name]) for name in ("median", "q1", "q3")}


def _cost(cost: Cost, roof: Mapping[str, float]) -> dict[str, Any]:
    peaks = roof["tflops"], roof["gbytes_per_s"]
    return {"flops": cost.flops, "bytes": cost.bytes, "roof_ms": _digits(cost.roof_ms(*peaks)),
            "bound_by": cost.bound_by(*peaks)}  # fmt: skip


def _shares(cost: Cost, median_ms: float, roof: Mapping[str, float]) -> dict[str, float]:
    """Of one call: TFLOP/s, GB/s, and the roof's time as a share of its own."""
    tflops = {"tflops": _digits(cost.flops / median_ms / 1e9)} if cost.flops else {}
    return tflops | {
        "gbytes_per_s": _digits(cost.bytes / median_ms / 1e6),
        "share_of_roof": round(cost.roof_ms(roof["tflops"], roof["gbytes_per_s"]) / median_ms, 3),
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _quartiles(ratio: dict[str, float]) -> dict[str, float]:
    return {name: _digits(value) for name, value in ratio.items()}


def _ratio_text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
