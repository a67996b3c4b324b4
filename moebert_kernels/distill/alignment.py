"""Sentence-level feature alignment (FAL), and the maps that take a student's features to its teacher's size.

[paper] [CLS], max pooling and mean pooling are robust sentence vectors whose distillation is crucial; a
"feature-mapping" lets as much of the teacher's information as possible pass. [reading] Distance, layers, weights; the
maps as a linear layer for each state, without a bias, trained with the student and dropped at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_kernels.convert.sample_loss import at_least_float32

View = Literal["cls", "max", "mean"]
VIEWS: tuple[View, ...] = ("cls", "max", "mean")
Distance = Literal["mse", "cosine"]


def pool(hidden: Tensor, mask: Tensor, views: Sequence[View] = VIEWS) -> Tensor:
    """Sentence vectors (B, len(views), H) of hidden states (B, T, H), in at least float32.

    "cls" is the first position where `mask` (B, T) is not 0, "max" and "mean" are over all of these. What stands
    elsewhere has no influence: the maximum sees the dtype's lowest number there. A sequence of padding alone gives its
    position 0, that number and 0.
    """
    hidden, valid = at_least_float32(hidden), (mask != 0).unsqueeze(-1)
    pooled = []
    for view in views:
        if view == "cls":
            first = valid.long().argmax(1, keepdim=True)  # (B, 1, 1): padding may be on the left
            pooled.append(hidden.gather(1, first.expand(-1, -1, hidden.shape[-1]))[:, 0])
        elif view == "max":
            pooled.append(hidden.masked_fill(~valid, torch.finfo(hidden.dtype).min).amax(1))
        else:
            count = valid.sum(1).clamp(min=1)
            pooled.append(hidden.masked_fill(~valid, 0.0).sum(1) / count)
    return torch.stack(pooled, 1)


def vector_distance(vectors: Tensor, teacher_vectors: Tensor, distance: Distance = "mse") -> Tensor:
    """Mean distance of (..., H) vectors: mean squared difference, or 1 - cosine; in at least float32."""
    ours, theirs = at_least_float32(vectors), at_least_float32(teacher_vectors)
    if distance == "mse":
        return (ours - theirs).square().mean()
    return (1.0 - F.cosine_similarity(ours, theirs, dim=-1)).mean()


class FeatureMaps(nn.Module):
    """A linear map without bias for each of some student states, (..., d_student) -> (..., d_teacher).

    They start as the identity, or with orthonormal rows or columns where the sizes differ.

    Args:
        layers: the student's states, 0 the embeddings' output.
        seed: of the first weights; the global generators are left alone.
        first: state -> (teacher_size, student_size) weights to start from instead, of any of them.
    """

    def __init__(
        self,
        layers: Iterable[int],
        student_size: int,
        teacher_size: int,
        seed: int = 0,
        first: Mapping[int, Tensor] | None = None,
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            maps = {str(layer): nn.Linear(student_size, teacher_size, bias=False) for layer in layers}
            for linear in maps.values():
                initialise = nn.init.eye_ if student_size == teacher_size else nn.init.orthogonal_
                initialise(linear.weight)
            with torch.no_grad():
                for layer, weight in (first or {}).items():
                    maps[str(layer)].weight.copy_(weight)
        self.layers = nn.ModuleDict(maps)

    def forward(self, layer: int, features: Tensor) -> Tensor:
        return self.layers[str(layer)](at_least_float32(features))
