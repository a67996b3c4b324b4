"""From cases to committed results: run, judge the requirements, print a table, write JSON with the environment."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import moebert_kernels
from benchmarks.measuring import Case, check, measure, speed_ratio, spread

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT_VERSION = 1
WIDE_SPREAD = 0.2  # between the quartiles, of the median
# A ratio of two times is read to two digits: 0.996 is not a loss against 1.0.
DIGITS = 2


def run_case(case: Case, *, seconds: float, min_rounds: int, judge: bool = True) -> dict[str, Any]:
    """Build, check, time and judge one case.

    Args:
        case: see `Case`.
        seconds: of timing; building and checking come on top.
        min_rounds: see `measure`.
        judge: False at shapes for which the requirements say nothing.

    Returns:
        The case as plain data: parameters, providers (times or the reason of refusal), ratios, requirements.
    """
    start = time.perf_counter()
    checked = check(case.build())
    prepared = time.perf_counter()
    samples = measure(checked.runs, seconds=seconds, min_rounds=min_rounds)
    samples |= {name: [elapsed_ms] for name, elapsed_ms in checked.slow_ms.items()}

    entries: dict[str, Any] = {}
    for name in case.providers:
        if name in checked.refused:
            entries[name] = {"refused": checked.refused[name]}
            continue
        q1, median, q3 = spread(samples[name])
        entries[name] = {
            "median_ms": _digits(median),
            "q1_ms": _digits(q1),
            "q3_ms": _digits(q3),
            "rounds": len(samples[name]),
            "error_share_of_bound": round(checked.error_shares[name], 3),
        }
        if (ratio := speed_ratio(samples, name, case.baseline)) is not None:
            entries[name]["speed_over_baseline"] = _quartiles(ratio)
    judged = []
    for requirement in case.requires if judge else ():
        ratio = speed_ratio(samples, requirement.provider, requirement.over)
        judged.append(
            {
                "provider": requirement.provider,
                "over": requirement.over,
                "at_least": requirement.at_least,
                "speed": None if ratio is None else _quartiles(ratio),
                "passed": ratio is not None and round(ratio[1], DIGITS) >= requirement.at_least,
            }
        )
    return {
        "name": case.name,
        "parameters": dict(case.parameters),
        "baseline": case.baseline,
        "providers": entries,
        "requirements": judged,
        "seconds": {"check": round(prepared - start, 1), "time": round(time.perf_counter() - prepared, 1)},
    }


def run_suite(
    what: str, cases: Iterable[Case], *, seconds: float, min_rounds: int, threads: int, smoke: bool
) -> dict[str, Any]:
    """Run all cases of a file, printing each as it is done, and return the result to save."""
    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "what": what, "smoke": smoke, "environment": environment(),
        "settings": {"seconds_per_case": seconds, "min_rounds": min_rounds, "threads": threads}, "cases": [],
    }  # fmt: skip
    start = time.perf_counter()
    for case in cases:
        entry = run_case(case, seconds=seconds, min_rounds=min_rounds, judge=not smoke)
        print(table(entry), flush=True)
        result["cases"].append(entry)
        gc.collect()
    result["environment"]["load_average_after"] = _load_average()
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def table(entry: dict[str, Any]) -> str:
    """One case as text for a terminal."""
    width = max(len(name) for name in entry["providers"])
    seconds = entry["seconds"]
    lines = [f"{entry['name']} (checked in {seconds['check']:.1f} s, timed in {seconds['time']:.1f} s)"]
    for name, numbers in entry["providers"].items():
        if "refused" in numbers:
            lines.append(f"  {name:{width}}  REFUSED: {numbers['refused']}")
            continue
        times = f"{numbers['median_ms']:10.3f} ms [{numbers['q1_ms']:.3f}, {numbers['q3_ms']:.3f}] x{numbers['rounds']}"
        ratio = numbers.get("speed_over_baseline")
        lines.append(f"  {name:{width}}  {times}" + (f"   {_ratio_text(ratio)} {entry['baseline']}" if ratio else ""))
    lines += [f"  {requirement_text(requirement)}" for requirement in entry["requirements"]]
    return "\n".join(lines)


def requirement_text(requirement: dict[str, Any]) -> str:
    """One judged requirement as a line."""
    speed = requirement["speed"]
    got = "not measured" if speed is None else _ratio_text(speed)
    verdict = "pass" if requirement["passed"] else "FAIL"
    return f"{verdict}: {requirement['provider']} {got} {requirement['over']}, wanted >= {requirement['at_least']}x"


def failures(result: dict[str, Any]) -> list[str]:
    """What a run must not hide: refused providers and missed requirements, one line each."""
    lines = []
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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['what']}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
    return path


def device_slug(model: str | None = None) -> str:
    """A device's model (None: the CPU's) as a folder name, e.g. "intel-xeon-processor-2.50ghz" or "nvidia-h200"."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|@", " ", (model or cpu_model()).lower())
    return re.sub(r"[^a-z0-9.]+", "-", words).strip("-")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a reader must know before he compares: versions, the machine, how busy it was."""
    packages = ("torch", "transformers", "numpy")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "moebert_kernels": moebert_kernels.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu_model(),
        **(
            {"gpu": torch.cuda.get_device_name(), "triton": importlib.metadata.version("triton")}
            if torch.cuda.is_available()
            else {}
        ),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": _load_average(),
    }


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":(exclude)results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _load_average() -> float | None:
    """Of the last minute; 1.0 is one busy core."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _quartiles(ratio: tuple[float, float, float]) -> dict[str, float]:
    q1, median, q3 = ratio
    return {"q1": _digits(q1), "median": _digits(median), "q3": _digits(q3)}


def _ratio_text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
