"""What a conversion came to: the share of the importance that a token meets."""

import pytest
import torch

from moebert_kernels.convert import expert_indices, importance_kept
from moebert_kernels.errors import UserError


def test_importance_kept_is_the_mean_over_the_experts_of_a_layer():
    scores = torch.rand(3, 24)
    kept = importance_kept(scores, 4, 6, 3)
    experts = expert_indices(scores, 4, 6, 3)
    shares = [
        [float(row[neurons].sum() / row.sum()) for neurons in layer] for row, layer in zip(scores, experts, strict=True)
    ]
    by_layer = [sum(layer) / len(layer) for layer in shares]
    assert kept.mean == pytest.approx(sum(by_layer) / 3, rel=1e-6)
    assert kept.least == pytest.approx(min(by_layer), rel=1e-6)
    assert kept.layer == by_layer.index(min(by_layer)) + 1


def test_importance_kept_of_known_scores():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert importance_kept(scores, 1, 2, 2) == (pytest.approx((0.7 + 0.5) / 2), 0.5, 2)
    assert importance_kept(scores, 2, 2, 1) == (pytest.approx((0.65 + 0.5) / 2), 0.5, 2)
    assert str(importance_kept(scores, 1, 2, 2)) == "60.0 % on average, 50.0 % in layer 2, which keeps least"


def test_a_layer_without_importance_is_refused():
    with pytest.raises(UserError, match="importance: expected a sum above 0 in each layer, got one without"):
        importance_kept(torch.zeros(1, 4), 1, 2, 2)
