"""The whole MoEBERT expert (feed-forward, residual, an expert's own LayerNorm), forward and with backward."""

from __future__ import annotations

from benchmarks.layers import compiled, layer_case
from benchmarks.measuring import Case, Target

FORWARD = {"cpu": (64, 256, 1024), "cuda": (16384, 4096, 65536, 1024, 256)}
BACKWARD = {"cpu": (16, 128, 1024), "cuda": (16384, 4096, 65536, 1024, 256, 128)}
PROVIDERS = ("moebert_kernels", "dense", "ideal", "original")
ON_GPU = ("moebert_kernels_cuda",)


def cases(target: Target) -> list[Case]:
    on_gpu = target.on_gpu and not target.smoke
    return [
        layer_case(
            "fused_moe_ffn_add_norm", direction, T, target, PROVIDERS + ON_GPU + compiled(T) if on_gpu else PROVIDERS
        )
        for direction, tokens in (("forward", FORWARD), ("forward_backward", BACKWARD))
        for T in ((20,) if target.smoke else tokens[target.device.type])
    ]


def test_ffn_add_norm(case, provider, run_provider):
    run_provider(case, provider)
