"""What a conversion came to: how much of the importance the experts keep."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moebert_kernels.convert.split import expert_indices
from moebert_kernels.errors import UserError


class Share(NamedTuple):
    """A share of the importance, between 0 and 1: its mean over the layers, and the layer, from 1, that has least."""

    mean: float
    least: float
    layer: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % on average, {100 * self.least:.1f} % in layer {self.layer}, which keeps least"


def importance_kept(scores: Tensor, num_experts: int, expert_size: int, num_shared_neurons: int) -> Share:
    """The importance of an expert's neurons over that of all neurons of its layer, as a mean over the experts.

    It is the share that a token meets. Layers count alike, whatever their sums.

    Args:
        scores: (L, D), at least 0.
        num_experts, expert_size, num_shared_neurons: the split; see `expert_indices`.

    Raises:
        UserError: a split that cannot be filled, or a layer without any importance.
    """
    scores = scores.double()
    totals = scores.sum(-1)
    if not (totals > 0).all():
        raise UserError("importance: expected a sum above 0 in each layer, got one without")
    indices = expert_indices(scores, num_experts, expert_size, num_shared_neurons)  # (L, E, F)
    kept = torch.gather(scores, 1, indices.flatten(1)).sum(-1) / (num_experts * totals)
    return Share(float(kept.mean()), float(kept.min()), int(kept.argmin()) + 1)
