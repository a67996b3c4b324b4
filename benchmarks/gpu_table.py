"""The numbers that matter, from what `make gpu` has so far, beside what a model predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu_plan import PREDICTED_BY, PREDICTED_US

CUDA, OURS, COLUMNS = "moebert_kernels_cuda", "moebert_kernels", (8, 9, 9, 9, 9, 9, 7, 7)
SUITES = ("ffn", "ffn_backward", "ffn_add_norm", "tiny")


def table(folder: Path) -> list[str]:
    """Lines of text: microseconds of ours by Triton and in CUDA, predicted (Triton), dense and ideal ones."""
    results = [json.loads(path.read_text()) for what in SUITES if (path := folder / f"{what}.json").exists()]
    cases: dict[str, dict[str, Any]] = {case["name"]: case for result in results for case in result["cases"]}
    if not cases:
        return ["nothing of the headline is measured yet"]
    roof = results[0]["roof"]
    head = ("T", "Triton", "predicted", "CUDA", "dense", "ideal", "x dense", "of roof")
    lines = [f"roof: {roof['tflops']:.0f} TFLOP/s, {roof['gbytes_per_s']:.0f} GB/s; predicted: {PREDICTED_BY}"]
    for (op, direction), predicted in PREDICTED_US.items():
        lines += [f"{op}, {direction}, us", _line(head)]
        for T in sorted({*predicted, 128, 256, 1024, 4096, 16384, 65536}):
            providers = cases.get(name := f"{op}-{direction}-T{T}", {}).get("providers", {})
            beside = cases.get(f"{name}-cuda", {}).get("providers", {})
            ours, speed = providers.get(OURS, {}), providers.get(OURS, {}).get("speed_over_baseline", {}).get("median")
            lines.append(_line((
                T, _us(ours), predicted.get(T, ""), _us(providers.get(CUDA) or beside.get(CUDA, {})),
                _us(providers.get("dense", {})), _us(providers.get("ideal", {})), f"{speed:.2f}" if speed else "",
                f"{ours['share_of_roof']:.0%}" if "share_of_roof" in ours else "",
            )))  # fmt: skip
    return lines


def _us(entry: dict[str, Any]) -> str:
    return f"{1e3 * entry['median_ms']:.4g}" if "median_ms" in entry else "-"


def _line(cells: tuple[object, ...]) -> str:
    return " ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, COLUMNS, strict=True))
