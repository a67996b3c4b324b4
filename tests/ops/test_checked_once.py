"""A call that looks like one that was checked is not checked again; whatever else is."""

import pytest
import torch

from moebert_kernels import fused_moe_ffn
from moebert_kernels.ops import _checks
from moebert_kernels.ops._checks import checked_once


@pytest.fixture
def calls(monkeypatch):
    """How often a check ran."""
    monkeypatch.setattr(_checks, "_PASSED", set())
    ran = []

    def check():
        ran.append(1)

    def call(*tensors, values=()):
        checked_once(check, tensors, *values)
        return len(ran)

    return call


def test_once_for_what_looks_the_same(calls):
    assert calls(torch.zeros(3), None, values=(0.5,)) == 1
    assert calls(torch.ones(3), None, values=(0.5,)) == 1


@pytest.mark.parametrize(
    "tensor, value",
    [(torch.zeros(4), 0), (torch.zeros(3).double(), 0), (torch.zeros(3, device="meta"), 0), (torch.zeros(3), 1),
     (torch.zeros(3), False), (None, 0), (torch.zeros(3, dtype=torch.cfloat).conj().imag, 0),
     (torch.zeros(3).to_sparse(), 0)],
)  # fmt: skip
def test_again_for_what_does_not(calls, tensor, value):
    assert calls(torch.zeros(3), values=(0,)) == 1
    assert calls(tensor, values=(value,)) == 2


def test_what_cannot_be_a_key_is_checked_every_time(calls):
    assert calls("no tensor") == 1 and calls("no tensor") == 2
    assert calls(torch.zeros(3), values=([],)) == 3 and calls(torch.zeros(3), values=([],)) == 4


def test_an_error_is_not_remembered(monkeypatch):
    monkeypatch.setattr(_checks, "_PASSED", set())

    def check():
        raise ValueError("wrong")

    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            checked_once(check, (torch.zeros(3),))


def test_keys_do_not_grow_without_end(calls, monkeypatch):
    monkeypatch.setattr(_checks, "_MOST_PASSED", 3)
    for size in range(10):
        calls(torch.zeros(size))
    assert len(_checks._PASSED) <= 3


def test_a_wrong_call_after_a_right_one_is_refused():
    """With the same shapes, in each argument that decides."""
    x, ids = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    weights = [torch.zeros(2, 6, 8), torch.zeros(2, 6), torch.zeros(2, 8, 6), torch.zeros(2, 8)]
    fused_moe_ffn(x, ids, *weights, hidden_dropout_p=0.0)
    for i, name in enumerate(("w1", "b1", "w2", "b2")):
        wrong = list(weights)
        wrong[i] = wrong[i].double()
        with pytest.raises(ValueError, match=f"{name}: expected dtype torch.float32"):
            fused_moe_ffn(x, ids, *wrong)
    with pytest.raises(ValueError, match="hidden_dropout_p: expected a probability"):
        fused_moe_ffn(x, ids, *weights, hidden_dropout_p=False)
    with pytest.raises(ValueError, match="activation: expected one of"):
        fused_moe_ffn(x, ids, *weights, activation="erf")
