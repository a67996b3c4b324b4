"""x in the order of the experts: two kernels that write and read it, against the same in the order of the tokens."""

import pytest
import torch

pytest.importorskip("triton")

from moebert_kernels import fused_moe_ffn_add_norm, group_tokens
from moebert_kernels.triton_backend import add_norm_in_order
from moebert_kernels.triton_backend import fused_moe_ffn_add_norm as expert
from tests.helpers import assert_as_accurate
from tests.tiny_tiles import use_tiny_tiles

E, T, H, I, EPS = 3, 25, 24, 20, 1e-5
EVERY = (True,) * 8


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_tiles(monkeypatch)


def inputs(dtype, device):
    """(attention's output, residual, its norm), (weights and norms of the experts), a gradient."""
    shapes = [(T, H), (T, H), (H,), (H,), (E, I, H), (E, I), (E, H, I), (E, H), (E, H), (E, H)]
    leaves = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randn(T, H, device=device, dtype=dtype)


def by_token(leaves, grouping, weights, dy):
    """The two norms and the expert as a model has them today."""
    added, residual, weight, bias, *rest = leaves
    x = torch.nn.functional.layer_norm(residual + added, (H,), weight, bias, EPS)
    y = fused_moe_ffn_add_norm(x, grouping, *rest, routing_weights=weights, eps=EPS)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@torch.no_grad()
def in_order(leaves, grouping, weights, dy, seed=None, dropout_p=0.0):
    added, residual, weight, bias, *rest = [leaf.detach() for leaf in leaves]
    rows = add_norm_in_order.forward(residual, added, weight, bias, grouping, EPS, dropout_p, seed)
    options = weights, EPS, "gelu", 0.0, 0.0, None
    y, h_pre, ffn = expert.forward(rows, grouping, *rest, *options, True, True)
    drows, *grads, _ = expert.backward(dy, rows, h_pre, ffn, grouping, *rest, *options, EVERY, True)
    dresidual, dadded, dweight, dbias = add_norm_in_order.backward(
        drows, residual, added, weight, bias, grouping, EPS, dropout_p, seed
    )
    return [y, dadded, dresidual, dweight, dbias, *grads]


@pytest.mark.parametrize(("routing", "dtype"), [("skewed", torch.bfloat16), ("some_skipped", torch.float32)])
def test_forward_and_backward(routing, dtype, device):
    ids = torch.where(torch.arange(T) < 18, 1, 2) if routing == "skewed" else torch.randint(-1, E, (T,))
    grouping = group_tokens(ids.to(device), E)
    leaves, dy = inputs(dtype, device)
    weights = torch.rand(T, 1, device=device, dtype=dtype)
    exact = by_token(
        [leaf.detach().double().requires_grad_() for leaf in leaves], grouping, weights.double(), dy.double()
    )
    plain = by_token(leaves, grouping, weights, dy)
    factor = 3.0 if dtype == torch.bfloat16 else 2.0
    for i, results in enumerate(zip(in_order(leaves, grouping, weights, dy), plain, exact, strict=True)):
        assert_as_accurate(*results, f"result {i}", factor)


def test_dropout_of_what_attention_adds(device):
    """Its mask is that of the tokens, whatever their order; backward drops what forward dropped."""
    grouping = group_tokens(torch.randint(-1, E, (T,)).to(device), E)
    residual, added = torch.randn(2, T, H, device=device)
    weight, bias, seed = torch.ones(H, device=device), torch.zeros(H, device=device), torch.tensor(5, device=device)
    options = grouping, EPS, 0.5, seed
    rows = add_norm_in_order.forward(residual, added, weight, bias, *options)
    dresidual, dadded, *_ = add_norm_in_order.backward(torch.randn_like(rows), residual, added, weight, bias, *options)
    kept = dadded != 0
    assert 0.4 < kept.float().mean() < 0.6 and torch.equal(dadded[kept], 2 * dresidual[kept])
    z = residual + 2 * torch.where(kept, added, 0.0)
    wanted = torch.nn.functional.layer_norm(z, (H,), weight, bias, EPS)[grouping.row_to_assignment.long()]
    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
