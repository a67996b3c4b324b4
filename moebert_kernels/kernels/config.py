"""Tile sizes: one pure function, no autotuning at run time.

A grouped GEMM runs in waves of tiles over the multiprocessors. Its time is predicted as

    waves(ragged) * (fixed_us + K / BLOCK_K * step_us)

per candidate, and the least one wins. `waves` counts the tiles of *ragged* groups: the mean of what random routing
gives (every expert's last tile is half full) and of the worst that the host must expect. How many tiles share a
multiprocessor follows from the registers and the shared memory that the compiler gave each kernel: `occupancy.json`,
written by `make resources`. `fixed_us` and `step_us` come from `tuned/sm_<arch>.json`, written by `make tune` with the
device's name; without such a file they are estimates. Weight gradients run in steps that all programs share evenly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal, NamedTuple

import torch

# GEMMs over rows of tokens, by what stands in their epilogues: little, a residual, an activation, its derivative, the
# last two with gates or dropout; GEMMs that sum over rows, for weight gradients; and those that TMA reads for.
Kind = Literal[
    "rows", "residual", "hidden", "backward", "gated", "gated_backward", "weights",
    "descriptors", "hidden_descriptors", "backward_descriptors",
]  # fmt: skip
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

    def gathering(self) -> Config:
        """For operands that are read through a permutation: its loads take two of the pipeline's stages."""
        return replace(self, num_stages=self.num_stages + 2)

    def narrowed(self, accumulators: int) -> Config:
        """Fewer columns, down to 16, so that a thread holds at most so many elements of a tile."""
        columns = accumulators * self.num_warps * 32 // self.BLOCK_M
        return replace(self, BLOCK_N=max(16, min(self.BLOCK_N, columns)))


@dataclass(frozen=True)
class Device:
    """What `pick_config` needs to know of a GPU."""

    arch: int  # 90 for compute capability 9.0
    multiprocessors: int

    @property
    def shared_bytes(self) -> int:
        """Of a multiprocessor, for all its programs; one program may have 1 KiB less."""
        return _SHARED_KIB.get(self.arch, 100) * 1024

    @property
    def compiled_as(self) -> int:
        """The architecture of `occupancy.json` whose code is most like this one's: wgmma is sm_90's alone."""
        return 90 if self.arch == 90 else 100 if 100 <= self.arch < 120 else 80

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
            Config(128, 256, 64, 8, 3),
        ),
        "weights": (
            Config(64, 64, 64, 4, 3),
            Config(64, 128, 64, 4, 3),
            Config(128, 128, 64, 8, 3),
            Config(128, 256, 64, 8, 4),
        ),
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

_SHARED_KIB = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100}
_REGISTERS, _MAX_PROGRAMS, _RESERVED_BYTES = 65536, 8, 1024  # of a multiprocessor; of shared memory for each program
GATED_ACCUMULATORS = 32  # of a tile per thread where gates or masks need registers besides
# Elements of a tile per thread that go through the epilogue at a time: 8 with gates, masks or 16 in all. With more,
# ptxas spills or leaves a multiprocessor to one program (benchmarks/results/triton-resources.json).
_SLICE_ELEMENTS = {False: 16, True: 8}
_ELEMENT_BYTES: dict[Precision, int] = {"half": 2, "tf32": 4, "ieee": 4}


def slices_of(config: Config, gated: bool) -> int:
    """How many parts of a tile's columns go through the epilogue one after the other."""
    elements = config.BLOCK_M * config.BLOCK_N // (32 * config.num_warps)
    return max(1, min(4, elements // _SLICE_ELEMENTS[gated or elements == 16], config.BLOCK_N // 16))


def precision_of(dtype: torch.dtype) -> Precision:
    """How products of `dtype` are computed now; float32 follows torch's own switch."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@cache
def _occupancy() -> dict[str, Any]:
    file = resources.files("moebert_kernels.kernels") / "occupancy.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def candidates(kind: Kind, precision: Precision, arch: int) -> tuple[Config, ...]:
    """The tiles that kernels of a kind have on an architecture."""
    found = CANDIDATES[precision]["weights" if kind == "weights" else "rows"]
    if arch != 90 and not 100 <= arch < 120:  # mma.sync keeps operands in registers, too: 256 columns spill
        found = tuple(config for config in found if config.BLOCK_N < 256)
    if kind.endswith("descriptors"):
        found = tuple(config for config in found if arch == 90 and precision == "half" and config.BLOCK_M >= 64)
    if kind in ("gated", "gated_backward"):
        found = tuple(dict.fromkeys(config.narrowed(GATED_ACCUMULATORS) for config in found))
    return found


def resources_of(config: Config, kind: Kind, precision: Precision, device: Device) -> tuple[int, int]:
    """Registers per thread and shared bytes of a program, as compiled; an estimate for what was not."""
    table = _occupancy().get(f"sm_{device.compiled_as}", {}).get(f"{precision}-{kind}", {})
    if config.name() in table:
        registers, shared = table[config.name()]
        return registers, shared
    accumulators = config.BLOCK_M * config.BLOCK_N // (config.num_warps * 32)
    step = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * _ELEMENT_BYTES[precision]
    return min(255, accumulators + 64), config.num_stages * step


def programs_per_multiprocessor(config: Config, kind: Kind, precision: Precision, device: Device) -> int:
    """How many tiles share a multiprocessor; 0: it has not the shared memory for one."""
    registers, shared = resources_of(config, kind, precision, device)
    if shared > device.shared_bytes - _RESERVED_BYTES:
        return 0
    by_registers = _REGISTERS // (math.ceil(registers / 8) * 8 * 32 * config.num_warps)
    return max(1, min(device.shared_bytes // (shared + _RESERVED_BYTES), by_registers, _MAX_PROGRAMS))


def estimated_us(config: Config, precision: Precision, device: Device, programs: int) -> tuple[float, float]:
    """(fixed_us, step_us) of a wave of `programs` tiles on each multiprocessor, where nothing was measured.

    Per multiprocessor and cycle of 1.7 GHz: 4,096 operations of 16 bits on sm_90 and sm_100, half as many before and in
    tf32, 256 in float32; 35 bytes from the L2; an epilogue of 12 instructions per element, 90 at a time, of which other
    programs' main loops hide 40 %.
    """
    m, n, halves = config.BLOCK_M, config.BLOCK_N, device.compiled_as < 90 and precision != "ieee"
    peak = {"half": 4096, "tf32": 2048, "ieee": 256}[precision] / (2 if halves else 1)
    cycles = max(2 * m * n * config.BLOCK_K / peak, (m + n) * config.BLOCK_K * _ELEMENT_BYTES[precision] / 35)
    epilogue = 12 * m * n / 90 * (programs if programs == 1 else 0.6 * programs)
    return 0.8 + epilogue / 1700, programs * cycles / 1700


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
    shape = "weights" if kind == "weights" else "rows"
    measured = _tuned(device.arch).get(f"{precision}-{shape}", {}).get(config.name())
    programs = programs_per_multiprocessor(config, kind, precision, device)
    if programs == 0:
        return math.inf
    if kind == "weights":
        tiles = num_experts * math.ceil(columns / config.BLOCK_M) * math.ceil(depth / config.BLOCK_N)
        steps = tiles * (rows / num_experts / config.BLOCK_K + 0.5)
        fixed, step = measured or estimated_us(config, precision, device, programs)
        # a program that shares tiles stores partial sums, about twice; then they are read
        return 2 * fixed + math.ceil(steps / (device.multiprocessors * programs)) * step
    expected, _ = ragged_tiles(rows, num_experts, config.BLOCK_M)
    at_once = math.ceil(expected * math.ceil(columns / config.BLOCK_N) / device.multiprocessors)
    fixed, step = measured or estimated_us(config, precision, device, min(programs, at_once))
    waves = mean_waves(config, kind, precision, rows, num_experts, columns, device)
    return waves * (fixed + depth / config.BLOCK_K * step)


def mean_waves(
    config: Config, kind: Kind, precision: Precision, rows: int, num_experts: int, columns: int, device: Device
) -> float:
    """Waves of tiles of a GEMM over `rows` ragged rows: the mean of the expected number and of the most."""
    columns_tiles = math.ceil(columns / config.BLOCK_N)
    slots = device.multiprocessors * max(1, programs_per_multiprocessor(config, kind, precision, device))
    return _waves([count * columns_tiles for count in ragged_tiles(rows, num_experts, config.BLOCK_M)], slots)


def _waves(tiles: Sequence[float], slots: int) -> float:
    return sum(math.ceil(count / slots) for count in tiles) / len(tiles)


class Pick(NamedTuple):
    """What `pick_config` chooses by."""

    kind: Kind
    precision: Precision
    rows: Any  # int; `warming` asks with rows per token
    num_experts: int
    columns: int
    depth: int
    device: Device


_noted: set[Pick] | None = None


@contextmanager
def noted_picks() -> Iterator[set[Pick]]:
    """Collect what `pick_config` is asked inside, in all threads: autograd has some of its own."""
    global _noted
    _noted = set()
    try:
        yield _noted
    finally:
        _noted = None


def noting() -> bool:
    """Whether `noted_picks` is open: then calls are not repeated by what was noted of earlier ones."""
    return _noted is not None


@lru_cache(maxsize=4096)
def pick(asked: Pick) -> Config:
    """The fastest candidate by prediction."""
    return min(
        candidates(asked.kind, asked.precision, asked.device.arch), key=lambda config: predicted_us(config, *asked)
    )


def pick_config(
    kind: Kind, rows: int, num_experts: int, columns: int, depth: int, dtype: torch.dtype, device: Device
) -> Config:
    """The fastest candidate by prediction, from sizes alone.

    Args:
        kind: "weights" for dw[e] (N, K) = dy.T @ x over e's rows; the others for y (rows, N) = x (rows, K) @ w[e].T.
        rows: T * top_k; how they are spread over the experts is not known on the host.
        columns, depth: N and K.
        dtype: of the operands.
    """
    asked = Pick(kind, precision_of(dtype), rows, num_experts, columns, depth, device)
    noted = _noted  # another thread may end its `warmup` meanwhile
    if noted is not None:
        noted.add(asked)
    return pick(asked)
