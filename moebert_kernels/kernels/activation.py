"""Activations and their derivatives on float32 tiles, chosen by name at compile time.

HALF says that the result is rounded to 16 bits. Then the GPU's approximations of 1 / x and 2^x serve, each one
instruction and right to 2^-22, and GELU needs no erf, which is 38 instructions per element:

    gelu(x) = max(x, 0) - a q(a)        q(a) = Phi(-a) = P(t) exp(-a^2 / 2)        t = 1 / (1 + 0.376 a)

with P of degree 5 without a constant term, the form of Abramowitz and Stegun 7.1.26. Their coefficients bound the
absolute error of erf; these bound the relative error of q: 3.5e-5 for a <= 13, where q is 1e-38. Half a unit in the
last place is 4.9e-4 in float16 and 3.9e-3 in bfloat16. The derivative Phi(x) + x phi(x) shares q and the exponential.
a is |x|, or 16 beyond, where the exponential is zero.

Of every activation but relu2 the derivatives at the infinities are 1 and 0 (the identity's is 1), act(-inf) is 0 where
act'(-inf) is, and act(NaN) is NaN: a factor x is held where the other one is exactly 0 or 1, at 16 or 128, since
infinity times zero is NaN. What float16 cannot hold of a pre-activation is kept for backward as an infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _reciprocal(x):
    if _INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _exp2(x):
    if _INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _bell(x):
    """exp(-x^2 / 2)."""
    return _exp2(x * x * -0.7213475204444817)


@triton.jit
def _tail_factor(x):
    """a, and P(t) of it."""
    a = tl.minimum(tl.abs(x), 16.0)
    t = _reciprocal(a * 0.376 + 1.0)
    p = t * -0.0908573932 + 0.1987446318
    p = p * t + 0.0847112676
    p = p * t + 0.1579140741
    p = p * t + 0.1494775642
    return a, p * t


@triton.jit
def _held(x, BOUND: tl.constexpr):
    """x between -BOUND and BOUND; of NaN either, so that the other factor must be NaN."""
    return tl.minimum(tl.maximum(x, -BOUND), BOUND)


@triton.jit
def _sigmoid(x, HALF: tl.constexpr):
    return _reciprocal(1.0 + _exp2(x * -1.4426950408889634)) if HALF else tl.sigmoid(x)


@triton.jit
def _tanh_argument(x):
    # twice the argument of tanh in the tanh form: (1 + tanh(u)) / 2 = sigmoid(2u)
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def activate(x, NAME: tl.constexpr, HALF: tl.constexpr):
    """act(x); GELU is the exact (erf) form."""
    if NAME == "gelu":
        if HALF:
            a, p = _tail_factor(x)
            y = tl.maximum(x, 0.0) - a * (p * _bell(x))
        else:
            y = 0.5 * tl.maximum(x, -16.0) * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = tl.maximum(x, -16.0) * _sigmoid(_tanh_argument(x), HALF)
    elif NAME == "silu":
        y = tl.maximum(x, -128.0) * _sigmoid(x, HALF)
    elif NAME == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif NAME == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    else:
        tl.static_assert(NAME == "identity")
        y = x
    return y


@triton.jit
def activate_grad(x, NAME: tl.constexpr, HALF: tl.constexpr):
    """act'(x)."""
    if NAME == "gelu":
        if HALF:
            a, p = _tail_factor(x)
            below = (p - a * 0.3989422804014327) * _bell(x)  # at -a
            y = tl.where(x < 0, below, 1.0 - below)
        else:
            density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
            y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + tl.where(density > 0.0, x * density, 0.0)
    elif NAME == "gelu_tanh":
        s = _sigmoid(_tanh_argument(x), HALF)
        held = _held(x, 16.0)
        y = s + held * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * held * held)
    elif NAME == "silu":
        s = _sigmoid(x, HALF)
        y = s * (1.0 + _held(x, 128.0) * (1.0 - s))
    elif NAME == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "relu2":
        y = tl.where(x > 0, 2.0 * x, 0.0)
    else:
        tl.static_assert(NAME == "identity")
        y = tl.full(x.shape, 1.0, tl.float32)
    return y
