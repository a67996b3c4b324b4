"""Measure what `pick_config` predicts with: the time of a wave, fixed and per step of BLOCK_K, for every candidate.

A GEMM with exactly as many tiles as the GPU holds at once takes fixed_us + K / BLOCK_K * step_us; two depths give both.
The result is the file that `moebert_kernels/kernels/tuned/sm_<arch>.json` is made from, with the device's name.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from moebert_kernels import group_tokens
from moebert_kernels.demo import clocks
from moebert_kernels.kernels import config as configs
from moebert_kernels.kernels.expert_gemm import expert_gemm
from moebert_kernels.kernels.expert_gemm_weights import expert_gemm_weights

KINDS = tuple(f"{precision}-{kind}" for precision, kinds in configs.CANDIDATES.items() for kind in kinds)
DEPTHS = (512, 2048)
COLUMNS = 768


def wave_us(config: configs.Config, kind: configs.Kind, precision: configs.Precision, depth: int) -> float:
    """Microseconds of one full wave of tiles whose inner dimension is `depth`."""
    device = torch.device("cuda")
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    slots = configs.Device.of(device).multiprocessors * configs.programs_per_multiprocessor(config, precision)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if kind == "rows":
        tiles_of_columns = -(-COLUMNS // config.BLOCK_N)
        rows = max(1, slots // tiles_of_columns) * config.BLOCK_M
        grouping = group_tokens(torch.zeros(rows, dtype=torch.int64, device=device), 1)
        a, w, y = new(rows, depth), new(1, COLUMNS, depth), new(rows, COLUMNS)

        def run() -> tuple[torch.Tensor, ...]:
            expert_gemm(a, w, y, grouping, config=config)
            return (y,)

    else:
        tiles = -(-COLUMNS // config.BLOCK_M) * -(-COLUMNS // config.BLOCK_N)
        experts = max(1, slots // tiles)
        ids = torch.arange(experts, device=device).repeat_interleave(depth)
        grouping = group_tokens(ids, experts)
        a, b, dw = new(experts * depth, COLUMNS), new(experts * depth, COLUMNS), new(experts, COLUMNS, COLUMNS)

        def run() -> tuple[torch.Tensor, ...]:
            expert_gemm_weights(a, b, dw, None, grouping, chunk=2**30, config=config, split=False)
            return (dw,)

    clock = clocks.timer(run, device)
    return 1e3 * statistics.median(ms for _ in range(10) for ms in clock.warm_ms())


def measure(kind: str) -> dict[str, list[float]]:
    """Candidate -> [fixed_us, step_us], for one of KINDS."""
    before = torch.backends.cuda.matmul.fp32_precision
    precision, shape = kind.split("-")
    measured: dict[str, list[float]] = {}
    try:
        if precision != "half":
            torch.backends.cuda.matmul.fp32_precision = precision
        for config in configs.CANDIDATES[precision][shape]:
            short, long = (wave_us(config, shape, precision, depth) for depth in DEPTHS)
            step = (long - short) / (DEPTHS[1] - DEPTHS[0]) * config.BLOCK_K
            fixed = max(0.0, short - DEPTHS[0] / config.BLOCK_K * step)
            measured[config.name()] = [round(fixed, 3), round(step, 4)]
            print(f"{kind} {config.name():20} fixed {fixed:7.2f} us  step {step:7.3f} us", flush=True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return measured


def main() -> None:
    """Add one kind to {"device": name, "us": {kind: {config: [fixed_us, step_us]}}}."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    of_device = known["us"] if known.get("device") == device else {}
    result = {"device": device, "us": {**of_device, options.kind: measure(options.kind)}}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
