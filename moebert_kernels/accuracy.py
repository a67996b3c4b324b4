"""How far a fast path may be from the truth: the bound that tests, benchmarks and `moebert doctor` share."""

from __future__ import annotations

import torch
from torch import Tensor


def error_and_bound(got: Tensor, same_dtype: Tensor, exact: Tensor, factor: float = 2.0) -> tuple[Tensor, float]:
    """Errors of `got`, and the largest that is allowed: about plain torch's own error in the same dtype.

    The bound is factor * max|same_dtype - exact| + 4 eps(dtype) max|exact|: no guessed tolerance, and it tightens by
    itself where plain torch is exact.

    Args:
        got: what the fast path computed, any floating dtype.
        same_dtype: the reference run in the dtype of `got`.
        exact: the reference run in float64 on the same inputs.
        factor: slack over plain torch's own error.

    Returns:
        |got - exact|, float64, shape of `exact` (NaN where `got` is), and the bound.
    """
    exact = exact.detach().double()
    error = (got.detach().double() - exact).abs()
    if exact.numel() == 0:
        return error, 0.0
    own_error = (same_dtype.detach().double() - exact).abs().max()
    return error, float(factor * own_error + 4 * torch.finfo(got.dtype).eps * exact.abs().max())
