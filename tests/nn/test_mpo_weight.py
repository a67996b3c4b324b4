import copy
import math
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from moebert_kernels.errors import UserError
from moebert_kernels.nn import MPOWeight, shared_fold
from moebert_kernels.nn.mpo_weight import site_shapes
from tests.nn.mpo import E, H, counted_folds, small_experts


def loop_over_bonds(weight, expert):
    """The definition: a product of matrices over the bonds, for each pair of multi-indices."""
    sites = [s if s is weight.central else s[expert] for s in weight.sites]
    W = torch.zeros(weight.shape[1:])
    for row in range(W.shape[0]):
        for col in range(W.shape[1]):
            product, i, j = torch.ones(1, 1), row, col
            for site in reversed(sites):
                i, i_k = divmod(i, site.shape[1])
                j, j_k = divmod(j, site.shape[2])
                product = site[:, i_k, j_k] @ product
            W[row, col] = product
    return W


@torch.no_grad()
def test_folds_to_the_product_over_the_bonds():
    weight = MPOWeight(3, [2, 3, 2], [2, 1, 3])
    assert weight.shape == (3, 12, 6)
    for e in range(3):
        torch.testing.assert_close(weight()[e], loop_over_bonds(weight, e))


def test_shapes_of_the_t5_base_weight():
    shapes = site_shapes([4, 4, 8, 6, 4], [3, 4, 4, 4, 4])
    assert [shape[0] for shape in shapes] == [1, 12, 192, 384, 16]
    assert [math.prod(shape) for shape in shapes] == [144, 36864, 2359296, 147456, 256]
    assert [shape[0] for shape in site_shapes([4, 4, 8, 6, 4], [3, 4, 4, 4, 4], 16)] == [1, 12, 16, 16, 16]
    assert MPOWeight(2, [2, 3], [3, 2]).central.shape == (1, 2, 3, 6)


@torch.no_grad()
def test_drawn_sites_fold_to_the_wanted_deviation():
    weight = MPOWeight(8, [4, 4, 4, 4], [4, 4, 4, 4])
    weight.reset_parameters(std=0.02)
    assert weight().std().item() == pytest.approx(0.02, rel=0.1)


def test_kept_fold_follows_every_change():
    weight = MPOWeight(E, [2, 3, 4], [2, 3, 2]).eval()

    def fold():
        with torch.no_grad(), counted_folds() as folds:
            return weight(), folds.call_count

    first, folds = fold()
    assert folds == 1 and fold()[0] is first and fold()[1] == 0
    changes = [
        lambda: weight.central.mul_(2),
        lambda: weight.aux[1].add_(1),
        lambda: weight.load_state_dict(copy.deepcopy(weight.state_dict())),
        lambda: weight.double().float(),
        lambda: weight.train().eval(),
        lambda: weight.unfold(),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        assert fold()[1] == 1
        assert fold()[1] == 0
    torch.testing.assert_close(fold()[0], MPOWeight.forward(copy.deepcopy(weight).train()))
    with torch.autocast("cpu", torch.bfloat16):
        low, folds = fold()
        assert low.dtype == torch.bfloat16 and folds == 1 and fold()[1] == 0


@pytest.mark.parametrize("fused", [True, False])
def test_a_kept_fold_follows_an_optimizer(fused):
    weight = MPOWeight(E, [2, 3, 4], [2, 3, 2]).eval()
    optimizer = torch.optim.AdamW(weight.parameters(), lr=0.1, fused=fused)
    weight().sum().backward()
    with torch.no_grad():
        before = weight()
    optimizer.step()
    with torch.no_grad():
        after = weight()
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, copy.deepcopy(weight)())


@torch.no_grad()
def test_a_kept_fold_follows_tensors_that_come_and_go():
    """Whose addresses the next ones get."""
    experts, ids = small_experts().eval(), torch.tensor([0, 1, 0])
    x = torch.randn(3, H)
    first = [(name, site) for name, site in experts.named_parameters() if "w1" in name]
    y = [functional_call(experts, {name: site * n for name, site in first}, (x, ids)) for n in range(1, 30)]
    fresh = copy.deepcopy(experts).train()
    for n in range(1, 30):
        fresh.load_state_dict(experts.state_dict() | {name: site * n for name, site in first})
        assert torch.equal(y[n - 1], fresh(x, ids)), n


def test_old_sites_do_not_outlive_what_was_folded():
    experts, ids = small_experts().eval(), torch.tensor([0, 1, 0])
    with torch.no_grad():
        experts(torch.randn(3, H), ids)
    old = weakref.ref(experts.w1.central.untyped_storage())
    experts.train()
    experts.w1.central = nn.Parameter(experts.w1.central.detach().clone())
    assert old() is None


class Half(nn.Module):
    def forward(self, site):
        return site / 2


@torch.no_grad()
@pytest.mark.parametrize("kept_before", [True, False])
@pytest.mark.parametrize("of", ["central", "aux"])
def test_parametrized_sites_are_followed(of, kept_before):
    experts, ids = small_experts().eval(), torch.tensor([0, 1, 0])
    x = torch.randn(3, H)
    if kept_before:
        experts(x, ids), experts(x, ids)
    place, name = (experts.w1, "central") if of == "central" else (experts.w1.aux, "1")
    parametrize.register_parametrization(place, name, Half())
    for _ in range(3):
        place.parametrizations[name].original.mul_(3)
        assert torch.equal(experts(x, ids), experts(x, ids))
        torch.testing.assert_close(experts.w1(), copy.deepcopy(experts.w1).train()())
        torch.testing.assert_close(experts(x, ids), copy.deepcopy(experts).train()(x, ids))


def test_training_and_wanted_gradients_fold_each_time():
    weight = MPOWeight(E, [2, 3, 4], [2, 3, 2])
    with counted_folds() as folds:
        weight().sum().backward()
        weight.eval()().sum().backward()
        weight.train()
        with torch.no_grad():
            weight()
            weight()
    assert folds.call_count == 4
    with torch.inference_mode(), counted_folds() as folds:
        weight.eval()
        weight()
        weight()
    assert folds.call_count == 1
    x = torch.randn(H, requires_grad=True)
    (weight.requires_grad_(False)() @ x).sum().backward()  # what inference folded serves frozen weights too
    assert x.grad.any()


def test_copies_and_checkpoints_hold_no_folded_weights():
    weight = MPOWeight(E, [2, 3, 4], [2, 3, 2]).eval()
    weight.fold()
    assert copy.deepcopy(weight)._folded is None
    assert sorted(weight.state_dict()) == ["aux.0", "aux.1", "central"]


def step(experts, xs, context):
    experts.zero_grad()
    with context(experts):
        for x in xs:
            ids = torch.arange(x.shape[0]) % 3  # expert 3 stays without tokens
            experts(x, ids).square().sum().backward()
    return {name: p.grad for name, p in experts.named_parameters()}


def test_shared_fold_gives_the_gradients_of_separate_folds():
    experts = small_experts(bias="expert")
    xs = [torch.randn(n, H) for n in (7, 1, 5)]
    with counted_folds() as folds:
        wanted = step(experts, xs, lambda _: torch.enable_grad())
    assert folds.call_count == 2 * 3
    with counted_folds() as folds:
        got = step(experts, xs, shared_fold)
    assert folds.call_count == 2
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_shared_fold_drops_gradients_of_an_error():
    experts, x, ids = small_experts(), torch.randn(5, H), torch.arange(5) % E
    refused = pytest.raises(ValueError, match="shared_fold: expected no other one")
    with refused, shared_fold(experts), shared_fold(experts):
        pass
    with pytest.raises(RuntimeError, match="stop"), shared_fold(experts):
        experts(x, ids).sum().backward()
        raise RuntimeError("stop")
    assert experts.w1.central.grad is None and not experts.w1.has_leaf


def test_shared_fold_closes_what_it_opened_before_an_error(monkeypatch):
    experts = small_experts()
    monkeypatch.setattr(experts.w2, "open_leaf", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), shared_fold(experts):
        pass
    assert not experts.w1.has_leaf


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: MPOWeight(2, [2], [2]), "row_factors: expected at least 2"),
        (lambda: MPOWeight(2, [2, 3], [2]), r"col_factors: expected 2 of them \(as row_factors\), got 1"),
        (lambda: MPOWeight(2, [2, 0], [2, 1]), r"row_factors: expected integers >= 1, got \[2, 0\]"),
        (lambda: MPOWeight(2, [2, 3], [2, 1], 0), "max_bond: expected integers >= 1, got 0"),
        (lambda: MPOWeight(2, [2, 3], [2, 1], [4, 4]), "max_bond: expected 1 caps for 2 sites, got 2"),
        (
            lambda: small_experts(w1_factors=([2, 3, 4], [2, 2, 2])),
            r"w1_factors: expected products \(24, 12\), got \(24, 8\)",
        ),
    ],
)  # fmt: skip
def test_wrong_shapes_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
