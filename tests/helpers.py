"""What several tests share: the accuracy bound of every op, and where data outside the repository lies."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def assert_same_model(got: nn.Module, wanted: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Fail unless `got` has bitwise the state of `wanted`, as after saving and loading, and computes as accurately.

    Outputs are not compared bitwise: loaded tensors lie at other addresses, and matrix products of some CPUs sum in an
    order that depends on the alignment.

    Args:
        run: gives the output of a model, or several by name; called in float64 too.
    """
    states = got.state_dict(), wanted.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert tensor.dtype == states[1][key].dtype and torch.equal(tensor, states[1][key]), key
    assert got.training == wanted.training
    with torch.no_grad():
        outputs = [run(model) for model in (got, wanted, copy.deepcopy(wanted).double())]
    one, same_dtype, exact = ({"output": out} if isinstance(out, Tensor) else out for out in outputs)
    assert one.keys() == same_dtype.keys() == exact.keys()
    for name in one:
        assert_as_accurate(one[name], same_dtype[name], exact[name], name)


def misaligned(model: nn.Module, by: int = 1) -> nn.Module:
    """The model itself, with each parameter `by` elements behind an address that torch would choose, as in a file."""
    for parameter in model.parameters():
        room = torch.empty(parameter.numel() + by, dtype=parameter.dtype)
        parameter.data = room[by:].view(parameter.shape).copy_(parameter.data)
    return model


def shared_path(relative: str) -> Path:
    """Path of data that is not part of the repository, in a folder next to it; skips the test where it is missing."""
    path = ROOT.parent / "shared" / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}, which is not part of the repository")
    return path


def checkpoint_activations(model, *options) -> None:
    """Turn gradient checkpointing on. transformers 5.17 has the older name alone, which later ones warn of."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(*options)
