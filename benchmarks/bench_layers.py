"""Feed-forward layers at BERT-base's sizes, in four suites, against the dense layer and other ways to run experts.

ffn            `fused_moe_ffn`, forward. CPU: few tokens in small steps, since there experts can lose to the dense layer
ffn_backward   the same with backward, as in training: all gradients
ffn_add_norm   the whole MoEBERT expert: feed-forward, residual, an expert's own LayerNorm; and the LayerNorm before
               it, by torch or as rows in the order of the experts, which the expert then reads
tiny           the whole expert with few tokens: median and 99th percentile of single calls. On a GPU each layer is
               replayed from a CUDA graph, and once more eagerly: what a caller waits for without one
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import Draws
from benchmarks.layers import BERT_BASE, SMOKE, compiled, dense_ways, layer_case, runner
from benchmarks.measuring import Case, Limit, Outputs, Provider, Requirement, Target
from benchmarks.model import op_cost
from moebert_kernels import add_norm_in_order, fused_moe_ffn_add_norm, group_tokens, reference

FFN, EXPERT = "fused_moe_ffn", "fused_moe_ffn_add_norm"
CPU_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 23, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
GPU_TOKENS = (16384, 4096, 65536, 256, 1024, 128)
BACKWARD_ON_CPU = (16, 128, 1024)
EXPERT_TOKENS = {"forward": {"cpu": (64, 256, 1024), "cuda": GPU_TOKENS[:5]},
                 "forward_backward": {"cpu": BACKWARD_ON_CPU, "cuda": (16384, 4096, 65536, 1024)}}  # fmt: skip
FEW_TOKENS = (1, 8, 32, 128)
FEW = ("moebert_kernels", "dense", "ideal", "loop_of_linear")
OTHERS = (*FEW, "grouped_mm", "transformers_grouped_mm", "transformers_batched_mm")
ON_GPU = ("moebert_kernels_with_grouping", "loop_of_linear_given_counts")
OF_EXPERT = ("moebert_kernels", "dense", "ideal", "original")
CUDA, WITH_PASS = "moebert_kernels_cuda", "moebert_kernels_cuda_with_pass"
CUDA_TOKENS = (16384, 4096, 65536)  # in cases of their own: `_C` may be built meanwhile
NORM_IN_GEMM_FROM = 8192  # tokens: LEAST_TOKENS of moebert_kernels/cuda_backend/expert_gemm_norm.py
IN_ORDER = "moebert_kernels_in_order"
IN_ORDER_TOKENS = {"forward": (16384, 4096, 65536, 1024), "forward_backward": (16384, 4096)}  # of a GPU
NEVER_SLOWER_THAN = ("loop_of_linear", "loop_of_linear_given_counts", "grouped_mm", "transformers_grouped_mm")
# Shapes that others publish times of: 8 experts of a width of 1,024, and privacy-filter's, a bidirectional classifier
# with 4 of 128 experts for each token. Their dense layer has as many neurons as 4 experts.
ANCHORS: dict[str, tuple[tuple[int, ...], tuple[str, ...], dict[str, int]]] = {
    "-E8-H1024": ((16384, 4096), OTHERS[:6], {"H": 1024, "I": 1024, "E": 8, "D": 4096}),
    "-E128-top4-H640": ((4096,), ("moebert_kernels", "dense", "transformers_grouped_mm"),
                        {"H": 640, "I": 640, "E": 128, "D": 2560, "top_k": 4}),
}  # fmt: skip
# On an H200 in bfloat16: at most so many milliseconds, and so many times the speed of the better dense layer.
WANTED = {256: (0.020, 1.0), 4096: (0.030, 2.5), 16384: (0.080, 3.2), 65536: (0.280, 3.4)}
WANTED_WITH_BACKWARD = {256: 1.0, 4096: 2.2, 16384: 2.8, 65536: 3.0}
AT_MOST_MS, SPEED = 0.010, 1.2  # of the CUDA kernels for few tokens, and over the dense layer


def ffn(target: Target) -> list[Case]:
    def case(T: int, names: tuple[str, ...], *requires: Requirement | Limit) -> Case:
        return layer_case(FFN, "forward", T, target, names, requires)

    if target.smoke:
        return [case(1, FEW), case(3, FEW), case(20, OTHERS)]
    if not target.on_gpu:
        all_ways = (*OTHERS, "dense_compiled")  # compiling takes seconds for each number of tokens
        return [
            case(T, all_ways if T in (16, 128, 1024) else FEW, Requirement(FEW[0], "dense", required_speed(T)))
            for T in CPU_TOKENS
        ]
    found = [case(T, OTHERS + ON_GPU + compiled(T), *gpu_requirements(T)) for T in GPU_TOKENS]
    found += [layer_case(FFN, "forward", T, target, (CUDA, *FEW[:2]), suffix="-cuda") for T in CUDA_TOKENS]
    return found + [
        layer_case(FFN, "forward", T, target, names, suffix=suffix, shape=shape)
        for suffix, (tokens, names, shape) in ANCHORS.items()
        for T in tokens
    ]


def required_speed(T: int) -> float:
    """Over the dense layer on a CPU. From 4 to 23 tokens the op reads as many bytes of weights as that layer does."""
    return 0.9 if 4 <= T <= 23 else 1.0


def gpu_requirements(T: int) -> list[Requirement | Limit]:
    never: list[Requirement | Limit] = [
        Requirement("moebert_kernels", other, 1.0, eager=other == "loop_of_linear")  # which waits for the counts
        for other in NEVER_SLOWER_THAN
    ]
    if T not in WANTED:
        return never
    at_most_ms, speed = WANTED[T]
    return [Limit("moebert_kernels", at_most_ms), Requirement("moebert_kernels", dense_ways(T), speed), *never]


def ffn_backward(target: Target) -> list[Case]:
    names = OTHERS[:6]
    if not target.on_gpu or target.smoke:
        tokens = (20,) if target.smoke else BACKWARD_ON_CPU
        return [layer_case(FFN, "forward_backward", T, target, names, seconds=1.5) for T in tokens]
    speeds = WANTED_WITH_BACKWARD
    return [
        layer_case(FFN, "forward_backward", T, target, names + ON_GPU[1:] + compiled(T),
                   [Requirement("moebert_kernels", dense_ways(T), speeds[T])] if T in speeds else ())
        for T in GPU_TOKENS
    ]  # fmt: skip


def ffn_add_norm(target: Target) -> list[Case]:
    tiny_shapes, measured = target.smoke, target.on_gpu and not target.smoke
    found = [
        _expert(direction, T, target) if measured else layer_case(EXPERT, direction, T, target, OF_EXPERT)
        for direction, tokens in EXPERT_TOKENS.items()
        for T in ((20,) if tiny_shapes else tokens[target.device.type])
    ]
    if target.on_gpu or tiny_shapes:
        found += [
            _two_norms(direction, T, target)
            for direction, tokens in IN_ORDER_TOKENS.items()
            for T in ((20,) if tiny_shapes else tokens)
        ]
    return found


def _expert(direction: str, T: int, target: Target) -> Case:
    """On a GPU; where the CUDA form with the norm in its GEMM runs, also with the norm as a pass."""
    names = (*OF_EXPERT, CUDA, *compiled(T))
    if direction != "forward" or T < NORM_IN_GEMM_FROM:
        return layer_case(EXPERT, direction, T, target, names)
    return layer_case(EXPERT, direction, T, target, (*names, WITH_PASS), [Requirement(CUDA, WITH_PASS, 1.1)])


def tiny(target: Target) -> list[Case]:
    on_gpu = target.on_gpu and not target.smoke
    names = (*OF_EXPERT, CUDA, "moebert_kernels_eager", "dense_eager") if on_gpu else OF_EXPERT
    requires = [Limit(CUDA, AT_MOST_MS), Requirement(CUDA, "dense", SPEED)] if on_gpu else []
    return [
        layer_case(EXPERT, "forward", T, target, names, requires, seconds=2.0 if on_gpu else 6.0)
        for T in (FEW_TOKENS[:2] if target.smoke else FEW_TOKENS)
    ]


SUITES = {"ffn": ffn, "ffn_backward": ffn_backward, "ffn_add_norm": ffn_add_norm, "tiny": tiny}


def _two_norms(direction: str, T: int, target: Target) -> Case:
    shape = {size: (SMOKE if target.smoke else BERT_BASE)[size] for size in "HIE"}
    norm, expert = (op_cost(op, direction, T=T, dtype=target.dtype, **shape) for op in ("add_norm_in_order", EXPERT))
    return Case(
        name=f"add_norm_in_order-{direction}-T{T}",
        parameters={"op": "add_norm_in_order", "direction": direction, "dtype": target.dtype_name, "T": T, **shape},
        providers=("moebert_kernels", IN_ORDER),
        build=lambda: _both_orders(direction, T, target, **shape),
        baseline="moebert_kernels",
        cost=norm + expert,
        requires=(Requirement(IN_ORDER, "moebert_kernels", 1.1),) if target.on_gpu and not target.smoke else (),
    )


def _both_orders(direction: str, T: int, target: Target, *, H: int, I: int, E: int) -> dict[str, Provider]:
    draws = Draws(target)
    ids = draws.expert_ids(T, E)
    grouping = group_tokens(ids, E)
    residual, dy = draws.normal(T, H), draws.normal(T, H)
    weights = [draws.normal(T, H), *draws.norm_weights(H=H), *draws.ffn_weights(E, H=H, width=I)]
    weights += draws.norm_weights(E, H=H)

    def by_token(residual: Tensor, added: Tensor, weight: Tensor, bias: Tensor, *experts: Tensor) -> Tensor:
        return fused_moe_ffn_add_norm(F.layer_norm(residual + added, (H,), weight, bias, 1e-12), grouping, *experts)

    def in_order(residual: Tensor, added: Tensor, weight: Tensor, bias: Tensor, *experts: Tensor) -> Tensor:
        rows = add_norm_in_order(residual, added, weight, bias, grouping)
        return fused_moe_ffn_add_norm(rows, grouping, *experts, in_order=True)

    def naive(residual: Tensor, added: Tensor, weight: Tensor, bias: Tensor, *experts: Tensor) -> Tensor:
        x = F.layer_norm(residual + added, (H,), weight, bias, 1e-12)
        return reference.fused_moe_ffn_add_norm(x, ids, *experts)

    def exact(dtype: torch.dtype) -> Outputs:
        return runner(naive, residual.to(dtype), [w.to(dtype) for w in weights], dy.to(dtype), direction)()

    def provider(layer: Callable[..., Tensor]) -> Provider:
        return Provider(runner(layer, residual, weights, dy, direction), exact)

    return {"moebert_kernels": provider(by_token), IN_ORDER: provider(in_order)}
