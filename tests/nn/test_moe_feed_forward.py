import pytest
import torch

from moebert_kernels import group_tokens, reference
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


def test_dropout_only_in_training():
    layer = MoEFeedForward(H, I, E, dropout=0.5)
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
