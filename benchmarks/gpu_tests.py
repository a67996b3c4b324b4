"""What `make gpu` runs with pytest: the tests that a GPU adds something to, and small ones for compute-sanitizer.

On a GPU the tests below run with Triton's kernels and, where `moebert_kernels._C` can run, with its own
(`tests/backends.py` has the list of ops); an item's name holds `triton` or `cuda`.
"""

from __future__ import annotations

TESTS = [
    "tests/ops",
    "tests/kernels/test_gpu.py",
    "tests/kernels/test_cuda_gpu.py",
    "tests/kernels/test_any_shape.py",
    "tests/kernels/test_dropout.py",
    "tests/kernels/test_tiny_ffn.py",
    "tests/kernels/test_expert_gemm_cuda.py",
    "tests/test_native.py",
]
EXPRESSION = "not torch-"  # plain torch has no kernels of ours; CI runs it on a CPU

# compute-sanitizer's tools -> pytest's arguments. Every kernel, few and small launches: a tool slows each manifold.
SMALL = ["tests/ops", "-k", "(triton or cuda) and bfloat16 and (single_token or skewed or some_skipped)"]
CUDA_SMALL = [
    "tests/kernels/test_cuda_gpu.py",
    "tests/kernels/test_tiny_ffn.py",
    "tests/kernels/test_expert_gemm_cuda.py",
    "-k",
    "small",
]
SANITIZED: dict[str, list[list[str]]] = {
    "memcheck": [SMALL, CUDA_SMALL],
    "racecheck": [SMALL, CUDA_SMALL],
    "initcheck": [CUDA_SMALL],
    "synccheck": [SMALL, CUDA_SMALL],
}
# For pytest under a tool: every allocation is one of CUDA's own, so that neighbours do not hide what lies past an end.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
