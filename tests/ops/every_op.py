"""Every differentiable op as a function of its tensors, for tests of what holds for all of them."""

import torch

from moebert_kernels import (
    add_norm_in_order,
    expert_gemm,
    fused_moe_ffn,
    fused_moe_ffn_add_norm,
    group_tokens,
    mpo_expert_weights,
)

T, H, I, E = 9, 6, 5, 3
NAMES = ("add_norm_in_order", "expert_gemm", "fused_moe_ffn", "fused_moe_ffn_add_norm", "mpo_expert_weights")


def op(name):
    """The op with its routing bound, and its tensors: x first, but for `mpo_expert_weights`, which has none."""
    ids = torch.arange(T) % (E + 1)  # some are skipped
    grouping = group_tokens(ids, E)
    x, w1, b1 = torch.randn(T, H), torch.randn(E, I, H), torch.randn(E, I)
    w2, b2, norm_weight, norm_bias = torch.randn(E, H, I), torch.randn(E, H), torch.rand(E, H) + 0.5, torch.randn(E, H)
    sites = torch.randn(2, 2, 3, 2), torch.randn(E, 1, 2, 2, 2), torch.randn(E, 2, 3, 1, 1)
    return {
        "add_norm_in_order": (
            lambda residual, *rest: add_norm_in_order(residual, *rest, grouping),
            (x, torch.randn(T, H), norm_weight[0], norm_bias[0]),
        ),
        "expert_gemm": (lambda x, w, b: expert_gemm(x, w, grouping, b, gather=True), (x, w1, b1)),
        "fused_moe_ffn": (lambda x, *w: fused_moe_ffn(x, ids, *w), (x, w1, b1, w2, b2)),
        "fused_moe_ffn_add_norm": (
            lambda x, *w: fused_moe_ffn_add_norm(x, ids, *w), (x, w1, b1, w2, b2, norm_weight, norm_bias),
        ),
        "mpo_expert_weights": (lambda central, *aux: mpo_expert_weights(central, aux), sites),
    }[name]  # fmt: skip


def require_grad(tensors):
    """Leaves of the same values."""
    return [t.detach().clone().requires_grad_() for t in tensors]
