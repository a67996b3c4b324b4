"""Which backends the tests of the ops' kernels run with: in this session, and on a machine with a GPU."""

import torch

from moebert_kernels import backend, native

# Every op that has a CUDA form: its tests run with `use_backend("cuda", strict=True)` where that form can run.
CUDA_FORMS = ("group_tokens", "expert_gemm", "fused_moe_ffn", "fused_moe_ffn_add_norm")


def cuda_runs(op: str) -> bool:
    """Whether `moebert_kernels._C` is there and this machine's GPU can run its form of `op`."""
    if op not in CUDA_FORMS or not torch.cuda.is_available():
        return False
    try:
        with backend.use_backend("cuda", strict=True):
            return backend.choose(op).backend == "cuda"
    except RuntimeError:
        return False


# Elsewhere than on a GPU with _C there is no parameter "cuda", so nothing is skipped or reported.
KERNEL_BACKENDS = ("triton", "cuda") if any(map(cuda_runs, CUDA_FORMS)) else ("triton",)


def why_not_built(kernel: str) -> str | None:
    """Why `moebert_kernels._C` has no such kernel here and how to get it, or None where it has."""
    found = native.record()
    if not found["built"]:
        return "moebert_kernels._C was not built: make build"
    if kernel in found["ops"]:
        return None
    return (
        f"moebert_kernels._C was built without {kernel} ({found['left_out'].get(kernel, 'an older build')}): make build"
    )


def deselect(config, items, wanted) -> None:
    """Leaves the items that are `wanted`."""
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def runs_here(item) -> bool:
    """Whether an item's parameter `implementation` can run the op that its name, or its file, is about."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("implementation") != "cuda":
        return True
    names = (item.originalname.removeprefix("test_"), item.path.stem.removeprefix("test_"))
    op = "expert_gemm" if "expert_gemm" in item.name else next((name for name in names if name in backend.OPS), "")
    return op not in backend.OPS or cuda_runs(op)
