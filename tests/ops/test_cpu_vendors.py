"""The torch backend takes other ways on AMD's CPUs than on Intel's; both are right on every machine."""

import pytest
import torch

from moebert_kernels import fused_moe_ffn, fused_moe_ffn_add_norm, reference
from moebert_kernels.backend import use_backend
from moebert_kernels.torch_backend import batched_experts
from tests.helpers import assert_as_accurate


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("rows", [3, 20, 70, 130])  # of an expert, on average
@pytest.mark.parametrize("skipping", [True, False])
def test_inference(monkeypatch, amd, rows, skipping):
    monkeypatch.setattr(batched_experts, "is_amd", lambda: amd)
    torch.manual_seed(rows)
    E, I, H, T = 4, 24, 20, 4 * rows
    x, w1, w2 = torch.randn(T, H), torch.randn(E, I, H), torch.randn(E, H, I)
    b1, b2, norm_weight, norm_bias = (torch.randn(E, n) for n in (I, H, H, H))
    ids = torch.randint(-1 if skipping else 0, E, (T,))
    for op, name, more in (
        (fused_moe_ffn, "fused_moe_ffn", ()),
        (fused_moe_ffn_add_norm, "fused_moe_ffn_add_norm", (norm_weight, norm_bias)),
    ):
        arguments = (w1, b1, w2, b2, *more)
        with torch.no_grad(), use_backend("torch"):
            got = op(x, ids, *arguments)
        same = getattr(reference, name)(x, ids, *arguments)
        exact = getattr(reference, name)(x.double(), ids, *(a.double() for a in arguments))
        assert_as_accurate(got, same, exact, name)
