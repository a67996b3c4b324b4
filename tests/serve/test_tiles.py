"""The kernel for all experts of a layer: against the reference, with AMX and without it, and where it cannot run."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moebert_kernels import group_tokens
from moebert_kernels.activation import ACTIVATIONS
from moebert_kernels.errors import UserError
from moebert_kernels.layers import NormedExperts
from moebert_kernels.nn import DenseExperts
from moebert_kernels.serve import describe, prepare, tiles
from moebert_kernels.serve.dtypes import input_dtype
from moebert_kernels.serve.experts import PackedExperts
from moebert_kernels.serve.packed import converted, pack
from tests.convert.families import make_inputs
from tests.serve.emulated import run_by
from tests.serve.problems import TILES, Problem
from tests.serve.test_prepare import made, run

DTYPES = ("bfloat16", "int8", "int8-token", "int8-bfloat16")
WAYS = [(dtype, amx) for dtype in DTYPES for amx in (True, False)]
here = pytest.mark.skipif(tiles.unavailable("int8") is not None, reason=f"tiles: {tiles.unavailable('int8')}")


@pytest.fixture
def way(dtype, amx, monkeypatch):
    """This dtype in the kernel, by AMX or by AVX-512."""
    run_by(amx, dtype, monkeypatch)
    return dtype


@here
@pytest.mark.parametrize("dtype, amx", WAYS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_random_problems(way, threads):
    """Few chunks are shared out among the threads, many are not."""
    torch.set_num_threads(threads)
    for seed in range(40):
        dataclasses.replace(Problem.draw(seed, way), engine=TILES).check()


def normed(H, I, E, dtype, activation="gelu"):
    """Experts with residual and norm, and random numbers in all of them."""
    experts = NormedExperts(H, I, E, activation=activation, bias="expert", eps=1e-5).to(input_dtype(dtype)).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return experts


@here
@pytest.mark.parametrize("dtype, amx", WAYS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_uneven_sizes(way, activation):
    experts = normed(72, 45, 3, way, activation)
    x = torch.randn(90, 72).to(input_dtype(way))
    Problem(way, TILES, experts, x, torch.randint(-1, 3, (90,)), None).check()


@here
@pytest.mark.parametrize("dtype, amx", WAYS)
@pytest.mark.parametrize("threads", [1, 3])
def test_more_rows_than_a_chunk_holds(way, threads):
    """All tokens in one expert: several chunks, the last one smaller."""
    torch.set_num_threads(threads)
    experts = normed(128, 640, 2, way)
    x = torch.randn(1300, 128).to(input_dtype(way))
    Problem(way, TILES, experts, x, torch.zeros(1300, dtype=torch.long), None).check()


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_what_was_packed_comes_back(dtype, activation):
    if reason := tiles.unavailable(dtype):
        pytest.skip(reason)
    experts = normed(40, 24, 3, dtype, activation)
    buffers = dict(PackedExperts.of(experts, dtype)._buffers)
    packed = PackedExperts.of(experts, dtype)
    packed.pack(lambda *_: TILES)
    x, ids = torch.randn(50, 40).to(input_dtype(dtype)), torch.randint(0, 3, (50,))
    expected = packed(x, ids)
    for one in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        found = one.state_dict()
        assert found.keys() == buffers.keys()
        for name, tensor in found.items():
            assert tensor.dtype == buffers[name].dtype and torch.equal(tensor, buffers[name]), name
        assert torch.equal(one(x, ids), expected)
    assert "engine=tiles" in repr(packed)


@here
def test_inputs_that_the_kernel_cannot_read():
    """It reads and writes where it is told to."""
    experts = PackedExperts.of(normed(40, 24, 3, "int8"), "int8")
    experts.pack(lambda *_: TILES)
    ids = torch.randint(0, 3, (6,))
    linear = pack(TILES, converted(torch.randn(33, 40), None, "int8"), torch.float32)
    for x in (torch.randn(6, 40, dtype=torch.float64), torch.randn(6, 20), torch.randn(6, 40, device="meta")):
        with pytest.raises(ValueError, match=r"x: expected torch.float32 \(..., 40\) on the CPU in this prepared"):
            linear(x)
        with pytest.raises(ValueError, match=r"x: expected"):
            experts(x, group_tokens(ids, 3))
    with pytest.raises(ValueError, match="routing: expected a Grouping of 6 tokens to 3 experts, got one of 5 to 3"):
        experts(torch.randn(6, 40), group_tokens(ids[:5], 3))
    with pytest.raises(RuntimeError, match="can be neither traced nor exported; prepare the model with MOEBERT_KERN"):
        torch.jit.trace(linear.linear.__call__, torch.randn(6, 40))
    with pytest.raises(RuntimeError, match="can be neither traced nor exported"), FakeTensorMode():
        linear(torch.randn(6, 40))


@here
def test_large_pre_activations_and_nan():
    """exp of what is far away is 0 or a number, and NaN reaches its own row alone."""
    for activation in ACTIVATIONS:
        experts = normed(32, 32, 1, "int8", activation)
        with torch.no_grad():
            experts.w1.mul_(3000)
        x = torch.randn(20, 32)
        Problem("int8", TILES, experts, x, torch.zeros(20, dtype=torch.long), None).check()
        packed = PackedExperts.of(experts, "int8")
        packed.pack(lambda *_: TILES)
        clean = packed(x, torch.zeros(20, dtype=torch.long))
        x[3, 5] = float("nan")
        found = packed(x, torch.zeros(20, dtype=torch.long))
        others = torch.arange(20) != 3
        assert torch.equal(found[others], clean[others]) and found[3].isnan().any()


@here
@pytest.mark.parametrize("dtype, amx", WAYS)
def test_large_numbers_are_not_taken_for_nan(way):
    x = torch.zeros(1, 256)
    x[0, ::16], x[0, 1::16] = 1e38, -0.9e38
    linear = pack(TILES, converted(torch.full((32, 256), 1e-6), None, way), input_dtype(way))
    assert linear(x.to(input_dtype(way))).isfinite().all()


@here
@pytest.mark.parametrize("dtype, amx", WAYS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(way, activation):
    to = input_dtype(way)
    packed = PackedExperts.of(DenseExperts(80, 32, 1, activation=activation, bias="expert").to(to), way)
    packed.pack(lambda *_: TILES)
    x = torch.randn(5, 80).to(to)
    x[3, 5] = float("nan")
    assert packed(x, torch.zeros(5, dtype=torch.long)).isnan().sum(1).tolist() == [0, 0, 0, 80, 0]
    linear = pack(TILES, converted(torch.randn(33, 80), None, way), to)
    assert linear(x).isnan().sum(1).tolist() == [0, 0, 0, 33, 0]


@here
def test_prepare_takes_it_and_says_so(monkeypatch):
    model, inputs = made("bert", "hash"), make_inputs("bert")
    with_tiles = prepare(copy.deepcopy(model), "int8")
    lines = [line for line in describe(with_tiles).splitlines() if line.startswith("experts")]
    assert lines and all("tiles" in line and "this package's, by A" in line for line in lines)
    monkeypatch.setenv(tiles.SWITCH, "0")
    assert tiles.unavailable("int8") == "MOEBERT_KERNELS_TILES is 0"
    without = prepare(copy.deepcopy(model), "int8")
    assert "tiles" not in describe(without)
    torch.testing.assert_close(run(with_tiles, inputs), run(without, inputs), atol=0.2, rtol=0.1)


def test_a_compiler_that_is_missing_or_fails(tmp_path, monkeypatch):
    monkeypatch.delenv(tiles.SWITCH, raising=False)
    monkeypatch.setattr(tiles, "capabilities", lambda: dict.fromkeys((*tiles._ALWAYS, "avx512_vnni"), True))
    monkeypatch.setattr(tiles, "_library", tiles._library.__wrapped__)
    monkeypatch.setenv("MOEBERT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(tiles.shutil, "which", lambda _: None)
    assert tiles.unavailable("int8") == "no C++ compiler was found (c++, g++ or clang++; CXX names another one)"
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert "it could not be compiled or loaded: [Errno 2] No such file" in tiles.unavailable("int8")
    monkeypatch.setenv("CXX", "g++ '")
    assert tiles.unavailable("int8") == "it could not be compiled or loaded: No closing quotation"
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'a.cpp:1: error: no such instruction' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert tiles.unavailable("int8") == f"{broken} failed: a.cpp:1: error: no such instruction"
    assert not list(tmp_path.glob("tiles-*"))


@here
def test_what_is_compiled_needs_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_KERNELS_CACHE", str(tmp_path))
    assert not isinstance(tiles._library.__wrapped__(), str)
    assert len(list(tmp_path.iterdir())) == 1
    (file,) = tmp_path.iterdir()
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert not isinstance(tiles._library.__wrapped__(), str)
    monkeypatch.delenv("CXX")
    damaged = tmp_path / "other" / file.name
    damaged.parent.mkdir()
    damaged.touch()
    monkeypatch.setenv("MOEBERT_KERNELS_CACHE", str(damaged.parent))
    assert not isinstance(tiles._library.__wrapped__(), str) and damaged.stat().st_size  # it was made again
    monkeypatch.delenv("MOEBERT_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tiles.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert tiles._library.__wrapped__() == "it could not be compiled or loaded: no home"


def test_a_cpu_without_the_instructions(monkeypatch):
    monkeypatch.delenv(tiles.SWITCH, raising=False)
    monkeypatch.setattr(tiles, "capabilities", lambda: {"avx2": True})
    for dtype in DTYPES:
        assert tiles.unavailable(dtype) == "this CPU has no avx512_f"
    assert tiles.unavailable("float32") == "it computes in bfloat16 or int8, asked for float32"
    experts = PackedExperts.of(normed(16, 16, 2, "int8"), "int8")
    assert not experts.tiles()
    with pytest.raises(UserError, match="expected a machine on which this kernel runs, got one where this CPU has no"):
        experts.pack(lambda *_: TILES)
    of_2019 = dict.fromkeys((*tiles._ALWAYS, "avx512_vnni"), True)
    monkeypatch.setattr(tiles, "capabilities", lambda: of_2019)
    for dtype in ("int8-bfloat16", "bfloat16"):
        assert tiles.unavailable(dtype) == "this CPU has no avx512_bf16"
