"""torch's FlopCounterMode sees the ops as it sees the same products in plain torch."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

import moebert_kernels.flops  # noqa: F401
from moebert_kernels import expert_gemm, fused_moe_ffn, fused_moe_ffn_add_norm, group_tokens
from moebert_kernels.convert import convert_to_moe
from moebert_kernels.layers import MoEConfig

T, H, I = 6, 8, 5
IDS = torch.zeros(T, dtype=torch.int64)
NAMES = ("x", "w1", "b1", "w2", "b2")


@pytest.fixture
def poison_uninitialised_memory():
    """Off here: without data, as the counter's mode may run, there is nothing to fill."""


def flops(run, tensors):
    """Of `run` and, where a tensor needs a gradient, of its backward."""
    with FlopCounterMode(display=False) as counter:
        y = run(*tensors)
        if y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops()


def ours(x, w1, b1, w2, b2, **options):
    return fused_moe_ffn(x, IDS, w1[None], b1[None], w2[None], b2[None], **options)


def normed(x, w1, b1, w2, b2, **options):
    norm = torch.ones(2, 1, H)
    return fused_moe_ffn_add_norm(x, IDS, w1[None], b1[None], w2[None], b2[None], *norm, **options)


def dense(x, w1, b1, w2, b2):
    return linear(gelu(linear(x, w1, b1)), w2, b2)


@pytest.mark.parametrize("trained", [(), NAMES, ("x",), ("w1", "b1"), ("w2",), ("b2",)], ids=str)
def test_as_dense_products(trained):
    shapes = {"x": (T, H), "w1": (I, H), "b1": (I,), "w2": (H, I), "b2": (H,)}
    tensors = [torch.randn(shape, requires_grad=name in trained) for name, shape in shapes.items()]
    wanted = flops(dense, tensors)
    assert flops(ours, tensors) == wanted > 0
    assert flops(normed, tensors) == flops(lambda *given: layer_norm(given[0] + dense(*given), (H,)), tensors)
    forward = 4 * T * H * I
    if trained == NAMES:
        assert flops(lambda *given: ours(*given, recompute=True), tensors) == wanted + forward / 2
        assert flops(lambda *given: normed(*given, recompute=True), tensors) == wanted + forward


@pytest.mark.parametrize("trained", [(), (0,), (1,), (0, 1)], ids=str)
def test_one_product(trained):
    tensors = [torch.randn(shape, requires_grad=k in trained) for k, shape in enumerate(((T, H), (I, H)))]
    assert flops(lambda x, w: expert_gemm(x, w[None], group_tokens(IDS, 1)), tensors) == flops(linear, tensors)


def test_a_converted_model_has_the_flops_of_its_experts():
    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = flops(lambda ids: model(ids).last_hidden_state, [ids])
        moe = convert_to_moe(
            model, MoEConfig(num_experts=4, expert_size=16, num_shared_neurons=0), importance=torch.rand(2, 64)
        )
        assert flops(lambda ids: moe(ids).last_hidden_state, [ids]) == before - 2 * 2 * 12 * 2 * 32 * (64 - 16)


def test_counts_in_a_transform():
    """Forward and two products of backward for x; torch's own custom ops fail there."""
    tensors = [torch.randn(shape) for shape in ((T, H), (I, H), (I,), (H, I), (H,))]
    with FlopCounterMode(display=False) as counter:
        gradient = torch.func.grad(lambda x: ours(x, *tensors[1:]).sum())(tensors[0])
    assert gradient.shape == tensors[0].shape and counter.get_total_flops() == 2 * flops(ours, tensors)
