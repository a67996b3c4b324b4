"""Measure what `pick_config` predicts with: the time of a wave, fixed and per step of BLOCK_K, for every candidate.

A GEMM with exactly as many tiles as the GPU holds at once takes fixed_us + K / BLOCK_K * step_us; two depths give both.
The result is the file that `moebert_kernels/kernels/tuned/sm_<arch>.json` is made from, with the device's name.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import clocks
from moebert_kernels import group_tokens
from moebert_kernels.kernels import config as configs
from moebert_kernels.kernels.expert_gemm import expert_gemm
from moebert_kernels.kernels.expert_gemm_weights import expert_gemm_weights

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


def run() -> dict[str, Any]:
    """{"device": name, "us": {"<precision>-<kind>": {config: [fixed_us, step_us]}}}."""
    before = torch.backends.cuda.matmul.fp32_precision
    measured: dict[str, dict[str, list[float]]] = {}
    try:
        for precision, kinds in configs.CANDIDATES.items():
            if precision != "half":
                torch.backends.cuda.matmul.fp32_precision = precision
            for kind, candidates in kinds.items():
                for config in candidates:
                    short, long = (wave_us(config, kind, precision, depth) for depth in DEPTHS)
                    step = (long - short) / (DEPTHS[1] - DEPTHS[0]) * config.BLOCK_K
                    fixed = max(0.0, short - DEPTHS[0] / config.BLOCK_K * step)
                    measured.setdefault(f"{precision}-{kind}", {})[config.name()] = [round(fixed, 3), round(step, 4)]
                    print(
                        f"{precision}-{kind} {config.name():20} fixed {fixed:7.2f} us  step {step:7.3f} us", flush=True
                    )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return {"device": torch.cuda.get_device_name(), "us": measured}
