"""The experts of a layer as one operator of ONNX Runtime, `com.microsoft.MoE`, for CPUs and CUDA in float32.

The operator chooses experts by the largest logits. Here they are one-hot, made from the ids that our router gives, so
that the softmax over them is 1 in float32. Every token is computed, padding too; what is skipped is dropped after that.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEFeedForward, moe_layers

# our names -> the operator's, whose "gelu" is the form with tanh
_NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu", "silu": "silu", "identity": "identity"}
_NOT_CHOSEN = -1e4  # a logit whose share is 0 in float32


def check_operator(model: Any, dtype: str) -> None:
    """Raise the UserErrors of `export_onnx(experts="operator")`, and warn where the numbers differ."""
    layers = moe_layers(model)
    if not layers:
        raise UserError('experts: expected "matrices" for a model without experts, got "operator"')
    if dtype != "float32":
        raise UserError(f'dtype: expected float32 with experts="operator", got {dtype!r}; take experts="matrices"')
    activation = layers[0].experts.activation
    if activation not in _NAMES:
        raise UserError(
            f'experts: expected "matrices" for the activation {activation!r}, got "operator", which has '
            f"{', '.join(sorted(set(_NAMES) - {'gelu'}))}"
        )
    if activation == "gelu":
        warnings.warn(
            "ONNX Runtime's MoE operator computes gelu with tanh, the model with erf: activations differ by up to "
            "0.0005; take experts='matrices' for the model's own numbers",
            stacklevel=3,
        )


def passes(layer: MoEFeedForward) -> bool:
    """Whether x passes by the experts of a layer at tokens: those that a router with a capacity drops."""
    limits = (getattr(layer.router, name, None) for name in ("capacity_factor", "eval_capacity_factor"))
    return bool(layer.experts.adds_residual) and any(limit is not None for limit in limits)


class OperatorExperts(nn.Module):
    """The experts of a layer around the operator; for export alone, as torch cannot compute it."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(self, layer: MoEFeedForward) -> None:
        super().__init__()
        experts: Any = layer.experts
        self.activation, self.adds_residual = experts.activation, experts.adds_residual
        self.passes = passes(layer)
        self.num_experts, self.eps = experts.num_experts, getattr(experts, "eps", None)
        with torch.no_grad():
            for name, weight, bias in zip("12", experts.weights(), experts.biases(), strict=True):
                zeros = weight.new_zeros(weight.shape[:2])
                self.register_buffer(f"w{name}", weight.detach().clone())
                self.register_buffer(f"b{name}", zeros if bias is None else bias.detach().clone())
        if self.adds_residual:
            self.norm_weight, self.norm_bias = experts.norm_weight, experts.norm_bias

    def forward(self, x: Tensor, expert_ids: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """As `StandardExperts.forward`."""
        flat = x.reshape(-1, x.shape[-1])
        top_k = 1 if expert_ids.ndim < x.ndim else expert_ids.shape[-1]
        ids = expert_ids.reshape(-1, 1).long()
        inputs = flat if top_k == 1 else flat.repeat_interleave(top_k, 0)
        chosen = ids == torch.arange(self.num_experts)
        logits = torch.where(chosen, 0.0, _NOT_CHOSEN)
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MoE",
            (inputs, logits, self.w1, self.b1, self.w2, self.b2),
            {"k": 1, "activation_type": _NAMES[self.activation], "normalize_routing_weights": 1},
            dtype=x.dtype, shape=inputs.shape, version=1,
        )  # fmt: skip
        if self.adds_residual:
            normed = F.layer_norm(inputs + y, y.shape[1:], eps=self.eps)
            expert = ids.squeeze(1).clamp(min=0)
            y = torch.addcmul(self.norm_bias[expert], normed, self.norm_weight[expert])
        if routing_weights is not None:
            y = y * routing_weights.reshape(-1, 1)
        y = torch.where(chosen.any(1, keepdim=True), y, inputs if self.passes else torch.zeros_like(y))
        if top_k > 1:
            y = y.view(-1, top_k, y.shape[1]).sum(1)
        return y.view(x.shape)
