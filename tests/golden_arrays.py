"""The arrays of tests/golden, computed by the original code; see the README there."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent / "golden"


def golden(name: str, prefix: str = "") -> dict[str, Tensor]:
    """Arrays of one file whose key starts with `prefix`, without it."""
    arrays = load_file(_FOLDER / f"{name}.safetensors")
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def assert_golden(got: Tensor, wanted: Tensor, tolerance: float = 2e-5, name: str = "") -> None:
    """Fail unless the largest difference is within `tolerance` of the largest wanted value."""
    assert got.shape == wanted.shape, f"{name}: expected shape {tuple(wanted.shape)}, got {tuple(got.shape)}"
    error = (got.double() - wanted.double()).abs().max().item()
    bound = tolerance * max(wanted.double().abs().max().item(), 1e-30)
    assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}"
