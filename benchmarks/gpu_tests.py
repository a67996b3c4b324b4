"""What `make gpu` runs with pytest: the tests that a GPU adds something to, and small ones for compute-sanitizer.

On a GPU the tests below run with Triton's kernels and, where `moebert_kernels._C` can run, with its own
(`tests/backends.py` has the list of ops); an item's name holds `triton` or `cuda`.
"""

from __future__ import annotations

TESTS = [  # file by file: what is cut is done again
    "tests/ops/test_fused_moe_ffn.py",
    "tests/ops/test_fused_moe_ffn_add_norm.py",
    "tests/ops/test_expert_gemm.py",
    "tests/ops/test_group_tokens.py",
    "tests/ops/test_hash_route.py",
    "tests/ops/test_mpo_expert_weights.py",
    "tests/ops/test_any_shape.py",
    "tests/kernels/test_gpu.py",
    "tests/kernels/test_cuda_gpu.py",
    "tests/kernels/test_any_shape.py",
    "tests/kernels/test_dropout.py",
    "tests/kernels/test_tiny_ffn.py",
    "tests/kernels/test_expert_gemm_cuda.py",
    "tests/test_native.py",
]
EXPRESSION = "not torch-"  # plain torch has no kernels of ours; CI runs it on a CPU

NEEDS = dict.fromkeys(("tests/ops/test_any_shape.py", "tests/kernels/test_any_shape.py"), "hypothesis")  # a package

# compute-sanitizer's tools -> files and what is chosen of them. Every kernel, few and small launches: a tool slows each
# manifold.
SMALL = {
    f"tests/ops/test_{op}.py": "(triton or cuda) and bfloat16 and (single_token or skewed or some_skipped)"
    for op in ("fused_moe_ffn", "fused_moe_ffn_add_norm", "expert_gemm")
}
CUDA_SMALL = {f"tests/kernels/test_{name}.py": "small" for name in ("cuda_gpu", "tiny_ffn", "expert_gemm_cuda")}
SANITIZED: dict[str, dict[str, str]] = {
    "memcheck": SMALL | CUDA_SMALL,
    "racecheck": SMALL | CUDA_SMALL,
    "initcheck": CUDA_SMALL,
    "synccheck": SMALL | CUDA_SMALL,
}
# For pytest under a tool: every allocation is one of CUDA's own, so that neighbours do not hide what lies past an end.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
UNWRITTEN = {"MOEBERT_KERNELS_TESTS_FILL": "0"}  # initcheck sees no memory that tests/conftest.py has filled
