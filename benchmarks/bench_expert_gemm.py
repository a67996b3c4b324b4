"""`expert_gemm` on grouped rows, against one GEMM of the same FLOPs (the roof), a loop over experts and grouped_mm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.inputs import Draws
from benchmarks.layers import cuda_or_skipped
from benchmarks.measuring import Case, Outputs, Provider, Requirement, Skipped, Target
from benchmarks.model import op_cost
from moebert_kernels import backend, expert_gemm, group_tokens, reference

TOKENS = {"cpu": (4, 16, 64, 128, 1024), "cuda": (16384, 65536, 4096, 256)}
PROVIDERS = ("moebert_kernels", "roof", "loop_of_linear", "grouped_mm")
CUDA = "moebert_kernels_cuda"
ANCHOR = 32768, {"K": 768, "N": 2048, "E": 8}  # of which TransformerEngine and SGLang publish TFLOP/s
COMPARED = (16384, 65536)  # where the CUDA kernel must reach Triton's speed on an H200


def cases(target: Target) -> list[Case]:
    shape = {"K": 32, "N": 48, "E": 4} if target.smoke else {"K": 768, "N": 768, "E": 4}
    wanted = [(T, shape) for T in ((16,) if target.smoke else TOKENS[target.device.type])]
    wanted += [ANCHOR] if target.on_gpu and not target.smoke else []
    names = (*PROVIDERS, CUDA) if target.on_gpu else PROVIDERS
    return [
        Case(
            name=f"expert_gemm-T{T}" + ("-E8-K768-N2048" if shape is ANCHOR[1] else ""),
            parameters={"op": "expert_gemm", "direction": "forward", "dtype": target.dtype_name, "T": T, **shape},
            providers=names,
            build=lambda T=T, shape=shape: _build(T, target, names, **shape),
            baseline="roof",
            requires=(Requirement(CUDA, "moebert_kernels", 1.0),) if target.on_gpu and T in COMPARED else (),
            cost=op_cost(
                "expert_gemm", "forward", T=T, E=shape["E"], H=shape["K"], I=shape["N"], dtype=target.dtype
            ),
        )
        for T, shape in wanted
    ]  # fmt: skip


def _build(T: int, target: Target, names: tuple[str, ...], *, K: int, N: int, E: int) -> dict[str, Provider | Skipped]:
    draws = Draws(target)
    expert_ids = draws.expert_ids(T, E)
    grouping = group_tokens(expert_ids, E)
    counts, owner = expert_ids.bincount(minlength=E).tolist(), expert_ids.sort().values
    x, w, bias = draws.normal(T, K), draws.normal(E, N, K, scale=K**-0.5), draws.normal(E, N)

    def ours() -> Outputs:
        with torch.no_grad():
            return (expert_gemm(x, w, grouping, bias),)

    def ours_cuda() -> Outputs:
        with backend.use_backend("cuda", strict=True):
            return ours()

    def roof() -> Outputs:
        return (F.linear(x, w[0], bias[0]),)

    def loop_of_linear() -> Outputs:
        return (torch.cat([F.linear(rows, w[e], bias[e]) for e, rows in enumerate(x.split(counts)) if len(rows)]),)

    def grouped_mm() -> Outputs:
        return (F.grouped_mm(x, w.transpose(1, 2), offs=grouping.offsets[1:]) + bias[owner],)

    def exact(dtype: torch.dtype) -> Outputs:
        return (reference.expert_gemm(x.to(dtype), w.to(dtype), grouping, bias.to(dtype)),)

    def exact_roof(dtype: torch.dtype) -> Outputs:
        return (F.linear(x.to(dtype), w[0].to(dtype), bias[0].to(dtype)),)

    providers: dict[str, Provider | Skipped] = {
        "moebert_kernels": Provider(ours, exact),
        "roof": Provider(
            roof, exact_roof, cost=op_cost("expert_gemm", "forward", T=T, E=1, H=K, I=N, dtype=target.dtype)
        ),
        "loop_of_linear": Provider(loop_of_linear, exact),
        "grouped_mm": Provider(grouped_mm, exact),
    }
    if CUDA in names:
        providers[CUDA] = cuda_or_skipped("expert_gemm", x) or Provider(ours_cuda, exact)
    return providers
