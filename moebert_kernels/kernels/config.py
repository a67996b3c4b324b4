"""Tile sizes: one pure function, no autotuning at run time.

A grouped GEMM runs in waves of tiles over the multiprocessors. Its time is predicted as

    waves(ragged) * (fixed_us + K / BLOCK_K * step_us)

per candidate, and the least one wins. `waves` counts the tiles of *ragged* groups: the mean of what random routing
gives (every expert's last tile is half full) and of the worst that the host must expect. `fixed_us` and `step_us` come
from `tuned/sm_<arch>.json`, written by `make tune` with the device's name; without such a file they are estimates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal

import torch

Kind = Literal["rows", "weights"]  # GEMMs over rows of tokens; GEMMs that sum over the rows, for weight gradients
Precision = Literal["half", "tf32", "ieee"]


@dataclass(frozen=True)
class Config:
    """Launch parameters of a GEMM. Chosen by `pick_config`, never autotuned at run time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def name(self) -> str:
        return "x".join(str(value) for value in asdict(self).values())

    def options(self) -> dict[str, Any]:
        return asdict(self)

    def narrowed(self, accumulators: int) -> Config:
        """Fewer columns, down to 16, so that a thread holds at most so many elements of a tile."""
        columns = accumulators * self.num_warps * 32 // self.BLOCK_M
        return replace(self, BLOCK_N=max(16, min(self.BLOCK_N, columns)))


@dataclass(frozen=True)
class Device:
    """What `pick_config` needs to know of a GPU."""

    arch: int  # 90 for compute capability 9.0
    multiprocessors: int

    @staticmethod
    @lru_cache
    def of(device: torch.device) -> Device:
        if device.type != "cuda":  # Triton's interpreter
            return Device(80, 4)
        properties = torch.cuda.get_device_properties(device)
        return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


# Tiles for tiny, small, medium and large numbers of rows per expert. A 64-row tile is the smallest for wgmma.
CANDIDATES: dict[Precision, dict[Kind, tuple[Config, ...]]] = {
    "half": {
        "rows": (
            Config(16, 32, 128, 4, 4),
            Config(16, 64, 128, 4, 3),
            Config(32, 64, 64, 4, 4),
            Config(64, 64, 64, 4, 4),
            Config(64, 128, 64, 4, 3),
            Config(128, 128, 64, 8, 3),
        ),
        "weights": (Config(64, 64, 64, 4, 3), Config(64, 128, 64, 4, 3), Config(128, 128, 64, 8, 3)),
    },
    "tf32": {
        "rows": (
            Config(16, 32, 32, 4, 4),
            Config(32, 32, 32, 4, 3),
            Config(64, 64, 32, 4, 3),
            Config(128, 64, 32, 8, 3),
        ),
        "weights": (Config(64, 64, 32, 4, 3), Config(128, 64, 32, 8, 3)),
    },
    "ieee": {  # no tensor cores: small tiles keep the accumulators in registers
        "rows": (Config(16, 32, 32, 4, 2), Config(32, 32, 32, 4, 2), Config(64, 32, 16, 4, 2)),
        "weights": (Config(32, 32, 32, 4, 2), Config(64, 32, 16, 4, 2)),
    },
}  # fmt: skip

_REGISTERS, _SHARED_BYTES, _MAX_PROGRAMS = 65536, 160 * 1024, 4  # of a multiprocessor, the smallest of sm_80 and above
_ELEMENT_BYTES: dict[Precision, int] = {"half": 2, "tf32": 4, "ieee": 4}


def precision_of(dtype: torch.dtype) -> Precision:
    """How products of `dtype` are computed now; float32 follows torch's own switch."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def programs_per_multiprocessor(config: Config, precision: Precision) -> int:
    """How many tiles share a multiprocessor, by shared memory and by the accumulators' registers."""
    shared = config.num_stages * (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * _ELEMENT_BYTES[precision]
    registers = config.num_warps * 32 * (config.BLOCK_M * config.BLOCK_N // (config.num_warps * 32) + 96)
    return max(1, min(_SHARED_BYTES // shared, _REGISTERS // registers, _MAX_PROGRAMS))


def estimated_us(config: Config, precision: Precision) -> tuple[float, float]:
    """(fixed_us, step_us) of a full wave where nothing was measured: dense throughput, less for small tiles."""
    flops_per_us = {"half": 5.5e6, "tf32": 2.2e6, "ieee": 4.5e5}[precision]  # of one multiprocessor of an H200
    m, n = config.BLOCK_M, config.BLOCK_N
    reuse = m * n / (m + n) / 64  # of operands: 1 for 128 x 128
    tiles = programs_per_multiprocessor(config, precision)
    return 1.5, tiles * 2 * m * n * config.BLOCK_K / (flops_per_us * min(1.0, 0.1 + 0.9 * reuse))


@cache
def _tuned(arch: int) -> dict[str, Any]:
    file = resources.files("moebert_kernels.kernels") / "tuned" / f"sm_{arch}.json"
    return json.loads(file.read_text(encoding="utf-8"))["us"] if file.is_file() else {}


def ragged_tiles(rows: int, num_experts: int, block: int) -> tuple[float, float]:
    """Row tiles of E ragged groups: expected with random routing, and the most there can be."""
    groups = min(rows, num_experts)
    return rows / block + groups / 2, (rows - groups) // block + groups


def predicted_us(
    config: Config, kind: Kind, precision: Precision, rows: int, num_experts: int, columns: int, depth: int,
    device: Device,
) -> float:  # fmt: skip
    """Predicted time of a GEMM over `rows` ragged rows with weights (num_experts, columns, depth)."""
    measured = _tuned(device.arch).get(f"{precision}-{kind}", {}).get(config.name())
    fixed, step = measured or estimated_us(config, precision)
    slots = device.multiprocessors * programs_per_multiprocessor(config, precision)
    if kind == "weights":
        tiles = num_experts * math.ceil(columns / config.BLOCK_M) * math.ceil(depth / config.BLOCK_N)
        chunk = pick_chunk(rows, tiles // num_experts, device)
        items = [tiles // num_experts * chunks for chunks in ragged_tiles(rows, num_experts, chunk)]
        return _waves(items, slots) * (fixed + min(rows, chunk) / config.BLOCK_K * step)
    return mean_waves(config, precision, rows, num_experts, columns, device) * (fixed + depth / config.BLOCK_K * step)


def mean_waves(
    config: Config, precision: Precision, rows: int, num_experts: int, columns: int, device: Device
) -> float:
    """Waves of tiles of a GEMM over `rows` ragged rows: the mean of the expected number and of the most."""
    columns_tiles = math.ceil(columns / config.BLOCK_N)
    slots = device.multiprocessors * programs_per_multiprocessor(config, precision)
    return _waves([count * columns_tiles for count in ragged_tiles(rows, num_experts, config.BLOCK_M)], slots)


def _waves(tiles: Sequence[float], slots: int) -> float:
    return sum(math.ceil(count / slots) for count in tiles) / len(tiles)


def pick_chunk(rows: int, tiles: int, device: Device) -> int:
    """Rows that one program sums for a weight gradient of `tiles` tiles: a power of two, for about four waves."""
    wanted = rows * tiles / (4 * device.multiprocessors)
    return max(256, 1 << max(0, math.ceil(math.log2(max(wanted, 1)))))


@lru_cache(maxsize=4096)
def _pick(
    kind: Kind, precision: Precision, rows: int, num_experts: int, columns: int, depth: int, device: Device
) -> Config:
    return min(
        CANDIDATES[precision][kind],
        key=lambda config: predicted_us(config, kind, precision, rows, num_experts, columns, depth, device),
    )


def pick_config(
    kind: Kind, rows: int, num_experts: int, columns: int, depth: int, dtype: torch.dtype, device: Device
) -> Config:
    """The fastest candidate by prediction, from sizes alone.

    Args:
        kind: "rows" for y (rows, N) = x (rows, K) @ w[e].T; "weights" for dw[e] (N, K) = dy.T @ x over e's rows.
        rows: T * top_k; how they are spread over the experts is not known on the host.
        columns, depth: N and K.
        dtype: of the operands.
    """
    return _pick(kind, precision_of(dtype), rows, num_experts, columns, depth, device)
