"""The tables and charts of chosen_routing.py's results: table.md and chart-NAME.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from chosen_routing import ARMS, HALF, HERE, KINDS


def main() -> None:
    """Write table.md and chart.png of all results that there are."""
    parts = []
    for file in sorted(HERE.glob("errors-*.json")):
        found, name = json.loads(file.read_text()), file.stem.removeprefix("errors-")
        parts += [error_tables(name, found)]
        draw(name, found)
    for file in sorted(HERE.glob("distil-*.json")):
        parts += [distil_table(file.stem.removeprefix("distil-"), json.loads(file.read_text()))]
    for file in sorted(HERE.glob("speed-*.json")):
        parts += [speed_table(file.stem.removeprefix("speed-"), json.loads(file.read_text()))]
    (HERE / "table.md").write_text("\n\n".join(parts) + "\n")


def error_tables(name: str, found: dict[str, Any]) -> str:
    kind = next(kind for kind in KINDS if kind in found)
    of_kind = found[kind]
    rows = [
        f"### {name}: error of each layer, chosen by and judged on {kind}{of_kind.get('note', '')}",
        "| layer | dense of the same FLOPs | MoEBERT's split, random table | **chosen** | best expert for each token | "
        "chosen below dense | fullest expert | common neurons |",
        "|---|---|---|---|---|---|---|---|",
    ]
    layers = of_kind["choice"]
    mean = {key: statistics.mean(row[key] for row in layers) for key in layers[0] if key not in ("name", "shares")}
    for label, row in [*((number(row), row) for row in layers), ("mean", mean)]:
        rows.append(
            f"| {label} | {row['dense']:.4f} | {row['random']:.4f} | **{row['chosen']:.4f}** | {row['best']:.4f} | "
            f"{100 - 100 * row['chosen'] / row['dense']:.0f} % | {row['load']:.2f} | {row['common']:.0f} |"
        )
    rows += ["", f"### {name}: means over the layers, by the text that chose and the text that judged"]
    rows += [
        "| chose | judged | dense | chosen | below dense | fullest expert, mean, worst layer "
        "| emptiest expert, mean, worst layer | unseen tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one, of_one in found.items():
        for other, reports in of_one["judged"].items():
            dense, chosen, load = (statistics.mean(row[key] for row in reports) for key in ("dense", "chosen", "load"))
            least = [min(row["shares"]) * len(row["shares"]) for row in reports if row.get("shares")]
            emptiest = f"{statistics.mean(least):.2f}, {min(least):.2f}" if least else "-"
            rows.append(
                f"| {one}{of_one.get('note', '')} | {other} | {dense:.4f} | {chosen:.4f} | "
                f"{100 - 100 * chosen / dense:.0f} % | {load:.2f}, {max(row['load'] for row in reports):.2f} | "
                f"{emptiest} | {100 * reports[0]['unseen']:.0f} % |"
            )
    return "\n".join(rows)


def number(row: dict[str, Any]) -> int:
    """Of a layer, from 1."""
    return 1 + int(next(part for part in row["name"].split(".") if part.isdigit()))


def distil_table(name: str, found: dict[str, Any]) -> str:
    """Means over the seeds that are done, and differences to the dense model of the same FLOPs, paired."""
    seeds = [of_seed for seed, of_seed in found.items() if seed != "teacher" and all(arm in of_seed for arm in ARMS)]
    tasks = list(found["teacher"])
    teacher = ", ".join(f"{task} {value:.1f}" for task, value in found["teacher"].items())
    if not seeds:
        return f"### {name}: distilled without labels: no seed is done"
    with_text = sum("loss" in seed["dense"]["after"] for seed in seeds)
    rows = [
        f"### {name}: {seeds[0]['dense']['steps']} steps without labels, {len(seeds)} seeds; teacher {teacher}",
        f"| student | {', '.join(tasks)} before | loss, last sixth of the steps | minus dense's | loss, held-out text "
        f"({with_text} seeds) "
        f"| minus dense's | {', '.join(tasks)} after | minus dense's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in (*ARMS, HALF):
        here = [seed for seed in seeds if arm in seed]
        if not here:
            continue
        judged = [seed for seed in here if "loss" in seed[arm]["after"] and "loss" in seed["dense"]["after"]]
        before, after = (
            ", ".join(f"{statistics.mean(seed[arm][when][task] for seed in here):.1f}" for task in tasks)
            for when in ("before", "after")
        )
        cells = []
        for of, some in ((lambda result: result["losses"][-1], here), (lambda result: result["after"]["loss"], judged)):
            cells += [f"{statistics.mean(of(seed[arm]) for seed in some):.4f}" if some else "-"]
            cells += [spread([of(seed[arm]) - of(seed["dense"]) for seed in some], 4) if some else "-"]
        gains = [spread([s[arm]["after"][task] - s["dense"]["after"][task] for s in here], 2) for task in tasks]
        label = arm if len(here) == len(seeds) else f"{arm} ({len(here)} of the seeds)"
        rows.append(f"| {label} | {before} | {' | '.join(cells)} | {after} | {', '.join(gains)} |")
    return "\n".join(rows)


def speed_table(name: str, found: dict[str, Any]) -> str:
    some = next(iter(found.values()))
    rows = [
        f"### {name}: CPU time at B = 8, T = 128; chosen by {some['tokens']:,} tokens of news; median (quartiles) "
        f"of {some['rounds']} rounds in turns",
        "| text | chosen / random tables | chosen / dense of the same FLOPs | teacher / chosen | "
        "fullest expert: chosen, random |",
        "|---|---|---|---|---|",
    ]
    for kind, of_kind in found.items():
        shown = [f"{median:.3f} ({q1:.3f}, {q3:.3f})" for q1, median, q3 in of_kind["ratios"].values()]
        loads = ", ".join(f"{of_kind['fullest expert'][arm]:.2f}" for arm in ("chosen", "random"))
        rows.append(f"| {kind} | {' | '.join(shown)} | {loads} |")
    return "\n".join(rows)


def spread(values: Sequence[float], digits: int) -> str:
    shown = f"{statistics.mean(values):+.{digits}f}"
    return shown if len(values) < 2 else f"{shown} +- {statistics.stdev(values):.{digits}f}"


def draw(name: str, found: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    kind = next(kind for kind in KINDS if kind in found)
    of_kind = found[kind]
    layers = of_kind["choice"]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for key, label in (("random", "MoEBERT's split, random table"), ("dense", "dense of the same FLOPs, corrected"),
                       ("chosen", "chosen"), ("best", "best expert for each token")):  # fmt: skip
        axes.plot([number(row) for row in layers], [row[key] for row in layers], "o-", label=label)
    axes.set(xlabel="layer", ylabel="error behind the feed-forward", title=f"{name}, {kind}", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(HERE / f"chart-{name}.png", dpi=110)


if __name__ == "__main__":
    main()
