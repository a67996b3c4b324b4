"""`expert_gemm` on grouped rows, against one GEMM of the same FLOPs (the roof) and a loop over experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.measuring import Case, Outputs, Provider, Target
from moebert_kernels import expert_gemm, group_tokens, reference

TOKENS = (4, 16, 64, 128, 1024)
PROVIDERS = ("moebert_kernels", "roof", "loop_of_linear")


def cases(target: Target) -> list[Case]:
    smoke = target.smoke
    shape = {"K": 32, "N": 48, "E": 4} if smoke else {"K": 768, "N": 768, "E": 4}
    return [
        Case(
            name=f"expert_gemm-T{T}",
            parameters={"op": "expert_gemm", "direction": "forward", "dtype": "float32", "T": T, **shape},
            providers=PROVIDERS,
            build=lambda T=T: _build(T, **shape),
            baseline="roof",
        )
        for T in ((16,) if smoke else TOKENS)
    ]


def _build(T: int, *, K: int, N: int, E: int) -> dict[str, Provider]:
    generator = torch.Generator().manual_seed(0)
    expert_ids = torch.randint(0, E, (T,), generator=generator)
    grouping = group_tokens(expert_ids, E)
    counts = expert_ids.bincount(minlength=E).tolist()
    x = torch.randn(T, K, generator=generator)
    w = torch.randn(E, N, K, generator=generator) * K**-0.5
    bias = torch.randn(E, N, generator=generator)

    def roof() -> Outputs:
        return (F.linear(x, w[0], bias[0]),)

    def loop_of_linear() -> Outputs:
        return (torch.cat([F.linear(rows, w[e], bias[e]) for e, rows in enumerate(x.split(counts)) if len(rows)]),)

    def exact(dtype: torch.dtype) -> Outputs:
        return (reference.expert_gemm(x.to(dtype), w.to(dtype), grouping, bias.to(dtype)),)

    def exact_roof(dtype: torch.dtype) -> Outputs:
        return (F.linear(x.to(dtype), w[0].to(dtype), bias[0].to(dtype)),)

    return {
        "moebert_kernels": Provider(lambda: (expert_gemm(x, w, grouping, bias),), exact),
        "roof": Provider(roof, exact_roof),
        "loop_of_linear": Provider(loop_of_linear, exact),
    }


def test_expert_gemm(case, provider, run_provider):
    run_provider(case, provider)
