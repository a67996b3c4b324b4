"""Which neurons of a dense FFN each expert takes, and what importance that keeps: MoEBERT (2204.07675), section 3.1."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moebert_kernels.errors import UserError


def expert_indices(scores: Tensor, num_experts: int, expert_size: int, num_shared_neurons: int) -> Tensor:
    """Split the neurons of a layer, or of all layers, into experts by importance.

    Let `rank` be the neurons by descending score, equal scores by neuron number. Expert e takes
    rank[:num_shared_neurons] and every E-th of the rest, starting with the e-th, up to `expert_size`. So the shared
    neurons are copied into every expert, the next ones are dealt out, and the least important ones are left out.

    Args:
        scores: (D,) or (L, D), higher is more important.
        num_experts: E >= 1.
        expert_size: F, neurons per expert.
        num_shared_neurons: neurons that every expert gets, at most F.

    Returns:
        (E, F) or (L, E, F) int64 neuron numbers, in the order in which the experts store them.

    Raises:
        UserError: a number is out of range, the experts cannot be filled, or a score is not finite.
    """
    if scores.ndim not in (1, 2):
        raise UserError(f"scores: expected shape (D,) or (L, D), got {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        raise UserError("scores: expected finite numbers, got nan or inf")
    check_split(scores.shape[-1], num_experts, expert_size, num_shared_neurons)
    rank = scores.argsort(dim=-1, descending=True, stable=True)
    top, rest = rank[..., :num_shared_neurons], rank[..., num_shared_neurons:]
    own = expert_size - num_shared_neurons
    # (..., own * E) -> (..., E, own): position p of the rest goes to expert p % E
    dealt = rest[..., : own * num_experts].unflatten(-1, (own, num_experts)).transpose(-1, -2)
    everyone = top.unsqueeze(-2).expand(*dealt.shape[:-1], num_shared_neurons)
    return torch.cat([everyone, dealt], dim=-1).contiguous()


def default_split(D: int, expert_size: int | None = None, num_shared_neurons: int | None = None) -> tuple[int, int]:
    """Neurons of an expert and how many of them are shared, where they are not given (None).

    An expert gets a quarter of the dense layer's D neurons and shares two thirds of its own, which is a sixth of D: the
    768 and 512 of 3,072 that MoEBERT (2204.07675) takes for BERT-base.
    """
    expert_size = max(1, D // 4) if expert_size is None else expert_size
    return expert_size, 2 * expert_size // 3 if num_shared_neurons is None else num_shared_neurons


def check_split(D: int, num_experts: int, expert_size: int, num_shared_neurons: int) -> None:
    """Raise UserError unless experts of `expert_size`, some of it shared, can be filled from D neurons."""
    if num_experts < 1:
        raise UserError(f"num_experts: expected at least 1, got {num_experts}")
    if not 1 <= expert_size <= D:
        raise UserError(f"expert_size: expected 1 to the dense layer's {D} neurons, got {expert_size}")
    if not 0 <= num_shared_neurons <= expert_size:
        raise UserError(f"num_shared_neurons: expected 0 to expert_size={expert_size}, got {num_shared_neurons}")
    most = num_shared_neurons + (D - num_shared_neurons) // num_experts
    if expert_size > most:
        fills = next(s for s in range(num_shared_neurons, expert_size + 1) if s + (D - s) // num_experts >= expert_size)
        raise UserError(
            f"expert_size: expected at most {most} for {num_experts} experts with {num_shared_neurons} shared of the"
            f" dense layer's {D} neurons (or num_shared_neurons >= {fills}), got {expert_size}"
        )


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
