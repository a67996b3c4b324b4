"""Launching by a key: the launch is the one that Triton would make, and whatever is not covered goes through Triton."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from moebert_kernels.kernels import launch
from tests.helpers import ROOT


class Kernel:
    """Stands for a JIT function with one constant, BLOCK."""

    arg_names = ("X", "Y", "N", "BLOCK")
    fn = SimpleNamespace(__name__="kernel")

    def __init__(self):
        self.through_triton, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.through_triton.append((grid, arguments, constants))
            return SimpleNamespace(run=lambda *a: self.launched.append(a), function=7, packed_metadata=8)

        return run


@pytest.fixture
def kernel(monkeypatch):
    device = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 40 + device)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=device))
    monkeypatch.setattr(launch, "_INTERPRETED", False)
    return Kernel()


def call(launcher, x, y, key="key"):
    launcher(key, (x, y), lambda: ((2, 5), (x, y, x.numel()), {"BLOCK": 16}))


def test_the_second_launch_of_a_key_puts_new_addresses_into_the_first(kernel):
    launcher = launch.Launcher(kernel)
    x, y, other = (torch.zeros(64) for _ in range(3))
    call(launcher, x, y)
    assert kernel.through_triton == [((2, 5), (x, y, 64), {"BLOCK": 16})] and kernel.launched == []
    call(launcher, other, y)
    assert len(kernel.through_triton) == 1
    expected = (2, 5, 1, 43, 7, 8, None, None, None, other.data_ptr(), y.data_ptr(), 64, 16)
    assert kernel.launched == [expected]
    call(launcher, x, y, key="another")
    assert len(kernel.through_triton) == 2


def test_a_null_pointer_stays_one(kernel):
    launcher, x = launch.Launcher(kernel), torch.zeros(64)
    for _ in range(2):
        launcher("key", (x, None), lambda: ((1,), (x, None, 64), {"BLOCK": 16}))
    assert kernel.launched[0][9:] == (x.data_ptr(), None, 64, 16)


def test_addresses_that_are_not_aligned_go_through_triton(kernel):
    launcher, x = launch.Launcher(kernel), torch.zeros(65)
    for tensors in ((x, x[1:]), (x, x[1:]), (x, x), (x, x), (x, x[1:])):
        call(launcher, *tensors)
    assert len(kernel.through_triton) == 4 and len(kernel.launched) == 1


def test_hooks_go_through_triton(kernel, monkeypatch):
    launcher, x = launch.Launcher(kernel), torch.zeros(64)
    call(launcher, x, x)
    monkeypatch.setattr(launch.triton.knobs.runtime.launch_enter_hook, "calls", [print])
    call(launcher, x, x)
    assert len(kernel.through_triton) == 2 and kernel.launched == []


def test_tensors_in_another_order_are_noticed(kernel):
    launcher, x, y = launch.Launcher(kernel), torch.zeros(64), torch.zeros(64)
    with pytest.raises(AssertionError, match="kernel: the tensors are not those of the arguments"):
        launcher("key", (y, x), lambda: ((1,), (x, y, 64), {"BLOCK": 16}))


def test_keys_do_not_grow_without_end(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_KEYS", 3)
    launcher, x = launch.Launcher(kernel), torch.zeros(64)
    for key in range(10):
        call(launcher, x, x, key)
    assert len(launcher._ready) <= 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_launch_by_key_is_tritons_own():
    """Of all ops over many shapes, strides, dtypes and options."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launch_by_key"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    launches, by_key = map(int, done.stdout.split())
    assert by_key > 100 and launches > by_key
