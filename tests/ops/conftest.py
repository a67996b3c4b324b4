"""Every test of an op runs once with each backend; Triton in its interpreter where there is no GPU."""

import pytest
import torch

from moebert_kernels import backend
from tests.tiny_tiles import use_tiny_tiles


@pytest.fixture(params=["torch", "triton"], autouse=True)
def implementation(request, monkeypatch):
    """The backend under test. Triton's tiles are the smallest there are, so that small tensors have several."""
    if request.param == "triton":
        pytest.importorskip("triton")
        use_tiny_tiles(monkeypatch)
        if torch.cuda.is_available():
            torch.set_default_device("cuda")
    with backend.use_backend(request.param, strict=True):
        yield request.param
    torch.set_default_device(None)


def pytest_collection_modifyitems(config, items):
    """What Triton's tests leave out: float64, which it does not compute, and what its interpreter takes minutes for."""

    def wanted(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("implementation") != "triton":
            return True
        many = parameters.get("count", 0) > 40 or item.originalname == "test_any_shape"  # tests/kernels has its own
        return parameters.get("dtype") != torch.float64 and not many

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]
