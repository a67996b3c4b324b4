"""The accuracy bound itself: what it lets through and what it does not; and that forgotten stores show."""

import pytest
import torch

from tests.helpers import assert_as_accurate, shared_path


def test_as_accurate_as_plain_torch_passes():
    exact = torch.randn(64, 32, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_as_accurate(exact.to(dtype), exact.to(dtype), exact, "y")


def test_empty_passes():
    empty = torch.zeros(0, 3)
    assert_as_accurate(empty, empty, empty.double(), "y")


def test_one_wrong_value_fails_by_name_and_place():
    exact = torch.randn(64, 32, dtype=torch.float64)
    got = exact.float()
    got[3, 7] += 1e-3
    with pytest.raises(AssertionError, match=r"dw1: error 1\.0\d+e-03 at \(3, 7\)"):
        assert_as_accurate(got, exact.float(), exact, "dw1")


def test_nan_and_wrong_shape_fail():
    exact = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="y: 1 values are not finite"):
        assert_as_accurate(torch.tensor([1.0, 1.0, float("nan"), 1.0]), exact.float(), exact, "y")
    with pytest.raises(AssertionError, match="y: shapes differ"):
        assert_as_accurate(torch.ones(1, 4), exact.float(), exact, "y")


def test_uninitialised_memory_is_nan():
    x = torch.zeros(2, 3)
    for tensor in (torch.empty(5), torch.empty_like(x), torch.empty_strided((2, 2), (2, 1)), x.new_empty(2)):
        assert tensor.isnan().all()
    assert torch.empty(3, dtype=torch.int64).shape == (3,)


def test_missing_shared_data_skips():
    with pytest.raises(pytest.skip.Exception, match="no-such-folder"):
        shared_path("no-such-folder")
