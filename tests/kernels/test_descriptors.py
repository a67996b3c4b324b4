"""The GEMM that TMA reads for: the same numbers as by pointers, with programs that take many tiles."""

import pytest
import torch

pytest.importorskip("triton")

from moebert_kernels import group_tokens
from moebert_kernels.kernels import config
from moebert_kernels.kernels import expert_gemm as kernels
from moebert_kernels.kernels.config import Config, Device
from moebert_kernels.kernels.fused_moe_ffn import hidden
from moebert_kernels.kernels.fused_moe_ffn_backward import hidden_backward

E, T = 3, 42
TILE = Config(16, 32, 16, 4, 2)
LARGE = Config(128, 128, 64, 8, 3), Device(90, 132)  # a tile that TMA reads for, and where
ROUTINGS = {
    "even": torch.arange(T) % E,
    "skewed": torch.where(torch.arange(T) < 30, 2, 0),  # 1 has no rows
    "skipped": torch.arange(T) % (E + 1) - 1,
    "none": torch.full((T,), -1),
}


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(Device, "of", staticmethod(lambda _: Device(90, 2)))


def product(N, K, transposed, dtype, device):
    """Rows and weights whose other memory is NaN."""
    a = torch.full((T, K + 8), torch.nan, dtype=dtype, device=device)[:, :K]
    shape = (E, K, N + 8) if transposed else (E, N, K + 8)
    w = torch.full(shape, torch.nan, dtype=dtype, device=device)
    w = w[:, :, :N].transpose(1, 2) if transposed else w[:, :, :K]
    a.normal_(), w.normal_()
    return a, w


def both(a, w, grouping, **options):
    """By pointers, by descriptors."""
    results = []
    for descriptors in (False, True):
        y = a.new_empty(T, w.shape[1])
        kernels.expert_gemm(a, w, y, grouping, config=TILE, descriptors=descriptors, **options)
        results.append(y)
    return results


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("N", "K", "transposed"), [(64, 32, False), (40, 24, False), (40, 24, True)])
def test_is_what_pointers_give(routing, N, K, transposed, hopper, device):
    grouping = group_tokens(ROUTINGS[routing].to(device), E)
    a, w = product(N, K, transposed, torch.bfloat16, device)
    assert kernels.can_be_described(a, w, *LARGE)
    bias = torch.randn(E, N, dtype=a.dtype, device=device)
    by_pointers, by_descriptors = both(a, w, grouping, bias=bias)
    assert torch.equal(by_pointers, by_descriptors) and by_descriptors.isfinite().all()


@pytest.mark.parametrize("routing", ["skewed", "skipped"])
def test_epilogue(routing, hopper, device):
    grouping = group_tokens(ROUTINGS[routing].to(device), E)
    a, w = product(40, 24, True, torch.float16, device)
    residual, skipped = torch.randn(2, T, 40, dtype=a.dtype, device=device)
    weights = torch.rand(T, 1, dtype=a.dtype, device=device)
    options = {"weights": weights, "residual": residual, "skipped": skipped, "scatter": True}
    by_pointers, by_descriptors = both(a, w, grouping, **options)
    assert torch.equal(by_pointers, by_descriptors)


@pytest.mark.parametrize(("routing", "weighted"), [("skewed", False), ("skipped", True)])
def test_gradient_of_hidden(routing, weighted, hopper, device):
    grouping = group_tokens(ROUTINGS[routing].to(device), E)
    dy, w = product(40, 24, True, torch.bfloat16, device)
    h_pre = torch.randn(T, 40, dtype=dy.dtype, device=device)
    weights = torch.rand(T, 1, dtype=dy.dtype, device=device) if weighted else None
    results = []
    for descriptors in (False, True):
        dh_pre, a = torch.zeros(2, T, 40, dtype=dy.dtype, device=device)
        parts = torch.zeros(T, 2, device=device)
        hidden_backward(
            dy, w.mT, h_pre, dh_pre, a, weights, parts if weighted else None, grouping, "gelu", 0.0, None,
            gather=False, config=TILE, descriptors=descriptors,
        )  # fmt: skip
        results.append((dh_pre, a, parts))
    assert all(torch.equal(by_pointers, by_tma) for by_pointers, by_tma in zip(*results, strict=True))
    assert results[0][0].any()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_hidden(activation, hopper, device):
    grouping = group_tokens(ROUTINGS["skipped"].to(device), E)
    x, w = product(40, 24, False, torch.bfloat16, device)
    bias, results = torch.randn(E, 40, dtype=x.dtype, device=device), []
    for descriptors in (False, True):
        h, h_pre = x.new_full((2, T, 40), 7.0)
        hidden(x, w, bias, h, h_pre, grouping, activation, 0.0, None, TILE, gather=False, descriptors=descriptors)
        results.append((h, h_pre))
    assert all(torch.equal(by_pointers, by_tma) for by_pointers, by_tma in zip(*results, strict=True))
    assert all((t[int(grouping.offsets[-1]) :] == 7).all() for t in results[0])  # rows without an expert: not written


def test_what_tma_cannot_read(device):
    a, w = product(40, 24, False, torch.bfloat16, device)
    assert kernels.can_be_described(a, w, *LARGE) and kernels.can_be_described(
        a, w.transpose(1, 2).contiguous().mT, *LARGE
    )
    assert not kernels.can_be_described(a.float(), w.float(), *LARGE)
    assert not kernels.can_be_described(a[:, 1:], w[:, :, 1:], *LARGE)  # begins at 2 bytes
    assert not kernels.can_be_described(a[:, ::2], w[:, :, ::2], *LARGE)
    odd = torch.randn(T, 25, dtype=a.dtype, device=device)[:, :24]
    assert not kernels.can_be_described(odd, w, *LARGE) and not kernels.can_be_described(a, w[:, :, :0], *LARGE)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_is_chosen_on_hopper_for_large_tiles_of_ungathered_rows(arch, device, monkeypatch):
    launched = []
    monkeypatch.setattr(Device, "of", staticmethod(lambda _: Device(arch, 132)))
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *_: launched.append((kernel, grid)))
    a, w = product(64, 32, False, torch.bfloat16, device)
    grouping = group_tokens(ROUTINGS["even"].to(device), E)
    tile = config.CANDIDATES["half"]["rows"][5]
    for options in ({}, {"gather": True}, {"config": TILE}):
        kernels.expert_gemm(a, w, a.new_empty(T, 64), grouping, **({"config": tile} | options))
    names = [kernel.fn.__name__ for kernel, _ in launched]
    described = "_expert_gemm_descriptors_kernel" if arch == 90 else "_expert_gemm_kernel"
    assert names == [described, "_expert_gemm_kernel", "_expert_gemm_kernel"]
