import pytest
import torch

from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEFeedForward
from moebert_kernels.nn import HashRouter, Top2Router, balance_loss
from tests.nn.mpo import E, H, routed, small_experts


def test_two_most_probable_experts_with_normalised_gates():
    router, x = Top2Router(H, E, policy="all"), torch.randn(2, 7, H)
    ids, weights, loss = router(x)
    p = router.gate(x).softmax(-1)
    assert torch.equal(ids, p.topk(2).indices)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7))
    torch.testing.assert_close(weights[..., 0] / weights[..., 1], p.topk(2).values[..., 0] / p.topk(2).values[..., 1])
    torch.testing.assert_close(loss, sum(balance_loss(p[b], ids[b, :, 0]) for b in range(2)) / 2)


def test_second_expert_is_taken_by_chance():
    router, x = Top2Router(H, E), torch.randn(8, 400, H)
    torch.nn.init.normal_(router.gate.weight)
    ids, weights, _ = router(x)
    g2 = weights[..., 1]
    taken = (ids[..., 1] >= 0).float()
    assert taken[g2 >= 0.2].all()
    unsure = g2 < 0.2
    assert taken[unsure].mean().item() == pytest.approx((g2[unsure] / 0.2).mean().item(), abs=0.03)
    router.eval()
    assert (router(x)[0] >= 0).all()
    router.eval_policy = "none"
    assert (router(x)[0][..., 1] == -1).all()


def test_capacity_is_of_each_sequence_and_first_choices_go_first():
    router = Top2Router(2, 2, policy="all", capacity_factor=1.0)
    router.gate.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    to_first, to_second = [2.0, 0.0], [0.0, 2.0]
    x = torch.tensor([[to_first] * 10 + [to_second] * 2, [to_first] * 6 + [to_second] * 6])
    ids, _, _ = router(x)
    assert (ids[0, :, 0] == -1).tolist() == [False] * 6 + [True] * 4 + [False] * 2
    assert (ids[0, :, 1] == -1).tolist() == [False] * 4 + [True] * 8  # expert 1: two first choices, then four more
    assert (ids[1, :, 0] == -1).sum() == 0 and (ids[1, :, 1] == -1).all()


def test_padding_takes_no_place():
    router, x = Top2Router(H, E, policy="all", capacity_factor=0.01), torch.randn(1, 12, H)
    mask = torch.tensor([[0] * 8 + [1] * 4])
    ids, _, loss = router(x, mask)
    assert (ids[0, :8] == -1).all() and (ids[0, 8:] >= 0).all()  # four places at least
    torch.testing.assert_close(loss, router(x[:, 8:])[2])


def test_layers_with_top2_and_hash_routing():
    experts, x = small_experts(), torch.randn(2, 5, H)
    router = Top2Router(H, E, policy="all")
    y, loss = routed(MoEFeedForward(router, experts), x)
    ids, p, _ = router(x)
    torch.testing.assert_close(y, experts(x, ids, p))
    loss.backward()
    assert router.gate.weight.grad.any()
    layer = MoEFeedForward(HashRouter(torch.arange(10) % E, E), experts)
    tokens = torch.randint(0, 10, (2, 5))
    y, loss = routed(layer, x, tokens)
    torch.testing.assert_close(y, experts(x, tokens % E))
    assert loss is None
    with pytest.raises(
        ValueError, match="input_ids: expected a forward with token ids, which hash routing needs, got none"
    ):
        layer(x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy": "threshold"}, "policy: expected one of all, none, random, got 'threshold'"),
        ({"eval_policy": ""}, "eval_policy: expected one of"),
        ({"num_experts": 1}, "num_experts: expected at least 2"),
        ({"threshold": 0.0}, "threshold: expected a finite number above 0, got 0.0"),
        ({"eval_capacity_factor": -1.0}, "eval_capacity_factor: expected a finite number above 0 or None, got -1.0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Top2Router(**({"hidden_size": H, "num_experts": E} | options))


def test_needs_sequences():
    with pytest.raises(ValueError, match=r"x: expected shape \(B, T, H=12\), got \(5, 12\)"):
        Top2Router(H, E)(torch.randn(5, H))


@pytest.mark.parametrize("strict", [True, False])
def test_is_exported_for_any_batch(strict):
    router, sizes = Top2Router(H, E).eval(), {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    program = torch.export.export(router, (torch.randn(3, 5, H),), dynamic_shapes=(sizes,), strict=strict)
    x = torch.randn(2, 7, H)
    torch.testing.assert_close(program.module()(x), router(x))
