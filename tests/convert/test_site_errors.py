"""Errors, means and moments against the same from all activations at once."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moebert_kernels import reference
from moebert_kernels.convert import site_errors
from moebert_kernels.convert.correction import Refit
from moebert_kernels.convert.site_errors import SiteErrors
from moebert_kernels.convert.sites import DenseWeights
from moebert_kernels.convert.text_pass import SiteText

H, D, N = 6, 10, 50


def case(activation="gelu", is_normed=True, has_bias=True):
    generator = torch.Generator().manual_seed(0)
    rows = 2 * D if activation == "swiglu" else D
    shapes = ((rows, H), (rows,), (H, D), (H,))
    w1, b1, w2, b2 = (torch.randn(shape, generator=generator) for shape in shapes)
    dense = DenseWeights(w1, b1 if has_bias else None, w2, b2 if has_bias else None)
    x = torch.randn(N, H, generator=generator)
    held_out = torch.arange(N) >= 40
    stream = torch.rand(N, generator=generator) + 0.5
    text = SiteText(torch.arange(N), x, held_out, stream, is_normed)
    h = reference.activate(F.linear(x, w1, dense.b1), activation)
    return SiteErrors(dense, activation, text), dense, x, h, stream


@pytest.fixture(autouse=True, params=[7, 2048])
def chunk(request, monkeypatch):
    monkeypatch.setattr(site_errors, "_CHUNK", request.param)


@pytest.mark.parametrize("is_normed", [True, False])
@pytest.mark.parametrize(("activation", "has_bias"), [("gelu", True), ("swiglu", False)])
def test_errors(activation, has_bias, is_normed):
    site, dense, x, h, stream = case(activation, is_normed, has_bias)
    kept = torch.tensor([[0, 3, 5], [9, 8, 1]])
    b2 = None if dense.b2 is None else dense.b2 + 1
    experts = [Refit(k, dense.w2[:, k] * 1.1, b2) for k in kept]
    tokens = torch.tensor([4, 11, 12, 40])
    got = site.errors(experts, tokens)
    exact = F.linear(h, dense.w2, dense.b2)
    for e, expert in enumerate(experts):
        output = F.linear(h[:, expert.kept], expert.w2, expert.b2)
        if is_normed:
            want = (F.layer_norm(x + output, (H,)) - F.layer_norm(x + exact, (H,))).square().mean(1)
        else:
            want = (output - exact).square().mean(1) / stream
        torch.testing.assert_close(got[:, e], want[tokens])
    whole = [Refit(torch.arange(D), dense.w2, dense.b2)]
    assert site.errors(whole, tokens).max() < 1e-9


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("groups", [3, 100])
def test_means_and_moments(groups, has_bias):
    site, _, x, h, _ = case(has_bias=has_bias)
    train = site.train
    assert train.tolist() == [*range(40)] and site.judged.tolist() == [*range(40, N)]
    group = torch.arange(len(train)) % 3
    weight = 1 / (x + site.output).var(1, unbiased=False)
    torch.testing.assert_close(site.weight, weight)
    total, means, squares = site.means(group, groups)
    *parts, whole = site.moments(group, 3)
    for g, tokens in enumerate([*(train[group == g] for g in range(3)), train]):
        w, a = weight[tokens], h[tokens]
        mean, square = w @ a / w.sum(), w @ a.square() / w.sum()
        found = whole if g == 3 else parts[g]
        if g < 3:
            torch.testing.assert_close(total[g], w.sum())
            torch.testing.assert_close(means[g], mean)
            torch.testing.assert_close(squares[g], square)
        centre = mean if has_bias else torch.zeros(D)
        torch.testing.assert_close(found.mean, centre)
        want = (a - centre).T @ ((a - centre) * w[:, None]) / w.sum()
        torch.testing.assert_close(found.covariance, want, rtol=1e-4, atol=1e-4)
        assert found.weight == pytest.approx(float(w.sum()))


def test_half_of_the_weight_goes_by_the_gradient():
    site, dense, _, h, _ = case()
    gradient = torch.rand(N, generator=torch.Generator().manual_seed(1))
    found = SiteErrors(dense, "gelu", replace(site.text, gradient=gradient))
    assert torch.equal(found.weight, site.weight)
    share = gradient / site.weight
    weight = site.weight * (0.5 + 0.5 * share / share.mean())
    torch.testing.assert_close(found.weight_by_gradient(), weight)
    whole = found.moments(torch.zeros(len(site.train), dtype=torch.long), 1, found.weight_by_gradient())[-1]
    w = weight[site.train]
    torch.testing.assert_close(whole.mean, w @ h[site.train] / w.sum())


def test_a_group_without_tokens_has_no_weight():
    site, *_ = case()
    *parts, whole = site.moments(torch.zeros(len(site.train), dtype=torch.long), 2)
    assert parts[1].weight == 0
    mixed = parts[1].mixed_with(whole, 10.0)
    torch.testing.assert_close(mixed.covariance, whole.covariance)


def test_without_held_out_tokens_all_judge():
    site, dense, *_ = case()
    text = SiteText(*(t for t in site.text.__dict__.values()))
    all_choose = SiteText(text.ids, text.x, torch.zeros(N, dtype=torch.bool), text.stream, True)
    assert torch.equal(SiteErrors(dense, "gelu", all_choose).judged, torch.arange(N))


def test_tokens_that_choose_come_before_those_that_judge():
    site, dense, x, _, stream = case()
    held_out = torch.arange(N) % 5 == 4
    text = SiteText(torch.arange(N), x, held_out, stream, True, torch.arange(N).float())
    found = SiteErrors(dense, "gelu", text)
    order = [n for n in range(N) if n % 5 != 4] + [n for n in range(N) if n % 5 == 4]
    assert found.text.ids.tolist() == found.text.gradient.tolist() == order
    assert found.train.tolist() == [*range(40)] and found.judged.tolist() == [*range(40, N)]
    torch.testing.assert_close(found.output, site.output[order])
    torch.testing.assert_close(found.weight, site.weight[order])
