"""The whole MoEBERT expert (feed-forward, residual, an expert's own LayerNorm), forward and with backward."""

from __future__ import annotations

from benchmarks.layers import layer_case
from benchmarks.measuring import Case, Target

FORWARD = {"cpu": (64, 256, 1024), "cuda": (4096, 16384, 1024)}
BACKWARD = {"cpu": (16, 128, 1024), "cuda": (4096, 16384)}
PROVIDERS = ("moebert_kernels", "dense", "ideal", "original")
ON_GPU = ("moebert_kernels_cuda", "dense_compiled")


def cases(target: Target) -> list[Case]:
    names = PROVIDERS + ON_GPU if target.on_gpu and not target.smoke else PROVIDERS
    return [
        layer_case("fused_moe_ffn_add_norm", direction, T, target, names)
        for direction, tokens in (("forward", FORWARD), ("forward_backward", BACKWARD))
        for T in ((20,) if target.smoke else tokens[target.device.type])
    ]


def test_ffn_add_norm(case, provider, run_provider):
    run_provider(case, provider)
