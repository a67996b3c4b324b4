"""The kernels at shapes that nobody chose: odd sizes, strides, skipped ids, more than two tiles each way."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("hypothesis")  # a machine with a GPU may lack it

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebert_kernels import (
    backend,
    fused_moe_ffn,
    fused_moe_ffn_add_norm,
    group_tokens,
    mpo_expert_weights,
    reference,
)
from tests.backends import KERNEL_BACKENDS
from tests.ops.cases import run
from tests.tiny_tiles import use_tiny_tiles


@pytest.fixture(params=KERNEL_BACKENDS, autouse=True)
def implementation(request, monkeypatch):
    use_tiny_tiles(monkeypatch)
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    with backend.use_backend(request.param, strict=True):
        yield
    torch.set_default_device(None)


shapes = {
    "tokens": st.integers(0, 50), "hidden": st.integers(1, 37), "width": st.integers(1, 37),
    "experts": st.integers(1, 9), "top_k": st.integers(1, 3), "weighted": st.booleans(), "strided": st.booleans(),
    "data": st.integers(0, 2**31),
}  # fmt: skip


def ffn_inputs(tokens, hidden, width, experts, top_k, weighted, strided):
    x = torch.randn(hidden, tokens).t() if strided else torch.randn(tokens, hidden)
    ids = torch.randint(-1, experts + 1, (tokens, top_k))
    w1 = torch.randn(experts, hidden, width).transpose(1, 2) if strided else torch.randn(experts, width, hidden)
    w2 = torch.randn(experts, width, hidden).transpose(1, 2) if strided else torch.randn(experts, hidden, width)
    b1 = torch.randn(width).expand(experts, width) if strided else torch.randn(experts, width)
    p = torch.rand(top_k, tokens).t() if weighted else None
    dy = torch.randn(1, hidden).expand(tokens, hidden) if strided else torch.randn(tokens, hidden)
    return x, ids, [w1 / hidden**0.5, b1, w2 / width**0.5, torch.randn(experts, hidden)], p, dy


def assert_close(got, exact):
    for tensor, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(tensor.double(), truth, rtol=1e-4, atol=1e-4)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**shapes)
def test_fused_moe_ffn(tokens, hidden, width, experts, top_k, weighted, strided, data):
    torch.manual_seed(data)
    x, ids, weights, p, dy = ffn_inputs(tokens, hidden, width, experts, top_k, weighted, strided)

    def call(op):
        return lambda x, w1, b1, w2, b2, p: op(x, ids, w1, b1, w2, b2, routing_weights=p)

    got = run(call(fused_moe_ffn), [x, *weights, p], dy, torch.float32)
    assert_close(got, run(call(reference.fused_moe_ffn), [x, *weights, p], dy, torch.float64))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**{name: strategy for name, strategy in shapes.items() if name != "top_k"})
def test_fused_moe_ffn_add_norm(tokens, hidden, width, experts, weighted, strided, data):
    torch.manual_seed(data)
    x, ids, weights, p, dy = ffn_inputs(tokens, hidden, width, experts, 1, weighted, strided)
    norm = [1 + 0.1 * torch.randn(experts, hidden), torch.randn(experts, hidden)]

    def call(op):
        # eps: with few columns a variance may be as small as rounding
        return lambda x, w1, b1, w2, b2, nw, nb, p: op(
            x, ids[:, 0], w1, b1, w2, b2, nw, nb, routing_weights=None if p is None else p[:, 0], eps=1e-2
        )

    got = run(call(fused_moe_ffn_add_norm), [x, *weights, *norm, p], dy, torch.float32)
    assert_close(got, run(call(reference.fused_moe_ffn_add_norm), [x, *weights, *norm, p], dy, torch.float64))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), sites=st.integers(2, 4), experts=st.integers(1, 3), strided=st.booleans())
def test_mpo_expert_weights(data, sites, experts, strided):
    torch.manual_seed(0)
    factors = [(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))) for _ in range(sites)]
    bonds = [1, *(data.draw(st.integers(1, 19)) for _ in range(sites - 1)), 1]
    position = data.draw(st.integers(0, sites - 1))
    shapes = [(bonds[k], *factors[k], bonds[k + 1]) for k in range(sites)]
    tensors = [torch.randn(s if k == position else (experts, *s)) / s[0] ** 0.5 for k, s in enumerate(shapes)]
    central = tensors.pop(position)
    if strided:
        tensors = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    offsets = torch.tensor([0, 2, 2, 3][: experts + 1], dtype=torch.int32)

    def call(op):
        return lambda c, *aux: op(c, aux, offsets=offsets, central_site=position)

    dw = torch.randn(experts, *(int(torch.tensor(side).prod()) for side in zip(*factors, strict=True)))
    got = run(call(mpo_expert_weights), [central, *tensors], dw, torch.float32)
    assert_close(got, run(call(reference.mpo_expert_weights), [central, *tensors], dw, torch.float64))


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 200), experts=st.integers(1, 70), top_k=st.integers(1, 3), data=st.integers(0, 2**31))
def test_group_tokens(tokens, experts, top_k, data):
    torch.manual_seed(data)
    ids = torch.randint(-2, experts + 2, (top_k, tokens)).t()
    got, wanted = group_tokens(ids, experts), reference.group_tokens(ids, experts)
    for name in ("offsets", "row_to_token", "token_to_row"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


def test_frozen_weights_leave_out_their_gradients_only():
    x, ids, weights, p, dy = ffn_inputs(40, 24, 20, 4, 1, True, False)
    exact = run(
        lambda x, w1, b1, w2, b2, p: reference.fused_moe_ffn(x, ids, w1, b1, w2, b2, routing_weights=p),
        [x, *weights, p], dy, torch.float64,
    )[1:]  # fmt: skip
    for wanted in ((0,), (1,), (2,), (3,), (4,), (5,), (0, 4), (2, 5)):
        inputs = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate((x, *weights, p))]
        y = fused_moe_ffn(inputs[0], ids, *inputs[1:5], routing_weights=inputs[5])
        grads = torch.autograd.grad(y, [inputs[i] for i in wanted], dy)
        assert_close(grads, [exact[i] for i in wanted])
