"""Grouping: two launches for all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels.kernels.group_tokens import group_tokens, num_spans
from moebert_kernels.kernels.launch import empty, recorded
from moebert_kernels.kernels.tiles import padded_experts
from moebert_kernels.torch_backend import group_tokens as by_sorting

_MAX_EXPERTS = 1024


@recorded
def forward(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(L, N) expert ids -> offsets (L, E + 1), row_to_assignment (L, N), assignment_to_row (L, N), all int32."""
    if num_experts > _MAX_EXPERTS:  # comparing with every expert costs more than a sort
        return by_sorting.forward(expert_ids, num_experts)
    layers, rows = expert_ids.shape
    row_to_assignment = empty(expert_ids, layers, rows, dtype=torch.int32)
    assignment_to_row = empty(row_to_assignment, layers, rows)
    if layers * rows == 0:
        return row_to_assignment.new_zeros(layers, num_experts + 1), row_to_assignment, assignment_to_row
    offsets = empty(row_to_assignment, layers, num_experts + 1)
    counts = empty(row_to_assignment, layers, num_spans(rows), padded_experts(num_experts))
    group_tokens(expert_ids, num_experts, counts, offsets, row_to_assignment, assignment_to_row)
    return offsets, row_to_assignment, assignment_to_row
