import pytest
import torch

from moebert_kernels import group_tokens, reference
from moebert_kernels.errors import UserError
from moebert_kernels.nn import MoEFeedForward

H, I, E = 6, 5, 3


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_is_the_reference(activation):
    layer = MoEFeedForward(H, I, E, activation=activation).double()
    x, ids = torch.randn(2, 4, H, dtype=torch.float64), torch.randint(-1, E, (2, 4))
    weights = torch.rand(2, 4, dtype=torch.float64)
    wanted = reference.fused_moe_ffn_add_norm(
        x.view(-1, H), ids.view(-1), **dict(layer.named_parameters()), routing_weights=weights, activation=activation
    )
    for routing in (ids, group_tokens(ids.view(-1), E)):
        torch.testing.assert_close(layer(x, routing, weights), wanted.view_as(x))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_norm_around_the_experts_is_the_reference(activation, top_k):
    layer = MoEFeedForward(H, I, E, activation=activation, norm="layer", eps=1e-5).double()
    with torch.no_grad():
        for norm in (layer.norm_weight, layer.norm_bias):
            norm.copy_(torch.randn(H))
    x, ids = torch.randn(2, 4, H, dtype=torch.float64), torch.randint(-1, E, (2, 4, top_k))
    weights = torch.rand(2, 4, top_k, dtype=torch.float64)
    mixed = reference.fused_moe_ffn(
        x.view(-1, H), ids.view(-1, top_k), layer.w1, layer.b1, layer.w2, layer.b2,
        routing_weights=weights.view(-1, top_k), activation=activation,
    )  # fmt: skip
    wanted = torch.nn.functional.layer_norm(x + mixed.view_as(x), (H,), layer.norm_weight, layer.norm_bias, 1e-5)
    for routing in (ids, group_tokens(ids.view(-1, top_k), E)):
        torch.testing.assert_close(layer(x, routing, weights), wanted)


@pytest.mark.parametrize("norm", ["expert", "layer"])
def test_experts_with_a_shared_central_tensor(norm):
    factors = {"w1_factors": [[2, 2], [3, 2]], "w2_factors": [[3, 2], [2, 2]]}
    shared = MoEFeedForward(H, 4, E, norm=norm, **factors).double()
    plain = MoEFeedForward(H, 4, E, norm=norm).double()
    w1, w2 = shared.weights()
    rest = {name: value for name, value in shared.state_dict().items() if "." not in name}
    plain.load_state_dict({"w1": w1.detach(), "w2": w2.detach(), **rest})
    x, ids = torch.randn(9, H, dtype=torch.float64), torch.randint(0, E, (9,))
    torch.testing.assert_close(shared(x, ids), plain(x, ids))
    shared(x, ids).square().sum().backward()
    plain(x, ids).square().sum().backward()
    for name, weight in (("w1", w1), ("w2", w2)):
        module = getattr(shared, name)
        wanted = torch.autograd.grad(weight, list(module.parameters()), getattr(plain, name).grad)
        for parameter, gradient in zip(module.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    assert "expert_size=4" in repr(shared)


def test_rejects_factors_of_another_shape():
    with pytest.raises(UserError, match=r"w1_factors: expected products \(4, 6\), got \(4, 9\)"):
        MoEFeedForward(H, 4, E, w1_factors=[[2, 2], [3, 3]], w2_factors=[[3, 2], [2, 2]])


def test_rejects_an_unknown_norm():
    with pytest.raises(UserError, match="norm: expected 'expert' or 'layer', got 'pre'"):
        MoEFeedForward(H, I, E, norm="pre")


@pytest.mark.parametrize("norm", ["expert", "layer"])
def test_dropout_only_in_training(norm):
    layer = MoEFeedForward(H, I, E, dropout=0.5, norm=norm)
    x, ids = torch.randn(9, H), torch.randint(0, E, (9,))
    assert not torch.equal(layer(x, ids), layer(x, ids))
    torch.manual_seed(3)
    first = layer(x, ids)
    torch.manual_seed(3)
    assert torch.equal(layer(x, ids), first)
    layer.eval()
    assert torch.equal(layer(x, ids), layer(x, ids))


def test_state():
    layer = MoEFeedForward(H, I, E)
    assert list(layer.state_dict()) == ["w1", "b1", "w2", "b2", "norm_weight", "norm_bias"]
    assert all(p.isfinite().all() for p in layer.parameters())
    assert "num_experts=3" in repr(layer)
