"""The package's clocks, the roof of this device by them, and whether it still works."""

from __future__ import annotations

from functools import cache

import torch

from moebert_kernels.bench.clocks import Timer, WallTimer, first_line, peak_mib, timer

__all__ = ["Timer", "WallTimer", "device_lost", "first_line", "peak_mib", "roof", "timer"]


def device_lost() -> bool:
    """Whether an error in a kernel has ended CUDA in this process: nothing more can run in it."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


@cache
def roof(device: torch.device, dtype: torch.dtype, smoke: bool = False) -> dict[str, float]:
    """What this device reaches: {"tflops": of a large square product, "gbytes_per_s": of a copy, read and written}."""
    size = 64 if smoke else (2048 if device.type == "cpu" else 8192)
    copied = 2**16 if smoke else (2**28 if device.type == "cpu" else 2**30)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source, sink = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    product = timer(lambda: a @ b, device)
    copy = timer(lambda: sink.copy_(source), device)
    product_ms, copy_ms = (min(ms for _ in range(5) for ms in clock.warm_ms()) for clock in (product, copy))
    return {
        "tflops": float(f"{2 * size**3 / product_ms / 1e9:.4g}"),
        "gbytes_per_s": float(f"{2 * copied / copy_ms / 1e6:.4g}"),
    }
