"""Experts modules with any option of transformers' decorator, with a naive eager forward to compare with."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from moebert_kernels.integrations.transformers import NAME
from tests.helpers import assert_as_accurate

E, H, I, T, TOP_K = 5, 24, 20, 37, 2


def interleaved_gate(self, gate_up):
    return torch.tanh(gate_up[..., ::2]) * (gate_up[..., 1::2].clamp(-1, 1) + 1)  # clamped, as gpt-oss has it


def make_experts(act="silu", own_gate=None, **options):
    """An experts module with the decorator's `options`, random parameters and a naive eager forward."""
    post_norm = options.pop("has_post_expert_norm", False)
    if post_norm:
        if "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
            pytest.skip("this transformers has no experts with a norm")
        options["has_post_expert_norm"] = True

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = E
            gated, transposed = options.get("has_gate", True), options.get("is_transposed", False)
            self.up = "gate_up_proj" if gated else "up_proj"
            rows = 2 * I if gated else I
            for name, (n, k) in ((self.up, (rows, H)), ("down_proj", (H, I))):
                weight = torch.randn(E, n, k) / k**0.5
                self.register_parameter(name, nn.Parameter(weight.mT.contiguous() if transposed else weight))
                if options.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, n)))
            self.act_fn = ACT2FN[act] if isinstance(act, str) else act
            if post_norm:
                self.post_expert_norm = nn.LayerNorm(H)
                nn.init.normal_(self.post_expert_norm.weight)
                nn.init.normal_(self.post_expert_norm.bias)

        def matmul(self, x, name, e):
            w = getattr(self, name)[e]
            bias = getattr(self, f"{name}_bias")[e] if self.has_bias else None
            return F.linear(x, w.t() if self.is_transposed else w, bias)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            y = torch.zeros_like(hidden_states)
            for e in range(E):
                token, j = torch.where(top_k_index == e)
                h = self.matmul(hidden_states[token], self.up, e)
                h = self.matmul(self._apply_gate(h) if self.has_gate else self.act_fn(h), "down_proj", e)
                if post_norm:
                    h = self.post_expert_norm(h)
                y.index_add_(0, token, (h * top_k_weights[token, j, None]).to(y.dtype))
            return y

    if own_gate is not None:
        Experts._apply_gate = own_gate
    return use_experts_implementation(Experts, **options)(SimpleNamespace(_experts_implementation=NAME))


def routing(tokens=T, top_k=TOP_K, skipped=True):
    low, high = (-2, E + 2) if skipped else (0, E)
    return torch.randint(low, high, (tokens, top_k)), torch.rand(tokens, top_k)


def run_experts(experts, implementation, x, ids, p, dtype=None, p_dtype=None):
    """[y, dx, dp, gradients of all parameters], everything in `dtype` and the routing weights in `p_dtype`."""
    experts = copy.deepcopy(experts).to(dtype)
    experts.config._experts_implementation = implementation
    x = x.detach().to(dtype, copy=True).requires_grad_()
    p = p.detach().to(p_dtype or dtype, copy=True).requires_grad_()
    y = experts(x, ids, p)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, p, *experts.parameters()], dy)]


def assert_matches_eager(experts, x, ids, p, dtype=torch.float32, p_dtype=None):
    got = run_experts(experts, NAME, x, ids, p, dtype, p_dtype)
    eager = run_experts(experts, "eager", x, ids, p, dtype, p_dtype)
    rounded = copy.deepcopy(experts).to(dtype)
    exact = run_experts(rounded, "eager", x.to(dtype), ids, p.to(p_dtype or dtype), torch.float64)
    names = ["y", "dx", "dp", *(f"d{name}" for name, _ in experts.named_parameters())]
    for name, *tensors in zip(names, got, eager, exact, strict=True):
        assert_as_accurate(*tensors, name)
