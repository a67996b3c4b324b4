"""Latency with few tokens: the whole MoEBERT expert at T = 1 to 128, median and 99th percentile of single calls.

On a GPU each layer is replayed from a CUDA graph, and once more eagerly: what a caller waits for without one.
"""

from __future__ import annotations

from benchmarks.layers import layer_case
from benchmarks.measuring import Case, Limit, Requirement, Target

TOKENS = (1, 8, 32, 128)
PROVIDERS = ("moebert_kernels", "dense", "ideal", "original")
CUDA = "moebert_kernels_cuda"
ON_GPU = (CUDA, "moebert_kernels_eager", "dense_eager")
# Of the CUDA kernels for few tokens: 10 microseconds, and 1.2 times the dense layer.
AT_MOST_MS, SPEED = 0.010, 1.2


def cases(target: Target) -> list[Case]:
    on_gpu = target.on_gpu and not target.smoke
    requires = [Limit(CUDA, AT_MOST_MS), Requirement(CUDA, "dense", SPEED)] if on_gpu else []
    return [
        layer_case(
            "fused_moe_ffn_add_norm", "forward", T, target, PROVIDERS + ON_GPU if on_gpu else PROVIDERS, requires,
            seconds=2.0 if on_gpu else 6.0,
        )
        for T in ((1, 8) if target.smoke else TOKENS)
    ]  # fmt: skip


def test_tiny(case, provider, run_provider):
    run_provider(case, provider)
