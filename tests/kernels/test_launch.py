"""Recorded calls: what is repeated is what the function would do, and what a plan cannot hold runs the function."""

import ast
import gc
import os
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from moebert_kernels import (
    backend,
    expert_gemm,
    fused_moe_ffn,
    fused_moe_ffn_add_norm,
    group_tokens,
    group_tokens_by_hash,
    reference,
)
from moebert_kernels.kernels import launch
from moebert_kernels.kernels.launch import empty, forget, made, recorded
from moebert_kernels.triton_backend import expert_gemm as triton_expert_gemm
from tests.helpers import ROOT


@triton.jit
def _add_kernel(X, Y, Z, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(X + at, mask=at < N, other=0.0) + tl.load(Y + at, mask=at < N, other=0.0)
    tl.store(Z + at, total, mask=at < N)


def add(x, y, z):
    launch.launch(_add_kernel, (triton.cdiv(x.numel(), 16),), (x, y, z, x.numel()), {"BLOCK": 16})


@pytest.fixture
def runs():
    return []


@pytest.fixture
def twice(runs):
    """x + y, and (x + y) + y; `runs` counts those that were not repeated."""

    @recorded
    def function(x, y):
        runs.append(x.shape)
        z = empty(x, 2, x.numel())
        add(x, made(Tensor.contiguous, y), z[0])
        add(z[0], made(Tensor.contiguous, y), z[1])
        return [z, None]

    return function


Tensor = torch.Tensor


def check(function, x, y):
    z, nothing = function(x, y)
    assert nothing is None and torch.equal(z, torch.stack([x + y, x + y + y]))


def test_a_call_with_the_same_layout_is_repeated(twice, runs, device):
    for _ in range(3):
        check(twice, torch.randn(64, device=device), torch.randn(64, device=device))
    assert len(runs) == 1
    check(twice, torch.randn(32, device=device), torch.randn(32, device=device))
    check(twice, torch.randn(64, device=device), torch.randn(64, 2, device=device)[:, 0])
    check(twice, torch.randn(64, device=device), torch.randn(64, 2, device=device)[:, 0])
    assert len(runs) == 3


def test_addresses_that_are_not_aligned_run_the_function(twice, runs, device):
    x, y = torch.randn(64, device=device), torch.randn(65, device=device)
    for other in (y[:64], y[1:], y[1:], y[:64]):
        check(twice, x, other)
    assert len(runs) == 3


def test_the_maps_of_every_layer_may_begin_anywhere(device):
    """Those of all layers are in one tensor each."""
    tables = torch.randint(0, 4, (3, 50), device=device)
    groupings = group_tokens_by_hash(torch.randint(0, 50, (37,), device=device), tables, 4)
    assert any(grouping.offsets.data_ptr() % 16 for grouping in groupings)
    x, w = torch.randn(37, 24, device=device), torch.randn(4, 16, 24, device=device)
    forget()
    for grouping in groupings:
        y = triton_expert_gemm.forward(x, w, None, grouping, True)
        torch.testing.assert_close(y, reference.expert_gemm(x, w, grouping, gather=True))
    assert len(triton_expert_gemm.forward.ready) == 1


def test_a_call_whose_arguments_overlap_is_not_kept(twice, runs, device):
    x = torch.randn(64, device=device)
    check(twice, x, x)
    check(twice, x, torch.randn(64, device=device))
    check(twice, x, torch.randn(64, device=device))
    assert len(runs) == 2


def test_hooks_run_the_function(twice, runs, device, monkeypatch):
    x, y = torch.randn(64, device=device), torch.randn(64, device=device)
    check(twice, x, y)
    monkeypatch.setattr(launch.triton.knobs.runtime.launch_enter_hook, "calls", [print])
    check(twice, x, y)
    assert len(runs) == 2


def test_what_torch_computed_unseen_is_not_kept(runs, device):
    @recorded
    def function(x):
        runs.append(x)
        z = empty(x, x.numel())
        add(x, x + 1, z)
        return z

    @recorded
    def unknown_output(x):
        runs.append(x)
        return x + 1

    for _ in range(2):
        x = torch.randn(64, device=device)
        assert torch.equal(function(x), x + (x + 1)) and torch.equal(unknown_output(x), x + 1)
    assert len(runs) == 4


def test_a_recorded_function_is_part_of_another(twice, runs, device):
    @recorded
    def outer(x, y):
        return twice(x, y)[0]

    for _ in range(2):
        x, y = torch.randn(64, device=device), torch.randn(64, device=device)
        assert torch.equal(outer(x, y)[1], x + y + y)
    assert len(runs) == 1 and len(twice.ready) == 0 and len(outer.ready) == 1


def test_an_error_ends_the_recording(device):
    @recorded
    def function(x):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        function(torch.zeros(16, device=device))
    assert launch._local.recording is None and not function.ready


def test_keys_do_not_grow_without_end(twice, device, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_KEYS", 3)
    for size in range(16, 32):
        check(twice, torch.randn(size, device=device), torch.randn(size, device=device))
    assert len(twice.ready) <= 3


def test_a_launch_gives_the_compiled_kernel_new_addresses(monkeypatch):
    """What no interpreter shows: the arguments of Triton's launcher, the stream, and memory for descriptors."""
    launched, allocators = [], []
    monkeypatch.setattr(launch, "_stream", lambda device: 40)

    def run(*arguments):
        launched.append(arguments)
        allocators.append(triton.runtime._allocation._allocator.get())

    for scratch in (0, 128):
        compiled = SimpleNamespace(
            run=run, function=7, packed_metadata=8, metadata=SimpleNamespace(global_scratch_size=scratch)
        )
        kernel = SimpleNamespace(arg_names=("X", "Y", "Z", "N", "BLOCK"))
        x, z = torch.zeros(64), torch.zeros(2, 64)
        recording = launch.Recording([x, z])
        recording.launched(launch._Launch(kernel, compiled, (4, 1, 1), (x, None, z[1], 64), {"BLOCK": 16}))
        assert recording.plan((z,)).run([x, z], [1024, 2048], 0) == (z,)
        assert launched.pop() == (4, 1, 1, 40, 7, 8, None, None, None, 1024, None, 2048 + 4 * 64, 64, 16)
    null = triton.runtime._allocation.NullAllocator
    assert isinstance(allocators[0], null) and not isinstance(allocators[1], null)
    assert isinstance(triton.runtime._allocation._allocator.get(), null)  # the caller's stays


def test_products_and_sums_are_fused_whatever_triton_does_unasked():
    asked = {}
    launch.launch({(4,): lambda *arguments, **options: asked.update(options)}, (4,), (), {"BLOCK": 16})
    assert asked == {"BLOCK": 16, "enable_fp_fusion": True}


def test_a_plan_keeps_the_compiled_kernel():
    """Its launcher and its function do not, and Triton unloads a kernel that nothing holds."""

    class Compiled:
        run, function, packed_metadata, metadata = print, 7, 8, SimpleNamespace(global_scratch_size=0)

    x, compiled = torch.zeros(64), Compiled()
    alive, recording = weakref.ref(compiled), launch.Recording([x])
    recording.launched(launch._Launch(SimpleNamespace(arg_names=("X",)), compiled, (4, 1, 1), (x,), {}))
    plan = recording.plan(x)
    del compiled, recording
    gc.collect()
    assert alive() is not None, plan


def calls(device):
    """Name -> an op's call on new numbers: outputs and gradients."""
    E, T, H, I = 2, 12, 16, 16

    def leaves(*shapes):
        return [torch.randn(shape, device=device).requires_grad_() for shape in shapes]

    def differentiated(op, inputs, *options, **keywords):
        y = op(*inputs[:1], *options, *inputs[1:], **keywords)
        return [y, *torch.autograd.grad(y, inputs, torch.randn_like(y))]

    def grouping(top_k=1):
        return group_tokens(torch.randint(-1, E, (T, top_k), device=device), E)

    ffn = ((T, H), (E, I, H), (E, I), (E, H, I), (E, H))
    return {
        "grouping": lambda: [grouping().offsets, grouping().assignment_to_row],
        "ffn": lambda: differentiated(fused_moe_ffn, leaves(*ffn), grouping()),
        "top_2": lambda: differentiated(
            fused_moe_ffn, leaves(*ffn), grouping(2), routing_weights=torch.rand(2, T, device=device).t()
        ),
        "add_norm": lambda: differentiated(
            fused_moe_ffn_add_norm, leaves(*ffn, (E, H), (E, H)), grouping(), dropout_p=0.5,
            dropout_seed=torch.tensor(int(torch.randint(99, ())), device=device),
        ),
        "expert_gemm": lambda: differentiated(
            lambda x, g, w, b: expert_gemm(x, w, g, b, gather=True), leaves((T, H), (E, I, H), (E, I)), grouping()
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", ["grouping", "ffn", "top_2", "add_norm", "expert_gemm"])
def test_ops_give_the_right_numbers_when_they_are_repeated(op, device, monkeypatch):
    run, repeated = launch._Plan.run, []
    monkeypatch.setattr(launch._Plan, "run", lambda self, *args: repeated.append(1) or run(self, *args))
    for seed in range(2):
        results = {}
        for name in ("torch", "triton"):
            torch.manual_seed(seed)
            with backend.use_backend(name, strict=True):
                results[name] = calls(device)[op]()
        for got, wanted in zip(results["triton"], results["torch"], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert repeated


def test_kernels_are_launched_where_a_recording_sees_it():
    """A kernel that Triton launches alone, or memory that torch gives, would be missing when a call is repeated."""
    folder = ROOT / "moebert_kernels"
    for path in (folder / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
                assert not node.value.id.endswith("_kernel"), f"{path.name}:{node.lineno}"
    for path in (folder / "triton_backend").glob("*.py"):
        if path.stem != "mpo_expert_weights":  # which is not recorded
            assert not re.findall(r"new_empty|empty_like|\.contiguous\(|\.clone\(", path.read_text()), path.name


def test_what_is_not_returned_is_one_piece_of_memory(monkeypatch):
    compiled = SimpleNamespace(
        run=lambda *arguments: launched.append(arguments[9:]), function=7, packed_metadata=8,
        metadata=SimpleNamespace(global_scratch_size=0),
    )  # fmt: skip
    kernel = SimpleNamespace(arg_names=("A", "B", "C", "D"))
    launched, (x, a, b, y) = [], (torch.zeros(size) for size in (5, 7, 200, 3))
    recording = launch.Recording([x])
    for tensor in (a, b, y):
        recording.add(tensor)
    recording.launched(launch._Launch(kernel, compiled, (1, 1, 1), (x, a, b[50:], y), {}))
    plan = recording.plan((y, None))
    monkeypatch.setattr(launch, "_INTERPRETED", True)
    other = torch.zeros(5)
    result, nothing = plan.run([other], [other.data_ptr()], 0)
    of_x, of_a, of_b, of_y = launched[0]
    assert (of_x, of_y) == (other.data_ptr(), result.data_ptr()) and result.shape == (3,) and nothing is None
    assert of_b == of_a + 512 + 4 * 50


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_repeated_launch_is_tritons_own():
    """Of all ops over many shapes, strides, dtypes and options."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launch_by_key"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    calls, repeated = map(int, done.stdout.split())
    assert repeated > 100 and calls > repeated
