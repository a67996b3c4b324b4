"""The feed-forward op, forward: BERT-base's layer with 4 experts against the dense layer and other ways to run experts.

Groups are as unequal as real text makes them. CPU: few tokens in small steps, since that is where experts can lose to
the dense layer. GPU: up to 65,536 tokens, as large batches have them.
"""

from __future__ import annotations

from benchmarks.layers import compiled, dense_ways, layer_case
from benchmarks.measuring import Case, Limit, Requirement, Target

CPU_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 23, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
GPU_TOKENS = (16384, 4096, 65536, 256, 1024, 128)
ALL_ON_CPU = (16, 128, 1024)  # compiling takes seconds for each number of tokens
FEW = ("moebert_kernels", "dense", "ideal", "loop_of_linear")
OTHERS = (*FEW, "grouped_mm", "transformers_grouped_mm", "transformers_batched_mm")
ON_GPU = ("moebert_kernels_with_grouping", "loop_of_linear_given_counts")
CUDA = ("moebert_kernels_cuda", "moebert_kernels", "dense")  # cases of their own: `_C` may be built meanwhile
CUDA_TOKENS = (16384, 4096, 65536)
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


def cases(target: Target) -> list[Case]:
    if target.smoke:
        return [_case(1, target, FEW), _case(3, target, FEW), _case(20, target, OTHERS)]
    if target.on_gpu:
        with_cuda = [layer_case("fused_moe_ffn", "forward", T, target, CUDA, suffix="-cuda") for T in CUDA_TOKENS]
        found = [_case(T, target, OTHERS + ON_GPU + compiled(T), gpu_requirements(T)) for T in GPU_TOKENS]
        return found + with_cuda + anchors(target)
    all_ways = (*OTHERS, "dense_compiled")
    return [
        _case(T, target, all_ways if T in ALL_ON_CPU else FEW, [Requirement(FEW[0], "dense", required_speed(T))])
        for T in CPU_TOKENS
    ]


def anchors(target: Target) -> list[Case]:
    return [
        layer_case("fused_moe_ffn", "forward", T, target, names, suffix=suffix, shape=shape)
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


def _case(T: int, target: Target, names: tuple[str, ...], requires: list[Requirement | Limit] | None = None) -> Case:
    return layer_case("fused_moe_ffn", "forward", T, target, names, requires or ())


def test_ffn(case, provider, run_provider):
    run_provider(case, provider)
