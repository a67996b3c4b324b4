"""Activations and their derivatives on float32 tiles, chosen by name at compile time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh_argument(x):
    # twice the argument of tanh in the tanh form: (1 + tanh(u)) / 2 = sigmoid(2u)
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """act(x); GELU is the exact (erf) form."""
    if NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = x * tl.sigmoid(_tanh_argument(x))
    elif NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif NAME == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    else:
        tl.static_assert(NAME == "identity")
        y = x
    return y


@triton.jit
def activate_grad(x, NAME: tl.constexpr):
    """act'(x)."""
    if NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(_tanh_argument(x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif NAME == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif NAME == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "relu2":
        y = tl.where(x > 0, 2.0 * x, 0.0)
    else:
        tl.static_assert(NAME == "identity")
        y = x * 0.0 + 1.0
    return y
