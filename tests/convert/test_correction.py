"""The closed form against least squares on the activations themselves."""

import pytest
import torch
import torch.nn.functional as F

from moebert_kernels.convert.correction import Moments, prune, refit, strongest

H, D, N = 5, 24, 400


@pytest.fixture
def layer():
    """Activations (N, D) of correlated neurons, weights of tokens, w2 (H, D), b2 (H,)."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, 8, generator=generator) @ torch.randn(8, D, generator=generator)
    h = (h + 0.3 * torch.randn(N, D, generator=generator) + 0.5).relu()
    weight = torch.rand(N, generator=generator) + 0.1
    return h, weight, torch.randn(H, D, generator=generator), torch.randn(H, generator=generator)


def moments_of(h, weight, centred=True):
    mean = weight @ h / weight.sum() if centred else torch.zeros(h.shape[1])
    c = (h - mean) * (weight / weight.sum()).sqrt()[:, None]
    return Moments(float(weight.sum()), mean, c.T @ c)


@pytest.mark.parametrize("has_bias", [True, False])
def test_without_ridge_it_is_the_least_squares(layer, has_bias):
    h, weight, w2, b2 = layer
    b2 = b2 if has_bias else None
    kept = torch.tensor([3, 0, 17, 9])
    found = refit(w2, b2, moments_of(h, weight, has_bias), kept, ridge=0.0)
    design = torch.cat([h[:, kept], torch.ones(N, 1)], 1) if has_bias else h[:, kept]
    root = weight.sqrt()[:, None].double()
    want = torch.linalg.lstsq(root * design.double(), root * F.linear(h, w2, b2).double()).solution.T.float()
    torch.testing.assert_close(found.w2, want[:, :4], rtol=1e-3, atol=1e-3)
    if has_bias:
        torch.testing.assert_close(found.b2, want[:, 4], rtol=1e-3, atol=1e-3)
    else:
        assert found.b2 is None


def test_a_large_ridge_keeps_the_dense_weights_and_all_neurons_change_nothing(layer):
    h, weight, w2, b2 = layer
    moments = moments_of(h, weight)
    kept = torch.arange(6)
    torch.testing.assert_close(refit(w2, b2, moments, kept, ridge=1e9).w2, w2[:, :6])
    whole = refit(w2, b2, moments, torch.arange(D))
    torch.testing.assert_close(whole.w2, w2)
    torch.testing.assert_close(whole.b2, b2, atol=1e-5, rtol=1e-5)


def test_pruned_neurons_lose_less_than_the_strongest(layer):
    h, weight, w2, b2 = layer
    moments = moments_of(h, weight)

    def lost(kept):
        w, k = refit(w2, b2, moments, kept), kept
        missing = F.linear(h, w2, b2) - F.linear(h[:, k], w.w2, w.b2)
        return float((weight[:, None] * missing.square()).sum())

    kept = prune(w2, moments, 8)
    assert len(set(kept.tolist())) == 8
    assert lost(kept) < lost(strongest(w2, moments, 8)) < lost(strongest(w2, moments, D).flip(0)[:8])


def test_neurons_that_must_stay_do(layer):
    h, weight, w2, _ = layer
    weakest = strongest(w2, moments_of(h, weight), D)[-3:]
    kept = prune(w2, moments_of(h, weight), 8, weakest)
    assert set(weakest.tolist()) <= set(kept.tolist())


def test_neurons_without_variance_stay_as_they_are(layer):
    _, _, w2, b2 = layer
    nothing = Moments(1.0, torch.zeros(D), torch.zeros(D, D))
    assert torch.equal(refit(w2, b2, nothing, torch.arange(4)).w2, w2[:, :4])
    assert len(prune(w2, nothing, 4)) == 4


def test_mixed_moments_are_those_of_both_texts(layer):
    h, weight, *_ = layer
    a, b = moments_of(h[:100], weight[:100], False), moments_of(h[100:], weight[100:], False)
    both = a.mixed_with(b, b.weight)
    torch.testing.assert_close(both.covariance, moments_of(h, weight, False).covariance, rtol=1e-4, atol=1e-4)
    empty = Moments(0.0, torch.zeros(D), torch.zeros(D, D)).mixed_with(a, 3.0)
    assert torch.equal(empty.covariance, a.covariance)
