"""Packed layers and experts, against the reference and bit by bit."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moebert_kernels import cpu, reference
from moebert_kernels.errors import UserError
from moebert_kernels.layers import NormedExperts
from moebert_kernels.serve import packed as packing
from moebert_kernels.serve.dtypes import DTYPES, input_dtype, is_int8
from moebert_kernels.serve.embedding import PackedEmbedding
from moebert_kernels.serve.experts import PackedExperts
from moebert_kernels.serve.modules import PackedLinear
from moebert_kernels.serve.packed import (
    ENGINES,
    Weights,
    available,
    converted,
    fastest,
    pack,
    quantised,
    rounded_rows,
)
from moebert_kernels.serve.tiles import ENGINE as TILES
from moebert_kernels.serve.tiles import SWITCH
from tests.helpers import assert_as_accurate
from tests.serve.problems import SEVEN_BITS, Problem

HERE = [(dtype, engine) for dtype in DTYPES for engine in ENGINES[dtype] if engine in available(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_on_random_problems(dtype):
    for seed in range(40):
        Problem.draw(seed, dtype).check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_on_many_random_problems(dtype):
    for seed in range(1000, 1250):
        Problem.draw(seed, dtype).check()


@pytest.mark.parametrize("dtype, engine", [pair for pair in HERE if pair[1] != TILES])
def test_a_library_that_compiles_each_number_of_rows_meets_few(dtype, engine, monkeypatch):
    """Texts differ, and with them the rows of each expert."""
    experts = NormedExperts(16, 24, 3, activation="gelu", bias="expert", eps=1e-5).to(input_dtype(dtype))
    packed = PackedExperts.of(experts, dtype)
    packed.pack(lambda *_: engine)
    met, outputs = set(), packed._outputs
    monkeypatch.setattr(packed, "_outputs", lambda rows, counts: met.update(counts) or outputs(rows, counts))
    for T in range(64, 192):
        packed(torch.randn(T, 16).to(input_dtype(dtype)), torch.randint(-1, 2, (T,)))
    compiles = "onednn" in engine or (dtype == "bfloat16" and "onednn" in available(dtype))
    assert all(rounded_rows(count) == count for count in met) == compiles


def test_rounded_numbers_of_rows():
    assert [rounded_rows(count) for count in (0, 1, 31, 32, 33, 63, 65, 1000)] == [0, 1, 31, 32, 34, 64, 68, 1024]
    assert all(count <= rounded_rows(count) <= count * 17 / 16 for count in range(5000))
    assert len({*map(rounded_rows, range(4097))}) == 145


@pytest.mark.parametrize("dtype, engine", HERE)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(dtype, engine, bias):
    """Inputs whose quantisation is exact, so that int8 has to be exact up to the rounding of one float32 product."""
    weight, b = torch.randn(33, 20), torch.randn(33) if bias else None
    layer = pack(engine, converted(weight, b, dtype), input_dtype(dtype))
    stored = layer.weights()
    low, high = (-64, 63) if SEVEN_BITS else (-128, 127)
    for x in (
        torch.randint(low, high + 1, (7, 20)),
        torch.randint(low, high + 1, (20, 6)).t(),
        torch.zeros(0, 20),
        torch.randint(low, high + 1, (2, 3, 20)),
    ):
        x = x.to(layer.dtype)
        if x.numel():
            x[..., 0], x[..., 1] = low, high
        weights = stored.weight.double() * (1 if stored.scale is None else stored.scale.double()[:, None])
        exact = nn.functional.linear(x.double(), weights, None if b is None else stored.bias.double())
        same = nn.functional.linear(x, weights.to(x.dtype), None if b is None else stored.bias.to(x.dtype))
        assert_as_accurate(layer(x), same, exact, f"{dtype} {engine}")
        residual = torch.randn(same.shape).to(x.dtype)
        kept = residual.clone()
        assert_as_accurate(layer.plus(x, residual), same + residual, exact + residual, f"plus, {dtype} {engine}")
        assert torch.equal(residual, kept)


@pytest.mark.parametrize("dtype, engine", [pair for pair in HERE if not is_int8(pair[0])])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "relu2", "identity", "swiglu"])
def test_activations(dtype, engine, activation):
    weights = converted(torch.randn(34, 20), torch.randn(34), dtype)
    x = torch.randn(9, 20).to(input_dtype(dtype))

    def run(to):
        y = nn.functional.linear(x.to(to), weights.weight.to(to), weights.bias.to(to))
        return reference.activate(y, activation)

    layer = pack(engine, weights, x.dtype)
    assert_as_accurate(layer(x, activation), run(x.dtype), run(torch.float64), activation)


@pytest.mark.parametrize("dtype, engine", HERE)
def test_packed_layers_give_back_what_they_were_made_of(dtype, engine):
    weights = converted(torch.randn(33, 20), torch.randn(33), dtype)
    layer = pack(engine, weights, input_dtype(dtype))
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert one.engine == engine
        for a, b in zip(one.weights(), weights, strict=True):
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


def test_int8_weights_are_within_half_a_step():
    weight = torch.randn(9, 50)
    weight[3] = 0
    q, scale = quantised(weight)
    assert q.dtype == torch.int8 and q.abs().max() <= 127 and (q[3] == 0).all()
    assert ((q * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def test_embeddings_of_int8_rows():
    dense = nn.Embedding(50, 12, padding_idx=0)
    made = PackedEmbedding.of(dense, "int8")
    ids = torch.randint(0, 50, (2, 7))
    steps = dense.weight.detach().abs().amax(1)[ids, None] / 127
    assert ((made(ids) - dense(ids)).abs() <= 0.501 * steps).all()
    assert made(ids).dtype == torch.float32
    assert torch.equal(PackedEmbedding.of(dense, "int8-bfloat16")(ids), made(ids).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_refuse_another_dtype_and_new_weights(dtype):
    layer = PackedLinear.of(nn.Linear(20, 33), dtype)
    layer.pack(lambda shape, experts: available(dtype)[0])
    assert layer.weight.shape == (33, 20) and layer.weight.is_meta
    with pytest.raises(ValueError, match=r"x: expected torch\..* in a model prepared as"):
        layer(torch.randn(2, 20, dtype=torch.float64))
    with pytest.raises(UserError, match="load_state_dict: expected a model that is not prepared"):
        layer.load_state_dict(layer.state_dict())


def test_the_fastest_engine_is_the_one_with_the_shortest_calls(monkeypatch):
    samples = [converted(torch.randn(16, 16), None, "float32") for _ in range(3)]
    clock = iter(range(10**9))
    ticks = {"plain": 1, "onednn": 5}
    now = 0

    class Slow:
        dtype = torch.float32

        def __init__(self, engine):
            self.engine = engine

        def __call__(self, x):
            nonlocal now
            now += ticks[self.engine]

    monkeypatch.setattr(packing, "available", lambda dtype: ["plain", "onednn"])
    monkeypatch.setattr(packing, "pack", lambda engine, *weights: Slow(engine))
    monkeypatch.setattr(packing.time, "perf_counter", lambda: now + 1e-9 * next(clock))
    assert fastest("float32", samples, 4).engine == "plain"
    ticks["plain"] = 9
    found = fastest("float32", samples, 4)
    assert found.engine == "onednn" and found.rows == 4 and found.shape == (16, 16)
    ticks["plain"] = 5.1  # too close to tell apart: the first of the list
    assert fastest("float32", samples, 4).engine == "plain"


def test_one_engine_needs_no_measurement(monkeypatch):
    monkeypatch.setattr(packing, "available", lambda dtype: ["plain"])
    assert fastest("float32", [Weights(torch.ones(4, 4), None, None)], 8).best_us == {}


def test_a_torch_without_int8_engines(monkeypatch):
    monkeypatch.setattr(packing.torch.backends, "quantized", SimpleNamespace(supported_engines=[]))
    monkeypatch.setenv(SWITCH, "0")
    with pytest.raises(UserError, match="dtype: expected one that this build of torch can run, got 'int8'"):
        available("int8")


def test_what_the_cpu_has(monkeypatch):
    for found, has in (({"avx512_vnni": True, "avx512_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(cpu, "capabilities", lambda found=found: found)
        assert cpu.has_int8_instructions() is has and cpu.has_bfloat16_instructions() is has
    with pytest.warns(UserWarning, match="7 bits instead of 8"):
        cpu.warn_if_slow("int8")
    with pytest.warns(UserWarning, match="no bfloat16 instructions: products are computed in float32"):
        cpu.warn_if_slow("bfloat16")
    monkeypatch.setattr(cpu, "capabilities", lambda: {"avx512_vnni": True})
    with pytest.warns(UserWarning, match="what is between products is converted .* use 'int8-token'"):
        cpu.warn_if_slow("int8-bfloat16")


def test_without_int8_instructions_activations_have_seven_bits(monkeypatch):
    """Sums of two products fit into 16 bits then."""
    monkeypatch.setattr(packing, "_STEPS", 127)
    layer = pack("fbgemm", converted(torch.ones(1, 16), None, "int8"), torch.float32)
    x = torch.linspace(0, 1, 256).view(16, 16)
    torch.testing.assert_close(layer(x), packing.rounded_activation(x, "int8").sum(1, keepdim=True))
    error = (layer(x) - x.sum(1, keepdim=True)).abs().max()
    assert 0 < error <= 16 * 0.5 / 127 + 1e-5


def test_all_experts_of_shared_storage_are_copied():
    """A packed expert holds no view of the tensors of all."""
    made = PackedExperts.of(Problem.draw(3, "float32").experts, "float32")
    made.pack(lambda shape, experts: "plain")
    for layer in made._first:
        weight = layer.weights().weight
        assert weight.untyped_storage().nbytes() == weight.nbytes
