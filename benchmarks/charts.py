"""The report's pictures: PNG files on a white ground, which reads on light and dark pages, under 60 KB each.

Legends stand beside the axes and numbers behind their bars, so that no label can cover another. A picture is drawn only
from cases that have what it shows. The same results give the same picture.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.views import Row, is_model, ours, series_over_tokens
from moebert_kernels.files import replacing

OURS_COLOUR, LINE_COLOUR = "#c8321e", "#444444"
NAMED_COLOURS = {
    "dense": LINE_COLOUR, "dense_compiled": "#6f7f8f", "ideal": "#b0b0b0", "roof": "#b0b0b0", "original": "#1b6ca8",
    "loop_of_linear": "#d98c21",
}  # fmt: skip
COLOURS = ("#3c8d40", "#7b4ea3", "#0f8b8d", "#a0522d", "#d16ba5", "#6b7d00")
BARS_PER_PICTURE = 48  # more are continued in another picture


def draw_all(rows: Sequence[Row], folder: Path) -> dict[str, list[str]]:
    """Draw what the results have; returns kind -> file names in `folder`."""
    for stem in STEMS:
        for path in folder.glob(f"{stem}*.png"):  # of an earlier report, which may have drawn more
            path.unlink()
    names: dict[str, list[str]] = {}
    for kind, draw in PICTURES.items():
        for stem, figure in draw(rows):
            _save(figure, folder / f"{stem}.png")
            names.setdefault(kind, []).append(f"{stem}.png")
    return names


def overview(rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    """The feed-forward over tokens, and whole models at their baseline's pace: the report's first picture."""
    series = [s for s in series_over_tokens(rows) if s.name == ("fused_moe_ffn", "forward")]
    models = [row for row in rows if row.what == "encoder" and row.speed(ours(row.case))][:4]
    if not series or not models:
        return
    figure, (left, right) = _figure(10.5, 4.2, 2)
    _speed_lines(left, series[0].rows)
    left.set_title("one feed-forward layer")
    _bars(right, models)
    _legend(right, below=True)
    right.set_title("whole encoders")
    yield "overview", figure


def speed_over_tokens(rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    """Speed over the baseline's, one picture per op, one panel per direction."""
    by_op: dict[str, list[Any]] = {}
    for series in series_over_tokens(rows):
        by_op.setdefault(series.name[0], []).append(series)
    for op, panels in by_op.items():
        figure, axes = _figure(5.4 * len(panels), 4.2, len(panels))
        for ax, series in zip(axes, panels, strict=True):
            _speed_lines(ax, series.rows)
            ax.set_title(f"{op}, {series.name[1].replace('_', ' + ')}\n{series.shape}", fontsize=9)
        yield f"speed-{op}", figure


def end_to_end(rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    """Whole models, by suite: speed over the baseline's, with the milliseconds."""
    for what in dict.fromkeys(row.what for row in rows if is_model(row)):
        models = [row for row in rows if row.what == what and is_model(row)]
        yield from _bar_pictures(f"models-{what}", models)


def peers(rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    """Other packages on the nearest layer that each computes; the baseline is ours."""
    chosen = [row for row in rows if row.what == "peers"]
    yield from _bar_pictures("peers", chosen)


PICTURES: dict[str, Callable[[Sequence[Row]], Iterator[tuple[str, Any]]]] = {
    "overview": overview, "speed": speed_over_tokens, "peers": peers, "end-to-end": end_to_end,
}  # fmt: skip
STEMS = ("overview", "speed-", "peers", "models-")


def _speed_lines(ax: Any, rows: Sequence[Row]) -> None:
    baseline = rows[0].case["baseline"]
    names = list(dict.fromkeys(name for row in rows for name in row.times if name != baseline))
    colours = _colours(rows)
    for name in names:
        points = [(row.tokens, row.speed(name)) for row in rows if row.speed(name)]
        if not points:
            continue
        tokens, medians = [t for t, _ in points], [speed["median"] for _, speed in points]
        style = {"color": colours[name], "linewidth": 2.2 if name == ours(rows[0].case) else 1.3}
        if name == "ideal":
            ax.plot(tokens, medians, linestyle="--", label="dense of the same FLOPs", **style)
            continue
        ax.plot(tokens, medians, marker="o", markersize=3, label=name, **style)
        ax.fill_between(tokens, [s["q1"] for _, s in points], [s["q3"] for _, s in points], color=colours[name],
                        alpha=0.15, linewidth=0)  # fmt: skip
    ax.axhline(1, color=LINE_COLOUR, linewidth=1, label=f"baseline: {baseline}")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:.0f}")
    ax.set_xlabel("tokens T")
    ax.set_ylabel("speed over the baseline's")
    ax.set_ylim(bottom=0)
    _legend(ax, below=True)


Bar = tuple[str, float, float, float, str]  # provider, length, left and right end of its mark, text behind it


def _speed_bars(row: Row) -> list[Bar]:
    bars = []
    for name, entry in row.times.items():
        speed = row.speed(name) or {"q1": 1.0, "median": 1.0, "q3": 1.0}
        text = f"{speed['median']:.2f}x  {_ms(entry['median_ms'])}"
        bars.append((name, speed["median"], speed["q1"], speed["q3"], text))
    return bars


def _bar_pictures(stem: str, rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    pictures: list[list[Row]] = []
    space = 0
    for row in rows:
        count = len(row.times)
        if count > space:
            pictures.append([])
            space = BARS_PER_PICTURE
        if count:
            pictures[-1].append(row)
            space -= count
    for number, some in enumerate(pictures, 1):
        height = 1.0 + sum(0.17 * len(row.times) + 0.16 for row in some)
        figure, (ax,) = _figure(9.0, max(2.2, height), 1)
        _bars(ax, some)
        figure.legend(loc="outside lower center", ncols=4, fontsize=7.5, frameon=False)
        yield stem if number == 1 else f"{stem}-{number}", figure


def _bars(ax: Any, rows: Sequence[Row]) -> None:
    """Horizontal bars in groups, the first row on top, the number behind each bar."""
    colours = _colours(rows)
    position, ticks, most, seen = 0.0, [], 0.0, set()
    for row in rows:
        start = position
        for name, length, low, high, text in _speed_bars(row):
            ax.barh(position, length, height=0.85, color=colours[name], label=None if name in seen else name)
            if high > low:
                ax.plot([low, high], [position, position], color="black", linewidth=1)
                ax.plot([high], [position], marker="|", color="black", markersize=5)
            ax.annotate(text, (max(length, high), position), xytext=(4, 0), textcoords="offset points", va="center",
                        fontsize=7)  # fmt: skip
            seen.add(name)
            most = max(most, length, high)
            position += 1
        ticks.append(((start + position - 1) / 2, row.label))
        position += 0.8
    ax.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=8)
    ax.set_ylim(position - 0.8, -1)
    ax.set_xlabel("speed over the baseline's, which has 1")
    ax.set_xlim(0, most * 1.45)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """One colour per provider: some have their own, the others theirs by the order of their names."""
    names = {name for row in rows for name in row.case["providers"]}
    own = NAMED_COLOURS | {ours(row.case): OURS_COLOUR for row in rows}
    others = sorted(names - own.keys())
    return own | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}


def _ms(milliseconds: float) -> str:
    if milliseconds < 1:
        return f"{1e3 * milliseconds:.3g} us"
    digits = max(0, 2 - math.floor(math.log10(milliseconds)))
    return f"{milliseconds:.{digits}f} ms"


def _figure(width: float, height: float, panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)
    for ax in axes[0]:
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure, axes[0]


def _legend(ax: Any, below: bool = False) -> None:
    """Outside the axes; the layout makes room for it."""
    if below:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=7.5, frameon=False)
    else:
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7.5, frameon=False)


def _save(figure: Any, path: Path) -> None:
    """As a PNG of 64 colours, without the date or the software's version."""
    from PIL import Image

    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    with replacing(path) as partial:
        Image.open(raw).convert("RGB").quantize(64).save(partial, format="PNG", optimize=True)
