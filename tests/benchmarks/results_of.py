"""Made-up results in the format of `python -m benchmarks run`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from benchmarks.results import FORMAT_VERSION

ENVIRONMENT = {
    "date": "2026-11-21", "device": "cpu", "dtype": "float32", "moebert_kernels": "0.1", "commit": "0123456789ab",
    "torch": "2.13.0+cpu", "cpu": "Intel(R) Xeon(R) Processor @ 2.50GHz", "cores": 2, "threads": 2,
    "load_average_before": 0.1, "load_average_after": 1.2,
}  # fmt: skip
ROOF = {"tflops": 0.2, "gbytes_per_s": 10.0}


def entry(median_ms: float, speed: float | None = None, spread: float = 0.02, **more: Any) -> dict[str, Any]:
    """A timed provider: quartiles lie `spread` of the median away from it."""

    def quartiles(median: float, suffix: str = "") -> dict[str, float]:
        return {f"q1{suffix}": median * (1 - spread), f"median{suffix}": median, f"q3{suffix}": median * (1 + spread)}

    of_speed = {} if speed is None else {"speed_over_baseline": quartiles(speed)}
    return quartiles(median_ms, "_ms") | {"rounds": 15, "error_share_of_bound": 0.1} | of_speed | more


def case(name: str, providers: dict[str, Any], baseline: str = "dense", **more: Any) -> dict[str, Any]:
    parameters = more.pop("parameters", {"model": "bert-base", "dtype": "float32", "B": 1, "T": 128})
    return {
        "name": name, "parameters": parameters, "baseline": baseline, "providers": providers,
        "requirements": more.pop("requirements", []), **more, "seconds": {"check": 0.1, "time": 0.1},
    }  # fmt: skip


def result(what: str, cases: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION, "what": what, "smoke": False, "environment": ENVIRONMENT,
        "settings": {"seconds_per_case": None, "min_rounds": 7, "threads": 2}, "roof": ROOF, "cases": cases,
        "not_run": [], "broken": {}, "seconds": 12.0,
    } | more  # fmt: skip


def ffn_case(T: int, direction: str = "forward") -> dict[str, Any]:
    """Ours wins from 4 tokens on; a peer cannot run."""
    speed = 0.8 if T < 4 else 2.0
    return case(
        f"fused_moe_ffn-{direction}-T{T}",
        {
            "moebert_kernels": entry(T / speed, speed, p50_ms=T / speed, p99_ms=2 * T / speed, peak_mib=1.5 * T,
                                     tflops=0.1, gbytes_per_s=8.0, share_of_roof=0.5),
            "dense": entry(float(T), 1.0, p50_ms=1.0 * T, p99_ms=1.5 * T, peak_mib=4.0 * T),
            "ideal": entry(T / 4, 4.0),
            "megablocks": {"skipped": "not installed"},
        },
        parameters={"op": "fused_moe_ffn", "direction": direction, "T": T, "H": 768, "I": 768, "E": 4},
        cost={"flops": 2.4e6 * T, "bytes": 9.4e6, "roof_ms": 0.95, "bound_by": "memory"},
        requirements=[requirement("moebert_kernels", "dense", 1.0, speed)],
    )  # fmt: skip


def requirement(provider: str, over: str, at_least: float, speed: float) -> dict[str, Any]:
    quartiles = {"q1": speed, "median": speed, "q3": speed}
    return {"provider": provider, "over": over, "at_least": at_least, "speed": quartiles, "passed": speed >= at_least}


def encoder_case(name: str = "encoder-B1", ours_ms: float = 100.0) -> dict[str, Any]:
    return case(
        name,
        {"moebert_kernels": entry(ours_ms, 150 / ours_ms), "dense": entry(150.0, 1.0), "original": entry(120.0, 1.25)},
    )


def some_results() -> list[dict[str, Any]]:
    ffn = [ffn_case(T, direction) for direction in ("forward", "forward_backward") for T in (1, 8, 64, 512)]
    return copy.deepcopy([result("ffn", ffn), result("encoder", [encoder_case(), encoder_case("encoder-B8")])])


def write(folder: Path, results: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for one in results:
        (folder / f"{one['what']}.json").write_text(json.dumps(one))
    return folder
