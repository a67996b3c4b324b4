"""gradcheck of the reference in float64: what defines right must itself be differentiable and right."""

import torch
from torch.autograd import gradcheck

from moebert_kernels import reference


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_fused_moe_ffn():
    ids = torch.tensor([[0, 1], [1, -1], [2, 0]])
    inputs = (double(3, 4), double(3, 5, 4), double(3, 5), double(3, 4, 5), double(3, 4), double(3, 2))

    def op(x, w1, b1, w2, b2, p):
        return reference.fused_moe_ffn(x, ids, w1, b1, w2, b2, routing_weights=p)

    assert gradcheck(op, inputs)


def test_fused_moe_ffn_add_norm():
    ids, seed = torch.tensor([0, -1, 2]), torch.tensor(11)
    inputs = (double(3, 4), double(3, 5, 4), double(3, 5), double(3, 4, 5), double(3, 4), double(3, 4), double(3, 4))

    def op(x, w1, b1, w2, b2, norm_weight, norm_bias):
        return reference.fused_moe_ffn_add_norm(
            x, ids, w1, b1, w2, b2, norm_weight, norm_bias, dropout_p=0.3, hidden_dropout_p=0.3, dropout_seed=seed
        )

    assert gradcheck(op, inputs)


def test_expert_gemm():
    grouping = reference.group_tokens(torch.tensor([1, 0, -1, 1]), 2)
    assert gradcheck(
        lambda x, w, b: reference.expert_gemm(x, w, grouping, b), (double(4, 3), double(2, 5, 3), double(2, 5))
    )
