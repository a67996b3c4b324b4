"""Forward and backward of the feed-forward op, as in training: all gradients, against those of the dense layer."""

from __future__ import annotations

from benchmarks.layers import compiled, dense_ways, layer_case
from benchmarks.measuring import Case, Requirement, Target

CPU_TOKENS, GPU_TOKENS = (16, 128, 1024), (16384, 4096, 65536, 1024, 256, 128)
PROVIDERS = ("moebert_kernels", "dense", "ideal", "loop_of_linear", "grouped_mm", "transformers_grouped_mm")
ON_GPU = ("loop_of_linear_given_counts",)
WANTED = {256: 1.0, 4096: 2.2, 16384: 2.8, 65536: 3.0}  # times the speed of the better dense layer, on an H200


def cases(target: Target) -> list[Case]:
    if target.on_gpu and not target.smoke:
        return [
            layer_case("fused_moe_ffn", "forward_backward", T, target, PROVIDERS + ON_GPU + compiled(T),
                       [Requirement("moebert_kernels", dense_ways(T), WANTED[T])] if T in WANTED else ())
            for T in GPU_TOKENS
        ]  # fmt: skip
    tokens = (20,) if target.smoke else CPU_TOKENS
    return [layer_case("fused_moe_ffn", "forward_backward", T, target, PROVIDERS, seconds=1.5) for T in tokens]


def test_ffn_backward(case, provider, run_provider):
    run_provider(case, provider)
