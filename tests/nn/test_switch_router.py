import pytest
import torch

from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEFeedForward
from moebert_kernels.nn import DenseExperts, SwitchRouter, balance_loss
from tests.nn.mpo import E, H, I, routed, small_experts


def test_ratio_has_value_one_and_the_routers_gradient():
    router, x = SwitchRouter(H, E), torch.randn(3, 5, H)
    ids, factor, loss, dropped = router(x)
    p = router.gate(x).softmax(-1)
    assert torch.equal(ids, p.argmax(-1)) and not dropped.any()
    assert torch.equal(factor, torch.ones(3, 5))
    torch.testing.assert_close(loss, balance_loss(p, ids))
    up = torch.randn(3, 5)
    (factor * up).sum().backward()
    got, router.gate.weight.grad = router.gate.weight.grad, None
    (router.gate(x).softmax(-1).amax(-1).log() * up).sum().backward()
    torch.testing.assert_close(got, router.gate.weight.grad)
    with torch.no_grad():
        assert router(x)[1] is None


def test_an_expert_has_room_for_one_token_at_least():
    """Of a generation's few new ones, whose share is less than one."""
    ids, *_, dropped = SwitchRouter(H, 8, capacity_factor=1.25)(torch.randn(1, 1, H))
    assert ids.min() >= 0 and not dropped.any()


def test_scaling_the_input_is_scaling_the_output_of_relu_experts_without_bias():
    x = torch.randn(2, 6, H)
    router, experts = SwitchRouter(H, E, scaling="probability"), small_experts()
    ids, p, *_ = router(x)
    torch.testing.assert_close(MoEFeedForward(router, experts)(x), experts(x, ids, p))
    gelu = small_experts(activation="gelu")
    assert not torch.allclose(MoEFeedForward(router, gelu)(x), gelu(x, ids, p), atol=1e-2)


def test_padding_is_neither_routed_nor_counted():
    router, x = SwitchRouter(H, E), torch.randn(2, 6, H)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    layer = MoEFeedForward(router, small_experts())
    y, loss = routed(layer, x, token_mask=mask)
    assert not y[0, 4:].any() and y[0, :4].any()
    ids = router(x, mask)[0]
    assert (ids[0, 4:] == -1).all()
    other = x.clone()
    other[0, 4:] = 7.0
    torch.testing.assert_close(routed(layer, other, token_mask=mask)[1], loss)
    router.route_padding = True
    assert routed(layer, x, token_mask=mask)[0][0, 4:].any()


def test_capacity_keeps_the_first_tokens_and_passes_the_others_through():
    router = SwitchRouter(H, E, capacity_factor=1.0)
    torch.nn.init.zeros_(router.gate.weight)
    router.gate.bias.data = torch.tensor([0.0, 5.0, 0.0, 0.0])
    x = torch.randn(2, 4, H)
    y, loss = routed(MoEFeedForward(router, small_experts()), x)
    ids, _, _, dropped = router(x)
    assert ids.flatten().tolist() == [1, 1, -1, -1, -1, -1, -1, -1]
    assert torch.equal(y.flatten(0, 1)[2:], x.flatten(0, 1)[2:]) and not torch.equal(y[0, :2], x[0, :2])
    assert loss > 0.9 * E  # f is what was chosen, before anything was dropped
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    ids, _, _, dropped = router(x, mask)
    assert ids.flatten().tolist() == [-1, 1, 1, -1, -1, -1, -1, -1]
    assert dropped.sum() == 5  # padding was not dropped: it was never sent


def test_jitter_and_noise_act_in_training_alone():
    x = torch.randn(64, H)
    for options in ({"jitter": 0.5}, {"noise": 3.0}):
        router = SwitchRouter(H, E, **options)
        assert (router(x)[0] != router(x)[0]).any()
        router.eval()
        assert torch.equal(router(x)[0], router(x)[0])


def test_autocast_does_not_reach_the_router():
    router, x = SwitchRouter(H, E), torch.randn(256, H)
    wanted = router(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ids, _, loss, _ = router(x)
        assert torch.equal(ids, wanted) and loss.dtype == torch.float32
        y = MoEFeedForward(router, DenseExperts(H, I, E))(x[None])
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scaling": "p"}, "scaling: expected one of ratio, probability, got 'p'"),
        ({"jitter": 1.0}, r"jitter: expected a number in \[0, 1\), got 1.0"),
        ({"noise": -1.0}, "noise: expected a finite standard deviation of at least 0, got -1.0"),
        ({"capacity_factor": 0}, "capacity_factor: expected a finite number above 0 or None, got 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SwitchRouter(H, E, **options)
