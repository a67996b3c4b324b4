"""Checks that the routers share: UserError for what a person configured, ValueError for what a caller passes."""

from __future__ import annotations

import math

from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.ops._checks import FLOATS, check_mask, check_tensor, is_number


def check_sizes(**sizes: int) -> None:
    """Raise a UserError for a size that is not an integer of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name}: expected an integer of at least 1, got {value!r}")


def check_noise_and_capacity(jitter: float, noise: float, **capacity_factors: float | None) -> None:
    """Raise a UserError for a value out of its range."""
    if not is_number(jitter) or not 0 <= jitter < 1:
        raise UserError(f"jitter: expected a number in [0, 1), got {jitter!r}")
    if not is_number(noise) or not 0 <= noise < math.inf:
        raise UserError(f"noise: expected a finite standard deviation of at least 0, got {noise!r}")
    for name, value in capacity_factors.items():
        if value is not None and not (is_number(value) and 0 < value < math.inf):
            raise UserError(f"{name}: expected a finite number above 0 or None, got {value!r}")


def check_gate_inputs(gate: nn.Linear, x: Tensor, attention_mask: Tensor | None, dims: int | None = None) -> None:
    """Check x (..., H) against `gate`, its number of dimensions if `dims` is given, and the mask of its tokens."""
    check_tensor("x", x)
    hidden = gate.in_features
    if x.ndim < 1 or x.shape[-1] != hidden or (dims is not None and x.ndim != dims):
        leading = "B, T" if dims == 3 else "..."
        raise ValueError(f"x: expected shape ({leading}, H={hidden}), got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x: expected dtype {', '.join(str(d) for d in FLOATS)}, got {x.dtype}")
    if x.device != gate.weight.device and not gate.weight.is_meta:  # offloaded: accelerate loads it when it runs
        raise ValueError(f"x: expected device {gate.weight.device} (as the gate), got {x.device}")
    check_mask(attention_mask, "x without H", x[..., 0])
