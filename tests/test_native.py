"""What is said where the compiled module, or one of its kernels, cannot run."""

import json

import pytest
import torch

from moebert_kernels import backend, native
from tests.backends import CUDA_FORMS, why_not_built

BUILT = {
    "built": True, "archs": ["sm_90a"], "ptx": "compute_90", "compilers": "nvcc, g++", "ops": ["group_tokens"],
    "left_out": {"expert_gemm": "no headers"},
}  # fmt: skip
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Writes what a build would have recorded."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    return lambda content: (tmp_path / "_C.json").write_text(json.dumps(content))


def test_never_built(record):
    assert "never built" in native.unavailable("group_tokens", CUDA, torch.float32)


def test_build_that_failed(record):
    record({"built": False, "reason": "the build failed: no space"})
    assert native.unavailable("group_tokens", CUDA, torch.float32) == "not built: the build failed: no space"


def test_kernels_that_were_left_out(record):
    record(BUILT)
    assert native.unavailable("expert_gemm", CUDA, torch.float32) == "not built: expert_gemm: no headers"
    assert "tiny_ffn: not in this build" in native.unavailable("tiny_ffn", CUDA, torch.float32)


def test_wrong_dtype_and_device(record):
    record(BUILT)
    assert "float64" in native.unavailable("group_tokens", CUDA, torch.float64)
    assert native.unavailable("group_tokens", CPU, torch.float32) == "needs a CUDA device, got cpu"


def test_gpu_or_driver_that_cannot_run_it(record, monkeypatch):
    record(BUILT)
    monkeypatch.setattr(native, "device_error", lambda device: "no kernel image is available")
    expected = "built for sm_90a and compute_90, got: no kernel image is available"
    assert native.unavailable("group_tokens", CUDA, torch.float32) == expected
    monkeypatch.setattr(native, "device_error", lambda device: "")
    assert native.unavailable("group_tokens", CUDA, torch.float32) is None


def test_module_of_another_python(record, monkeypatch):
    record(BUILT)
    monkeypatch.setattr(native, "device_error", lambda device: native.importlib.import_module("moebert_kernels._no"))
    assert "_C does not import" in native.unavailable("group_tokens", CUDA, torch.float32)


def test_the_module_imports_without_a_gpu():
    if not native.record()["built"]:
        pytest.skip(why_not_built("group_tokens"))
    if not torch.cuda.is_available():
        assert native.module().device_error(0)  # CUDA's own words
        assert native.device_error() == "no CUDA device"


def test_the_list_of_offers_is_that_of_the_files():
    """An op with CUDA forms has its file, its entry behind Triton, and the names of its kernels."""
    folder = native.FOLDER / "cuda_backend"
    offered = {op for op, backends in backend._OFFERS.items() if "cuda" in backends}
    assert offered == {op for op in backend.OPS if (folder / f"{op}.py").exists()}
    assert offered == set(CUDA_FORMS) == set(backend._CUDA_FORMS)
    for op in offered:
        assert backend._OFFERS[op] == ("triton", "cuda", "torch")


def test_an_op_has_the_backend_if_it_has_one_of_its_forms(record, monkeypatch):
    kernels = {"tiny_ffn": None, "expert_gemm": "not Hopper"}
    monkeypatch.setattr(backend, "kernel_unavailable", lambda kernel, device, dtype: kernels[kernel])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    find = backend.unavailable.__wrapped__
    assert find("fused_moe_ffn", "cuda", CPU, torch.float32) is None
    assert find("expert_gemm", "cuda", CPU, torch.float32) == "not Hopper"
    kernels["tiny_ffn"] = "not built"
    assert find("fused_moe_ffn", "cuda", CPU, torch.float32) == "not built"


def test_hopper_gemm_is_for_hopper(record, monkeypatch):
    record({**BUILT, "ops": ["expert_gemm", "tiny_ffn"]})
    monkeypatch.setattr(native, "device_error", lambda device: "")
    find = backend.kernel_unavailable.__wrapped__
    for major, expected in ((9, None), (10, "it multiplies by wgmma, which needs compute capability 9.x")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert find("expert_gemm", CUDA, torch.float16) == expected
        assert find("tiny_ffn", CUDA, torch.float16) is None
