"""Make REPORT.md of a folder of results: tables, pictures, what was lost, what was not measured."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts, suites
from benchmarks.environment import results_folder
from benchmarks.measuring import Target
from benchmarks.results import requirement_text
from benchmarks.views import BOUNDS, Row, is_ours, load_all, ours, rows_of

# in the environments of a report's results
SAME_EVERYWHERE = ("commit", "sources", "device", "cpu", "gpu", "threads", "torch", "transformers", "triton")


INTRODUCTION = (
    "Written by `python -m benchmarks report` from the JSON files beside it; how each number is measured:"
    " [benchmarks/README.md](../../README.md). Times are medians of interleaved rounds with their quartiles; `2.00x` is"
    f" twice the baseline's speed. {', '.join(f'`{name}`' for name in BOUNDS)} do less than the case asks for: they"
    " show what can be reached, and no loss is counted against them."
)
ROOF_NOTE = (
    "The roof is the longer of FLOPs over a large matrix product's rate and bytes over a device copy's, both measured"
    " in the same run; FLOPs and bytes are the floor that `benchmarks/model.py` counts. A share above 100 % means that"
    " operands stayed in a cache."
)


# What a provider's entry may hold besides its time -> how it is shown.
NOTES = {
    "cold": "cold {0[cold][median_ms]:.4g} ms", "how": "{0[how]}", "tokens_per_s": "{0[tokens_per_s]:,.0f} tokens/s",
    "p99_ms": "p99 {0[p99_ms]:.4g} ms", "share_of_roof": "{0[share_of_roof]:.0%} of the roof",
    "peak_mib": "{0[peak_mib]:,.1f} MiB", "saved_mib": "{0[saved_mib]:,.1f} MiB kept for backward",
}  # fmt: skip


class Unfit(Exception):
    """Results that must not be shown, with the reason."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, help="folder (default: benchmarks/results/<this device>)")


def main(options: argparse.Namespace) -> int:
    """Returns 0, or 1 where the results must not be shown."""
    folder = (options.results or results_folder(Target.of())).resolve()
    try:
        results = load_folder(folder)
        text = markdown(results, charts.draw_all(rows_of(results), folder))
        (folder / "REPORT.md").write_text(text, encoding="utf-8")
        print(f"written: {folder / 'REPORT.md'}")
    except Unfit as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


def load_folder(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder in the order of the suites.

    Raises:
        Unfit: none there, another format, smoke shapes, commits or devices mixed, or a refused provider that is ours or
            that ratios are over.
    """
    try:
        found = load_all(folder)
    except ValueError as error:
        raise Unfit(str(error)) from None
    (first_name, first), *_ = found.items()
    for name, result in found.items():
        if result["smoke"]:
            raise Unfit(f"{name}: expected shapes that count, got those of --smoke")
        for key in SAME_EVERYWHERE:
            wanted, got = first["environment"].get(key), result["environment"].get(key)
            if wanted != got:
                raise Unfit(f"{name}: expected the {key} of {first_name}, {wanted}, got {got}; measure all on one")
        for case in result["cases"]:
            _check_gate(name, case)
    order = {what: i for i, what in enumerate(suites.ALL)}
    return sorted(found.values(), key=lambda result: (order.get(result["what"], len(order)), result["what"]))


def _check_gate(name: str, case: Mapping[str, Any]) -> None:
    """A peer that fails is left out by name; ours, or what ratios are over, makes the result worthless."""
    needed = {case["baseline"], *(requirement["provider"] for requirement in case["requirements"])}
    for provider, entry in case["providers"].items():
        if "refused" in entry and (provider in needed or is_ours(case, provider)):
            raise Unfit(f"{name}: {case['name']}: {provider} failed the gate: {entry['refused']}")


def markdown(results: Sequence[Mapping[str, Any]], pictures: Mapping[str, Sequence[str]]) -> str:
    """REPORT.md's text; equal results give equal text."""
    rows = rows_of(results)
    parts = [
        f"# Benchmarks on {device_name(results)}",
        f"{conditions(results)} {INTRODUCTION}",
        *_images(pictures, "overview"),
        "## Required", _required(rows),
        "## Where another way is faster", _losses(rows),
        "## Speed over the number of tokens", *_images(pictures, "speed"),
        "## Other packages", *_images(pictures, "peers"),
        "## Whole models", *_images(pictures, "end-to-end"),
        "## All times", ROOF_NOTE, *_times_tables(results),
        "## Not measured", _not_measured(results),
        "## Environment", _environment(results),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def device_name(results: Sequence[Mapping[str, Any]]) -> str:
    environment = results[0]["environment"]
    if environment["device"] == "cuda":
        return str(environment["gpu"])
    model = re.sub(r"\s*\((R|TM)\)|\bCPU\b", "", environment["cpu"])
    threads = environment["threads"]
    return f"{' '.join(model.split())}, {threads} thread{'s' if threads > 1 else ''}"


def conditions(results: Sequence[Mapping[str, Any]]) -> str:
    environment = results[0]["environment"]
    dates = sorted({result["environment"]["date"] for result in results})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    dtypes = ", ".join(sorted({str(result["environment"]["dtype"]) for result in results}))
    return f"{dtypes}, torch {environment['torch']}, commit {environment['commit']}, {when}."


def _images(pictures: Mapping[str, Sequence[str]], kind: str) -> list[str]:
    return [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})" for name in pictures.get(kind, ())] or (
        [] if kind == "overview" else ["Nothing of this kind was measured."]
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    if not body:
        return ""
    return "\n".join(f"| {line} |" for line in (" | ".join(head), " | ".join("---" for _ in head), *body))


def _required(rows: Sequence[Row]) -> str:
    judged = [(row, requirement) for row in rows for requirement in row.case["requirements"]]
    if not judged:
        return "Nothing is required on this device."
    missed = sum(not requirement["passed"] for _, requirement in judged)
    lines = []
    for row, requirement in judged:
        verdict, _, text = requirement_text(requirement).partition(": ")
        lines.append((row.label, text, "pass" if requirement["passed"] else f"**{verdict}**"))
    return f"{len(lines) - missed} of {len(lines)} hold.\n\n" + _table(("case", "measured and wanted", ""), lines)


def _losses(rows: Sequence[Row]) -> str:
    """Every case and provider that does the same work in less time than ours."""
    lines, compared = [], 0
    for row in rows:
        mine = row.times.get(ours(row.case))
        for name, entry in row.times.items():
            if mine is None or is_ours(row.case, name) or name in BOUNDS:
                continue
            compared += 1
            if entry["median_ms"] < mine["median_ms"]:
                sure = "" if entry["q3_ms"] < mine["q1_ms"] else "within the spread"
                lines.append((row.label, name, time_text(entry), time_text(mine),
                              f"{entry['median_ms'] / mine['median_ms']:.2f}x", sure))  # fmt: skip
    if not lines:
        return f"Nowhere: in none of {compared} comparisons."
    head = ("case", "faster", "its time", "ours", "our speed over its", "")
    return f"In {len(lines)} of {compared} comparisons:\n\n" + _table(head, lines)


def time_text(entry: Mapping[str, Any]) -> str:
    return f"{entry['median_ms']:.4g} ms [{entry['q1_ms']:.4g}, {entry['q3_ms']:.4g}]"


def _times_tables(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table per suite: a row per case and provider."""
    parts = []
    for result in results:
        lines = []
        for row in rows_of([result]):
            for name, entry in row.times.items():
                speed = row.speed(name)
                ratio = f"{speed['median']:.2f}x [{speed['q1']:.2f}, {speed['q3']:.2f}]" if speed else "baseline"
                notes = [text.format(entry) for key, text in NOTES.items() if entry.get(key) is not None]
                notes += ["once"] if entry["rounds"] == 1 else []
                lines.append((row.label, name, time_text(entry), ratio, ", ".join(notes)))
        parts += [f"### {result['what']}", _table(("case", "provider", "time", "speed over baseline", ""), lines)]
    return parts


def _not_measured(results: Sequence[Mapping[str, Any]]) -> str:
    """Providers without a time by reason, with the cases, and cases that no time was left for."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows_of(results):
        for name, entry in row.case["providers"].items():
            for kind in ("skipped", "refused"):
                if kind in entry:
                    reasons.setdefault((name, kind, entry[kind]), []).append(row.label)
    lines = [(name, f"**{kind}**" if kind == "refused" else kind, reason, _some(cases))
             for (name, kind, reason), cases in reasons.items()]  # fmt: skip
    for result in results:
        broken = result["broken"]
        lines += [("all", "**broken**", reason, case) for case, reason in broken.items()]
        late = [case for case in result["not_run"] if case not in broken]
        lines += [("all", "not run", "the suite's time was over", case) for case in late]
    return _table(("provider", "", "reason", "cases"), lines) or "Every provider of every case was measured."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _environment(results: Sequence[Mapping[str, Any]]) -> str:
    shared = results[0]["environment"]
    varying = {"date", "load_average_before", "load_average_after", "dtype"}
    facts = [(key, str(value)) for key, value in shared.items() if key not in varying and value is not None]
    per_suite = [
        (result["what"], result["environment"]["date"], f"{result['roof']['tflops']:.4g}",
         f"{result['roof']['gbytes_per_s']:.4g}", str(result["environment"].get("load_average_before", "")),
         str(result["environment"].get("load_average_after", "")), f"{result['seconds']:.0f}")
        for result in results
    ]  # fmt: skip
    head = ("suite", "date", "roof TFLOP/s", "roof GB/s", "load before", "load after", "seconds")
    return f"{_table(('', ''), facts)}\n\n{_table(head, per_suite)}"
