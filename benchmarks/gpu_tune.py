"""Measure what `pick_config` predicts with: the time of a wave, fixed and per step of BLOCK_K, for every candidate.

A GEMM with exactly as many tiles as the GPU holds at once takes fixed_us + K / BLOCK_K * step_us; two depths give both.
`make gpu` writes {"device": name, "us": {kind: what is measured here}} into gpu-tuned.json, the form of
`moebert_kernels/kernels/tuned/sm_<arch>.json`.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.measuring import Target
from moebert_kernels import group_tokens
from moebert_kernels.bench import clocks
from moebert_kernels.kernels import config as configs
from moebert_kernels.kernels.expert_gemm import expert_gemm
from moebert_kernels.kernels.expert_gemm_weights import Product, expert_gemm_weights, num_programs

COLUMNS, DEPTHS, REPEATS = 768, (512, 2048), 10
SMOKE = 32, (128, 256), 1


def measure(kind: str, target: Target) -> dict[str, list[float]]:
    """Candidate of "<precision>-<kind>" -> [fixed_us, step_us]; with smoke shapes of the first alone."""
    precision, shape = kind.split("-")
    columns, depths, repeats = SMOKE if target.smoke else (COLUMNS, DEPTHS, REPEATS)
    measured: dict[str, list[float]] = {}
    for config in configs.candidates(shape, precision, configs.Device.of(target.device).arch)[
        : 1 if target.smoke else None
    ]:
        short, long = (wave_us(config, shape, target, columns, depth, repeats) for depth in depths)
        step = (long - short) / (depths[1] - depths[0]) * config.BLOCK_K
        fixed = max(0.0, short - depths[0] / config.BLOCK_K * step)
        measured[config.name()] = [round(fixed, 3), round(step, 4)]
        print(f"{kind} {config.name():20} fixed {fixed:7.2f} us  step {step:7.3f} us", flush=True)
    return measured


def wave_us(
    config: configs.Config, kind: configs.Kind, target: Target, columns: int, depth: int, repeats: int
) -> float:  # fmt: skip
    """Microseconds of one full wave of tiles whose inner dimension is `depth`."""
    device, precision = target.device, configs.precision_of(target.dtype)
    gpu = configs.Device.of(device)
    per_multiprocessor = 1 if target.smoke else configs.programs_per_multiprocessor(config, kind, precision, gpu)
    slots = gpu.multiprocessors * max(1, per_multiprocessor)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(target.dtype)

    if kind == "rows":
        rows = max(1, slots // -(-columns // config.BLOCK_N)) * config.BLOCK_M
        grouping = group_tokens(torch.zeros(rows, dtype=torch.int64, device=device), 1)
        a, w, y = new(rows, depth), new(1, columns, depth), new(rows, columns)

        def run() -> tuple[torch.Tensor, ...]:
            expert_gemm(a, w, y, grouping, config=config)
            return (y,)

    else:
        experts = max(1, slots // (-(-columns // config.BLOCK_M) * -(-columns // config.BLOCK_N)))
        ids = torch.arange(experts, device=device).repeat_interleave(depth)
        grouping = group_tokens(ids, experts)
        a, b, dw = new(experts * depth, columns), new(experts * depth, columns), new(experts, columns, columns)
        product = Product(a, b, dw)
        programs = num_programs([product], grouping, config, slots)
        partials = torch.empty(2 * programs, config.BLOCK_M, config.BLOCK_N, device=device)

        def run() -> tuple[torch.Tensor, ...]:
            expert_gemm_weights([product], partials, grouping, config=config)
            return (dw,)

    clock = clocks.timer(run, device)
    return 1e3 * statistics.median(ms for _ in range(repeats) for ms in clock.warm_ms())
