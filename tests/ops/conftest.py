"""Every test of an op runs once with each backend; Triton in its interpreter where there is no GPU."""

import pytest
import torch

from moebert_kernels import backend
from tests.backends import KERNEL_BACKENDS, deselect, runs_here
from tests.tiny_tiles import use_tiny_tiles


@pytest.fixture(params=["torch", *KERNEL_BACKENDS], autouse=True)
def implementation(request, monkeypatch):
    """The backend under test. Triton's tiles are the smallest there are, so that small tensors have several."""
    if request.param != "torch":  # CUDA forms launch kernels of Triton too
        pytest.importorskip("triton")
        use_tiny_tiles(monkeypatch)
        if torch.cuda.is_available():
            torch.set_default_device("cuda")
    with backend.use_backend(request.param, strict=True):
        yield request.param
    torch.set_default_device(None)


TORCH_ALONE = ("test_rejects", "test_gradcheck", "test_a_masked_central_tensor")  # checks, float64, GEMMs of torch


def pytest_collection_modifyitems(config, items):
    """What kernels' tests leave out: float64, which they do not compute, and what is of torch alone or takes Triton's
    interpreter minutes."""

    def wanted(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        chosen = parameters.get("implementation", "torch")
        many = parameters.get("count", 0) > 40
        # opaque ops are the same with any backend, and here the kernels in them would take the time
        opaque = ("opcheck" in item.name or "compile" in item.name) and not torch.cuda.is_available()
        if chosen != "torch" and parameters.get("dtype") == torch.float64:
            return False
        if chosen != "torch" and item.originalname.startswith(TORCH_ALONE):
            return False
        return runs_here(item) and not (chosen == "triton" and (many or opaque))

    deselect(config, items, wanted)
