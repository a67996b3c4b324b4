"""What the host spends on a call, with kernels that are compiled but never run: no GPU is needed.

    python -m benchmarks.host_time    # microseconds per call and launches, on this machine

Triton compiles for sm_90; its driver is replaced by one that launches nothing, and tensors lie on the CPU. So this is
the time of Python, of torch's allocator and of autograd; a real launch adds about 5 us of the driver's to each.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import moebert_kernels as mk
from moebert_kernels import backend
from moebert_kernels.kernels import config
from moebert_kernels.torch_backend import group_tokens

T, H, I, E, LAYERS, REPEATS = 256, 768, 768, 4, 12, 400
launches = 0


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 100, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        global launches
        launches += 1


class NullDriver:
    """Triton's driver of one H100, without the H100."""

    launcher_cls, utils = _Launcher, _Utils()
    get_benchmarker = get_device_interface = lambda self: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    get_current_stream = lambda self, device: 0  # noqa: E731

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def use_null_driver() -> None:
    """From now on the ops run in Triton on CPU tensors."""
    driver.set_active(NullDriver())
    backend.unavailable = lambda op, name, *_: None if name in ("triton", "torch") else "not here"
    backend._first_offer = lambda op, *_: backend.Choice(op, "triton", "")
    hopper = config.Device(90, 132)
    config.Device.of = staticmethod(lambda _: hopper)


def keep_memory() -> None:
    """Freed memory stays with the process, as with torch's allocator on a GPU; else large tensors are system calls."""
    trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
    for parameter in (trim_threshold, mmap_threshold):
        ctypes.CDLL(None).mallopt(parameter, 2**30)


def microseconds(call: Callable[[], object]) -> tuple[float, int]:
    """The tenth percentile of many calls, since other processes only add, and the launches of one."""
    for _ in range(30):
        call()
    before = launches
    call()
    count, times = launches - before, []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1e6 * statistics.quantiles(times, n=10)[0], 1), count


def calls() -> dict[str, Callable[[], object]]:
    bf16 = torch.bfloat16
    weights = [torch.randn(E, I, H, dtype=bf16), torch.randn(E, I, dtype=bf16), torch.randn(E, H, I, dtype=bf16)]
    weights.append(torch.randn(E, H, dtype=bf16))
    norm = [torch.ones(E, H, dtype=bf16), torch.zeros(E, H, dtype=bf16)]
    x, ids = torch.randn(T, H, dtype=bf16), torch.randint(0, E, (T,))
    grouping = mk.Grouping(*(maps[0] for maps in group_tokens.forward(ids[None], E)))
    tables, seed, dy = torch.randint(0, E, (LAYERS, 30522)).to(torch.uint8), torch.tensor(3), torch.randn_like(x)
    leaves = [t.detach().requires_grad_() for t in (x, *weights, *norm)]

    def ffn() -> None:
        y = mk.fused_moe_ffn(leaves[0], grouping, *leaves[1:5])
        torch.autograd.grad(y, leaves[:5], dy)

    def add_norm() -> None:
        y = mk.fused_moe_ffn_add_norm(leaves[0], grouping, *leaves[1:], dropout_p=0.1, dropout_seed=seed)
        torch.autograd.grad(y, leaves, dy)

    small, square, bias = torch.randn(1, 8), torch.randn(8, 8), torch.randn(8)

    def inference(call: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(call)

    return {
        "fused_moe_ffn, inference": inference(lambda: mk.fused_moe_ffn(x, grouping, *weights)),
        "fused_moe_ffn_add_norm, inference": inference(lambda: mk.fused_moe_ffn_add_norm(x, grouping, *weights, *norm)),
        "group_tokens_by_hash, 12 layers": lambda: mk.group_tokens_by_hash(ids, tables, E),
        "fused_moe_ffn, forward and backward": ffn,
        "fused_moe_ffn_add_norm with dropout, forward and backward": add_norm,
        "a dense layer's five ops on tiny tensors, inference": inference(
            lambda: F.layer_norm(
                small + F.linear(F.gelu(F.linear(small, square, bias)), square, bias), (8,), bias, bias
            )
        ),
    }


def main() -> int:
    torch.set_num_threads(1)
    keep_memory()
    use_null_driver()
    for name, call in calls().items():
        took, count = microseconds(call)
        print(json.dumps({"call": name, "us": took, "launches": count}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
