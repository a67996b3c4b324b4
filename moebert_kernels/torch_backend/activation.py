"""Activations forward and backward, on rows of pre-activations."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels.activation import GATED, is_gated

_aten = torch.ops.aten


def _plain(h_pre: Tensor, name: str, inplace: bool) -> Tensor:
    if name == "gelu":
        return _aten.gelu_(h_pre) if inplace else _aten.gelu(h_pre)
    if name == "gelu_tanh":
        return _aten.gelu_(h_pre, approximate="tanh") if inplace else _aten.gelu(h_pre, approximate="tanh")
    if name == "relu":
        return h_pre.relu_() if inplace else h_pre.relu()
    if name == "relu2":
        return h_pre.relu_().square_() if inplace else h_pre.relu().square()
    if name == "silu":
        return _aten.silu_(h_pre) if inplace else _aten.silu(h_pre)
    return h_pre


def _plain_backward(dh: Tensor, h_pre: Tensor, name: str) -> Tensor:
    if name == "gelu":
        return _aten.gelu_backward(dh, h_pre)
    if name == "gelu_tanh":
        return _aten.gelu_backward(dh, h_pre, approximate="tanh")
    if name == "relu":
        return _aten.threshold_backward(dh, h_pre, 0)
    if name == "relu2":
        return 2 * dh * h_pre.relu()
    if name == "silu":
        return _aten.silu_backward(dh, h_pre)
    return dh


def activate(h_pre: Tensor, name: str, *, inplace: bool) -> Tensor:
    """(M, I) -> (M, I), or (M, 2I) -> (M, I) for gated names. With `inplace`, `h_pre` may be overwritten."""
    if is_gated(name):
        gate, up = h_pre.chunk(2, dim=-1)
        return _plain(gate, GATED[name], inplace) * up
    return _plain(h_pre, name, inplace)


def activate_backward(dh: Tensor, h_pre: Tensor, name: str) -> Tensor:
    """Gradient of the pre-activation from the gradient of the activation."""
    if is_gated(name):
        gate, up = h_pre.chunk(2, dim=-1)
        dgate = _plain_backward(dh * up, gate, GATED[name])
        return torch.cat([dgate, dh * _plain(gate, GATED[name], False)], dim=-1)
    return _plain_backward(dh, h_pre, name)
