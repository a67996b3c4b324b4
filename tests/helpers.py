"""What several tests share: the accuracy bound of every op, and where data outside the repository lies."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moebert_kernels.accuracy import error_and_bound

ROOT = Path(__file__).resolve().parent.parent


def assert_as_accurate(got: Tensor, same_dtype: Tensor, exact: Tensor, name: str, factor: float = 2.0) -> None:
    """Fail unless `got` is about as close to the truth as plain torch is in the same dtype.

    Args:
        got: what the fast path computed, any floating dtype.
        same_dtype: the reference run in the dtype of `got`.
        exact: the reference run in float64 on the same inputs.
        name: names the tensor in the message, e.g. "dw1".
        factor: slack over plain torch's own error; 3 only for bfloat16 in Triton's interpreter.
    """
    assert got.shape == same_dtype.shape == exact.shape, (
        f"{name}: shapes differ: {tuple(got.shape)}, {tuple(same_dtype.shape)}, {tuple(exact.shape)}"
    )
    assert got.dtype == same_dtype.dtype, f"{name}: dtypes differ: {got.dtype}, {same_dtype.dtype}"
    not_finite = int((~torch.isfinite(got.detach())).sum())
    assert not_finite == 0, f"{name}: {not_finite} values are not finite"
    if got.numel() == 0:
        return
    error, bound = error_and_bound(got, same_dtype, exact, factor)
    worst = int(error.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    values = f"got {got.flatten()[worst]:.6g}, exact {exact.flatten()[worst]:.6g}"
    assert error.max() <= bound, f"{name}: error {error.max():.3e} at {place}, {values}, bound {bound:.3e}"


def shared_path(relative: str) -> Path:
    """Path of data that is not part of the repository, in a folder beside it; skips the test where it is missing."""
    path = ROOT.parent / "shared" / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}, which is not part of the repository")
    return path


def checkpoint_activations(model, *options) -> None:
    """Turn gradient checkpointing on. transformers 5.17 has the older name alone, which later ones warn of."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(*options)
