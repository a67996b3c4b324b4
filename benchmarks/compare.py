"""Flag what became slower between two results beyond their spread."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import requirement_text
from benchmarks.views import is_ours, load_all

LEAST_CHANGE = 0.03
SAME_MACHINE = ("device", "dtype", "cpu", "gpu", "cores", "threads", "cpu_capability", "blas")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, help="a result file, or a folder of them")
    parser.add_argument("after", type=Path, help="the same, to be judged")
    parser.add_argument("--force", action="store_true", help="compare other machines and settings all the same")


def main(options: argparse.Namespace) -> int:
    """Returns 1 on a regression, 2 for what cannot be compared."""
    try:
        before, after = _load(options.before), _load(options.after)
        _check_comparable(before, after, options.force)
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    lines, regressions = compare(before, after)
    print("\n".join(lines))
    return 1 if regressions else 0


def compare(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """What changed, one line each, and the lines of the regressions among them.

    A provider is compared by its speed over the case's baseline, whose rounds it shares, so that a machine that was
    slower as a whole changes nothing. Where we are the baseline, we are compared by our speed over the fastest other
    way; any other baseline, and what has no ratio, by time. A change counts when both medians lie outside the other's
    quartiles and differ by more than LEAST_CHANGE. Regressions are: our providers
    slower, refused where they were timed, or missing; a requirement that held and no longer does. The rest is listed.

    Args:
        before, after: results by suite.
    """
    old, new = _cases(before), _cases(after)
    regressions: list[str] = []
    others: list[str] = []
    unchanged = 0
    for key in [*old, *(key for key in new if key not in old)]:
        name = ": ".join(key)
        if key not in new or key not in old:
            others.append(f"{'missing' if key in old else 'new'}: {name}")
            continue
        was, now = old[key], new[key]
        if was["parameters"] != now["parameters"] or was["baseline"] != now["baseline"]:
            others.append(f"another case of the same name: {name}")
            continue
        for provider in dict.fromkeys([*was["providers"], *now["providers"]]):
            word, text = _judge(was, now, provider)
            worse = word in ("slower", "refused", "missing") and is_ours(was, provider)
            if word:
                (regressions if worse else others).append(f"{word}: {name}: {provider} {text}".rstrip())
            unchanged += not word and "median_ms" in now["providers"][provider]
        regressions += [f"missed: {name}: {text}" for text in _requirements_lost(was, now)]
    lines = [f"REGRESSION: {line}" for line in regressions] + others
    faster = sum(line.startswith("faster") for line in others)
    lines.append(f"{len(regressions)} regressions, {faster} faster, {unchanged} unchanged within the spread")
    return lines, regressions


def _judge(old: Mapping[str, Any], new: Mapping[str, Any], provider: str) -> tuple[str, str]:
    """A word for what happened to a provider of a case, "" for nothing, and the numbers."""
    was, now = old["providers"].get(provider), new["providers"].get(provider)
    if was is None or now is None:
        return ("new" if was is None else "missing"), ""
    if "median_ms" not in was or "median_ms" not in now:
        kind = next((kind for kind in ("refused", "skipped") if kind in now), "timed")
        return ("", "") if kind in was else (kind, str(now.get(kind, "")))
    change, text = _change(old, new, provider)
    if change is None:
        return "", ""
    if 1 in (was["rounds"], now["rounds"]):
        return "timed once", text
    return ("faster" if change > 1 else "slower"), text


def _change(old: Mapping[str, Any], new: Mapping[str, Any], provider: str) -> tuple[float | None, str]:
    """New speed over old if that is more than spread, else None."""
    over = _over(old, new, provider)
    if over is not None:
        a, b = (_speed(case, provider, over) for case in (old, new))
        change = b["median"] / a["median"]
        whose = "the baseline" if over == old["baseline"] else over
        text = f"{a['median']:.3g}x -> {b['median']:.3g}x of {whose}'s speed ({change - 1:+.1%})"
    else:
        entries = (case["providers"][provider] for case in (old, new))
        a, b = ({q: entry[f"{q}_ms"] for q in ("q1", "median", "q3")} for entry in entries)
        change = a["median"] / b["median"]
        text = f"{a['median']:.4g} -> {b['median']:.4g} ms ({change - 1:+.1%} speed)"
    apart = not (a["q1"] <= b["median"] <= a["q3"] or b["q1"] <= a["median"] <= b["q3"])
    return (change if apart and abs(change - 1) > LEAST_CHANGE else None), text


def _over(old: Mapping[str, Any], new: Mapping[str, Any], provider: str) -> str | None:
    """Whose speed the provider's is divided by in both; None: times are compared.

    A baseline's ratio over itself is 1 whatever happens to it.
    """
    ratios = [
        name
        for name, entry in old["providers"].items()
        if "speed_over_baseline" in entry and "speed_over_baseline" in new["providers"].get(name, {})
    ]
    if provider != old["baseline"]:
        return old["baseline"] if provider in ratios else None
    if not is_ours(old, provider):
        return None
    others = [name for name in ratios if not is_ours(old, name) and old["providers"][name]["rounds"] > 1]
    return min(others, key=lambda name: old["providers"][name]["median_ms"], default=None)


def _speed(case: Mapping[str, Any], provider: str, over: str) -> Mapping[str, float]:
    """Quartiles of the provider's speed over another's, one of them being the baseline."""
    if over == case["baseline"]:
        return case["providers"][provider]["speed_over_baseline"]
    inverse = case["providers"][over]["speed_over_baseline"]
    return {"q1": 1 / inverse["q3"], "median": 1 / inverse["median"], "q3": 1 / inverse["q1"]}


def _requirements_lost(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Requirements of both that passed and no longer do."""

    def verdicts(case: Mapping[str, Any]) -> dict[tuple[str, ...], Mapping[str, Any]]:
        fields = ("provider", "over", "at_least", "at_most_ms")
        return {tuple(str(r.get(field, "")) for field in fields): r for r in case["requirements"]}

    before, after = verdicts(was), verdicts(now)
    return [
        requirement_text(after[name])
        for name, requirement in before.items()
        if name in after and requirement["passed"] and not after[name]["passed"]
    ]


def _cases(results: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(what, case["name"]): case for what, result in results.items() for case in result["cases"]}


def _load(path: Path) -> dict[str, dict[str, Any]]:
    """Results by suite of a file or a folder."""
    return {result["what"]: result for result in load_all(path).values()}


def _check_comparable(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]], force: bool
) -> None:
    """
    Raises:
        ValueError: no suite in both, smoke shapes, or, without force, another machine or other settings.
    """
    both = [what for what in before if what in after]
    if not both:
        raise ValueError(f"expected a suite in both, got {', '.join(before)} and {', '.join(after)}")
    for what in both:
        a, b = before[what], after[what]
        if a["smoke"] or b["smoke"]:
            raise ValueError(f"{what}: expected shapes that count, got those of --smoke")
        for key in () if force else SAME_MACHINE:
            was, now = a["environment"].get(key), b["environment"].get(key)
            if was != now:
                raise ValueError(f"{what}: expected the same {key}, got {was} and {now}; --force compares all the same")
        if a["settings"] != b["settings"] and not force:
            settings = f"{a['settings']} and {b['settings']}"
            raise ValueError(f"{what}: expected the same settings, got {settings}; --force compares all the same")
