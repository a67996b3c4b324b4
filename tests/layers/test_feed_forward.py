"""The layer and MoEBERT's experts, against the reference: residual and norm of each expert, and shared by all."""

import pytest
import torch

from moebert_kernels import group_tokens, reference
from moebert_kernels.layers import MoEFeedForward, NormedExperts
from moebert_kernels.nn import DenseExperts, GateRouter, HashRouter, MPOExperts
from moebert_kernels.nn.context import Call, Groupings, Tokens, entered
from tests.nn.mpo import FACTORS, routed

H, I, E = 12, 24, 3


def normed(activation="gelu", bias="expert", **options):
    """Experts whose every parameter is random."""
    experts = NormedExperts(H, I, E, activation=activation, bias=bias, **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return experts


@pytest.mark.parametrize("bias", ["expert", "shared", "none"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_normed_experts_are_the_reference(activation, bias):
    experts = normed(activation, bias, eps=1e-5).double()
    x, ids = torch.randn(2, 4, H, dtype=torch.float64), torch.randint(-1, E, (2, 4))
    weights, (b1, b2) = torch.rand(2, 4, dtype=torch.float64), experts.biases()
    wanted = reference.fused_moe_ffn_add_norm(
        x.view(-1, H), ids.view(-1), experts.w1, b1, experts.w2, b2, experts.norm_weight, experts.norm_bias,
        routing_weights=weights, activation=activation, eps=1e-5,
    )  # fmt: skip
    for routing in (ids, group_tokens(ids.view(-1), E)):
        torch.testing.assert_close(experts(x, routing, weights), wanted.view_as(x))


@pytest.mark.parametrize("kind", ["dense", "mpo"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_one_norm_around_the_experts(activation, kind):
    """y = norm(residual + experts(x)), where transformers' code leaves the residual to the feed-forward."""
    if kind == "mpo":
        factors = FACTORS | ({"w1_factors": ([4, 3, 4], [2, 3, 2])} if activation == "swiglu" else {})
        experts = MPOExperts(H, I, E, activation=activation, bias="expert", **factors)
        experts.reset_parameters(std=0.3)
    else:
        experts = DenseExperts(H, I, E, activation=activation, bias="shared")
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    norm = torch.nn.LayerNorm(H, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    layer = MoEFeedForward(GateRouter(H, E), experts, norm=norm).double()
    x, residual = torch.randn(2, 2, 4, H, dtype=torch.float64)
    ids, weights, _ = layer.router(x)
    (w1, w2), (b1, b2) = experts.weights(), experts.biases()
    mixed = reference.fused_moe_ffn(
        x.view(-1, H), ids.view(-1, 1), w1, b1, w2, b2, routing_weights=weights.view(-1, 1), activation=activation
    )
    torch.testing.assert_close(layer(x), norm(mixed.view_as(x)))
    torch.testing.assert_close(layer(x, residual), norm(residual + mixed.view_as(x)))
    y, loss = routed(layer, x)
    assert y.shape == x.shape and loss.ndim == 0


def test_a_shared_norm_under_hash_routing_is_one_op_with_the_experts():
    """As fast as with a norm in each expert: it is the same op, with one norm for all."""
    table, ids, mask = torch.randint(0, E, (9,)), torch.randint(0, 9, (2, 5)), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    norm = torch.nn.LayerNorm(H, eps=1e-5)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    layer = MoEFeedForward(HashRouter(table, E), DenseExperts(H, I, E, activation="gelu", bias="expert"), norm=norm)
    torch.nn.init.normal_(layer.experts.w1, std=0.3), torch.nn.init.normal_(layer.experts.w2, std=0.3)
    layer = layer.double()
    x, dy = torch.randn(2, 2, 5, H, dtype=torch.float64)
    x.requires_grad_()
    results = []
    for one_op in (True, False):
        layer.zero_grad()
        x.grad = None
        with entered(Call(Tokens(Groupings(), ids, mask))):
            y = layer(x, x if one_op else x + 0)
        (y * dy)[mask != 0].sum().backward()
        results.append([y[mask != 0], x.grad, *(p.grad.clone() for p in layer.parameters())])
        assert torch.equal(y[mask == 0], x[mask == 0]) == one_op
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["norm of each", "no norm", "shared norm"])
def test_dropout_only_in_training(kind):
    experts = normed(output_dropout=0.5) if kind == "norm of each" else DenseExperts(H, I, E, bias="expert")
    torch.nn.init.normal_(experts.w1), torch.nn.init.normal_(experts.w2)
    router = HashRouter(torch.zeros(9, dtype=torch.long), E) if kind == "shared norm" else GateRouter(H, E)
    norm = torch.nn.LayerNorm(H) if kind == "shared norm" else None
    layer = MoEFeedForward(router, experts, output_dropout=0.5, norm=norm)
    x = torch.randn(1, 9, H)
    with entered(Call(Tokens(Groupings(), torch.arange(9)[None]))):
        assert not torch.equal(layer(x, x), layer(x, x))
        torch.manual_seed(3)
        first = layer(x, x)
        torch.manual_seed(3)
        assert torch.equal(layer(x, x), first)
        layer.eval()
        assert torch.equal(layer(x, x), layer(x, x))


def test_state():
    layer = MoEFeedForward(GateRouter(H, E), normed(), norm=None)
    names = ["w1", "b1", "w2", "b2", "norm_weight", "norm_bias"]
    assert sorted(layer.state_dict()) == sorted([*(f"experts.{name}" for name in names), "router.gate.weight"])
    assert (layer.experts.norm_weight.shape, layer.experts.b1.shape) == ((E, H), (E, I))
    assert "output_dropout=0.0" in repr(layer)
