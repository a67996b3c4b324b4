import threading

import pytest
import torch

from moebert_kernels import backend, fused_moe_ffn


def test_explain_names_every_op_and_says_why():
    choices = backend.explain()
    assert [choice.op for choice in choices] == list(backend.OPS)
    assert all(choice.backend in backend.BACKENDS and choice.reason for choice in choices)


def test_strict_raises_where_the_backend_lacks_the_op(monkeypatch):
    monkeypatch.setitem(backend._OFFERS, "expert_gemm", ("torch",))
    with backend.use_backend("cuda", strict=True), pytest.raises(RuntimeError, match="expert_gemm: expected a cuda"):
        backend.implementation("expert_gemm", torch.empty(0))
    assert backend.choose("expert_gemm").backend == "torch"


def test_preference_falls_back_with_one_warning(monkeypatch, recwarn):
    monkeypatch.setitem(backend._OFFERS, "expert_gemm", ("torch",))
    backend._warn_once.cache_clear()
    for _ in range(3):
        with backend.use_backend("cuda"):
            assert backend.choose("expert_gemm").backend == "torch"
    assert len([w for w in recwarn if "expert_gemm" in str(w.message)]) == 1


def test_environment_variable_is_a_preference(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "torch")
    assert "MOEBERT_KERNELS_BACKEND" in backend.choose("expert_gemm").reason
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "fpga")
    with pytest.raises(ValueError, match="MOEBERT_KERNELS_BACKEND: expected one of cuda, triton, torch, got 'fpga'"):
        backend.choose("expert_gemm")


def test_backward_prefers_what_forward_did_in_any_thread(monkeypatch):
    """On a GPU backward runs in a thread of autograd's, which has no context of ours."""
    chosen, honest = [], backend.implementation
    monkeypatch.setattr(backend, "implementation", lambda op, x: chosen.append(backend.choose(op, x)) or honest(op, x))
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(2, 3, 4)
    with backend.use_backend("torch", strict=True):
        y = fused_moe_ffn(x, torch.tensor([0, 1, 0, 1, -1]), w, None, w.transpose(1, 2), None)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert x.grad is not None and len(chosen) >= 2
    assert {choice.reason for choice in chosen} == {"asked for by use_backend"}


def test_forms_that_are_left_out():
    assert backend.form_allowed("expert_gemm_norm")
    with backend.use_backend("cuda", without=("expert_gemm_norm",)):
        assert not backend.form_allowed("expert_gemm_norm") and backend.form_allowed("tiny_ffn")
    with pytest.raises(ValueError, match="without: expected some of expert_gemm_norm, got dense, tiny"):
        backend.use_backend("cuda", without=("tiny", "dense")).__enter__()


def test_unknown_name():
    with pytest.raises(ValueError, match="use_backend: expected one of"), backend.use_backend("tpu"):
        pass
