"""What only a GPU can show: no synchronisation, CUDA graphs, streams, real sizes and bfloat16."""

import pytest
import torch

from moebert_kernels import (
    backend,
    fused_moe_ffn,
    fused_moe_ffn_add_norm,
    group_tokens,
    group_tokens_by_hash,
    reference,
)
from tests.backends import KERNEL_BACKENDS
from tests.helpers import assert_as_accurate

pytestmark = pytest.mark.gpu

E, H, I = 4, 768, 768


@pytest.fixture(params=KERNEL_BACKENDS, autouse=True)
def implementation(request):
    torch.set_default_device("cuda")
    with backend.use_backend(request.param, strict=True):
        yield
    torch.set_default_device(None)


def weights(dtype, experts=E, hidden=H, width=I, norm=False):
    made = [torch.randn(experts, width, hidden) / hidden**0.5, torch.randn(experts, width),
            torch.randn(experts, hidden, width) / width**0.5, torch.randn(experts, hidden)]  # fmt: skip
    if norm:
        made += [1 + 0.1 * torch.randn(experts, hidden), torch.randn(experts, hidden)]
    return [t.to(dtype).requires_grad_() for t in made]


def forward_backward(op, x, routing, parameters, dy):
    x = x.detach().requires_grad_()
    y = op(x, routing, *parameters)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


@pytest.mark.parametrize("op", [fused_moe_ffn, fused_moe_ffn_add_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 200, 1024, 5000])
def test_real_sizes_match_the_reference(tokens, dtype, op):
    norm = op is fused_moe_ffn_add_norm
    x, dy, parameters = torch.randn(tokens, H).to(dtype), torch.randn(tokens, H).to(dtype), weights(dtype, norm=norm)
    ids = torch.randint(-1, E, (tokens,))
    naive = getattr(reference, op.__name__)
    got = forward_backward(op, x, ids, parameters, dy)
    same = forward_backward(naive, x, ids, parameters, dy)
    wide = [t.detach().double().requires_grad_() for t in parameters]
    exact = forward_backward(naive, x.double(), ids, wide, dy.double())
    for i, tensors in enumerate(zip(got, same, exact, strict=True)):
        assert_as_accurate(*tensors, name=str(i))


def test_never_waits_for_the_gpu():
    tables, token_ids = torch.randint(0, E, (12, 30522)).to(torch.uint8), torch.randint(0, 30522, (8, 128))
    x, dy, parameters = torch.randn(1024, H), torch.randn(1024, H), weights(torch.float32, norm=True)
    p = torch.rand(1024, requires_grad=True)
    seed = torch.tensor(3)
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            grouping = group_tokens_by_hash(token_ids, tables, E, torch.ones_like(token_ids))[0]
            forward_backward(fused_moe_ffn, x, grouping, parameters[:4], dy)
            y = fused_moe_ffn_add_norm(
                x.requires_grad_(), grouping, *parameters, routing_weights=p, dropout_p=0.1, hidden_dropout_p=0.1,
                dropout_seed=seed, recompute=True,
            )  # fmt: skip
            torch.autograd.grad(y, [x, *parameters, p], dy)
            top_2 = group_tokens(torch.randint(-1, E, (1024, 2)), E)
            forward_backward(fused_moe_ffn, x, top_2, parameters[:4], dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_training_step_replays_with_new_inputs():
    tokens = 512
    x, dy, ids = torch.randn(tokens, H), torch.randn(tokens, H), torch.randint(0, E, (tokens,))
    parameters = weights(torch.bfloat16)
    x, dy = x.bfloat16(), dy.bfloat16()

    def step():
        return forward_backward(fused_moe_ffn, x, group_tokens(ids, E), parameters, dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        dy.normal_()
        ids.random_(-1, E)
        graph.replay()
        for got, wanted in zip(captured, step(), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("op", [fused_moe_ffn, fused_moe_ffn_add_norm])
def test_the_same_bits_a_hundred_times(op):
    parameters = weights(torch.bfloat16, norm=op is fused_moe_ffn_add_norm)
    x, dy = torch.randn(3000, H).bfloat16(), torch.randn(3000, H).bfloat16()
    ids = torch.randint(0, E, (3000,))
    first = forward_backward(op, x, ids, parameters, dy)
    for _ in range(100):
        for got, wanted in zip(forward_backward(op, x, ids, parameters, dy), first, strict=True):
            assert torch.equal(got, wanted)


def test_several_streams_at_once():
    parameters = weights(torch.bfloat16)
    inputs = [torch.randn(700 + 300 * i, H).bfloat16() for i in range(4)]
    ids = [torch.randint(0, E, (len(x),)) for x in inputs]
    wanted = [fused_moe_ffn(x, i, *parameters).detach() for x, i in zip(inputs, ids, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    got = []
    for _ in range(10):
        got = []
        for stream, x, i in zip(streams, inputs, ids, strict=True):
            with torch.cuda.stream(stream):
                got.append(fused_moe_ffn(x, i, *parameters).detach())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_more_elements_than_an_int32_counts():
    tokens, hidden, width = 2**20 + 3, 64, 2304  # T * I > 2^31
    parameters = weights(torch.bfloat16, hidden=hidden, width=width)
    x, dy = torch.randn(tokens, hidden, dtype=torch.bfloat16), torch.randn(tokens, hidden, dtype=torch.bfloat16)
    ids = torch.randint(0, E, (tokens,))
    got = forward_backward(fused_moe_ffn, x, ids, parameters, dy)
    tail = slice(tokens - 256, tokens)  # the last tokens have the largest rows of their experts
    part = forward_backward(fused_moe_ffn, x[tail], ids[tail], parameters, dy[tail])
    for whole, alone in zip(got[:2], part[:2], strict=True):  # other tiles may add in another order
        torch.testing.assert_close(whole[tail], alone, rtol=0.02, atol=0.02)
    assert all(bool(torch.isfinite(t).all()) for t in got)
