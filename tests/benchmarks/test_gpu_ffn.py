"""What `make gpu` times, as far as a CPU goes: every provider computes the right thing, and a miss is reported."""

import pytest
import torch

from benchmarks import gpu_ffn
from benchmarks.gate import check


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_providers_agree_with_their_references(direction, monkeypatch):
    monkeypatch.setattr(gpu_ffn, "H", 64)
    monkeypatch.setattr(gpu_ffn, "I", 48)
    monkeypatch.setattr(gpu_ffn, "D", 128)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # of torch itself: not ours to test
    made = gpu_ffn.providers(50, direction, torch.device("cpu"), torch.bfloat16)
    checked = check(made)
    assert checked.refused == {} and set(checked.passed) == set(made)


def entry(microseconds, ratios, tokens=4096, direction="forward"):
    return {
        "T": tokens, "direction": direction, "refused": {},
        "times": {"moebert_kernels": {"warm_us": [microseconds] * 3}},
        "speed_of_moebert_kernels_over": {name: [value] * 3 for name, value in ratios.items()},
    }  # fmt: skip


def test_what_is_missed_is_said():
    assert gpu_ffn.missed(entry(29.0, {"dense": 2.6, "dense_compiled": 2.5, "grouped_mm": 1.0})) == []
    found = gpu_ffn.missed(entry(31.0, {"dense": 2.6, "dense_compiled": 2.4, "grouped_mm": 0.98}))
    assert found == [
        "expected at most 30 us, got 31.0",
        "expected 2.5 times the best dense layer's speed, got 2.4",
        "expected never to be slower than grouped_mm 0.98",
    ]
    assert gpu_ffn.missed(entry(50.0, {"dense": 2.2}, direction="forward_backward")) == []
    assert gpu_ffn.missed({"times": {}, "refused": {"moebert_kernels": "broke"}}) == ["moebert_kernels: broke"]
