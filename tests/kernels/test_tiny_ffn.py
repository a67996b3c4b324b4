"""The tiny batch's two kernels: what the binding refuses anywhere, and on a GPU values, ids and replays."""

import pytest
import torch

from moebert_kernels import backend, group_tokens, reference
from moebert_kernels.activation import ACTIVATIONS, is_gated
from moebert_kernels.cuda_backend import tiny_ffn
from tests.backends import why_not_built
from tests.helpers import assert_as_accurate

pytestmark = pytest.mark.skipif(why_not_built("tiny_ffn") is not None, reason=str(why_not_built("tiny_ffn")))

E, H, I = 4, 96, 72
HALVES_AND_FLOAT = (torch.float16, torch.bfloat16, torch.float32)


def arguments(tokens, dtype=torch.float32, activation="gelu", device="cpu", hidden=H, width=I):
    """x, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights."""
    rows = 2 * width if is_gated(activation) else width
    shapes = [(tokens, hidden), (E, rows, hidden), (E, rows), (E, hidden, width), (E, hidden)]
    scales = [1, hidden**-0.5, 1, width**-0.5, 1]
    made = [torch.randn(shape) * scale for shape, scale in zip(shapes, scales, strict=True)]
    made += [1 + 0.1 * torch.randn(E, hidden), torch.randn(E, hidden), torch.rand(tokens)]
    return [tensor.to(device, dtype) for tensor in made]


def test_a_launch_that_fails_says_which_and_why(monkeypatch):
    monkeypatch.setattr(tiny_ffn, "stream_of", lambda tensor: 0)
    *tensors, weights = arguments(257)
    with pytest.raises(RuntimeError, match=r"^tiny_ffn\(T=257, H=96, I=72, E=4\): invalid argument$"):
        tiny_ffn.add_norm(tensors[0], torch.zeros(257, dtype=torch.int64), *tensors[1:], weights, 1e-12, "gelu")


def test_no_tokens():
    x, *others, weights = arguments(0)
    y = tiny_ffn.add_norm(x, torch.zeros(0, dtype=torch.int64), *others, weights, 1e-12, "gelu")
    assert y.shape == (0, H)


@pytest.mark.parametrize(
    "tokens, top_k, x_dtype, dtype, expected",
    [
        (256, 1, torch.bfloat16, torch.bfloat16, True),
        (1, 1, torch.float32, torch.float16, True),
        (257, 1, torch.float32, torch.float32, False),
        (8, 2, torch.float32, torch.float32, False),
        (8, 1, torch.float16, torch.float32, False),
        (8, 1, torch.float64, torch.float64, False),
    ],
)
def test_applies(monkeypatch, tokens, top_k, x_dtype, dtype, expected):
    monkeypatch.setattr(backend, "kernel_unavailable", lambda *_: None)
    assert tiny_ffn.applies(torch.empty(tokens, H, dtype=x_dtype), top_k, torch.empty(E, I, H, dtype=dtype)) is expected


def check(got, name, tensors, ids, **options):
    same = getattr(reference, name)(tensors[0], ids, *tensors[1:-1], routing_weights=tensors[-1], **options)
    wide = [tensor.double() for tensor in tensors]
    exact = getattr(reference, name)(wide[0], ids, *wide[1:-1], routing_weights=wide[-1], **options)
    assert_as_accurate(got, same, exact, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tokens, dtype, activation",
    [(32, torch.float32, activation) for activation in ACTIVATIONS]
    + [(tokens, dtype, "gelu") for tokens in (1, 7, 129, 256) for dtype in HALVES_AND_FLOAT]
    + [(32, dtype, "swiglu") for dtype in (torch.float16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("hidden, width", [(768, 768), (97, 75)], ids=["large", "small"])
def test_matches_the_reference_from_a_grouping_and_from_ids(tokens, dtype, activation, hidden, width):
    tensors = arguments(tokens, dtype, activation, "cuda", hidden, width)
    ids = torch.randint(-1, E + 1, (tokens,), device="cuda")
    x, *others, weights = tensors
    for routing in (group_tokens(ids, E), ids):
        got = tiny_ffn.add_norm(x, routing, *others, weights, 1e-12, activation)
        check(got, "fused_moe_ffn_add_norm", tensors, ids, eps=1e-12, activation=activation)
        got = tiny_ffn.ffn(x, routing, *others[:4], weights, activation)
        check(got, "fused_moe_ffn", [*tensors[:5], weights], ids, activation=activation)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 32, 256])
def test_replays_of_a_graph_are_bitwise_the_same(tokens):
    x, *others, weights = arguments(tokens, torch.bfloat16, "gelu", "cuda", 768, 768)
    ids = torch.randint(-1, E, (tokens,), device="cuda")
    eager = tiny_ffn.add_norm(x, ids, *others, weights, 1e-12, "gelu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(3):
            y = tiny_ffn.add_norm(x + 0 * y, ids, *others, weights, 1e-12, "gelu")
        for _ in range(3):  # the next call's first kernel follows this one's second, on the same workspace
            y = tiny_ffn.add_norm(x, ids, *others, weights, 1e-12, "gelu")
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, eager)


@pytest.mark.gpu
def test_strided_inputs_and_float32_beside_half():
    x, w1, b1, w2, b2, norm_weight, norm_bias, weights = arguments(50, torch.float32, "gelu", "cuda")
    ids = torch.randint(-1, E, (50,), device="cuda")
    turned = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w1, w2)]
    wanted = tiny_ffn.add_norm(x, ids, w1, b1, w2, b2, norm_weight, norm_bias, weights, 1e-12, "gelu")
    columns = x.t().contiguous().t()
    got = tiny_ffn.add_norm(columns, ids, turned[0], b1, turned[1], b2, norm_weight, norm_bias, weights, 1e-12, "gelu")
    assert torch.equal(got, wanted)
    halves = [t.half() for t in (w1, b1, w2, b2)]
    got = tiny_ffn.add_norm(x, ids, *halves, norm_weight, norm_bias, weights, 1e-12, "gelu")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
