"""Grouping by one stable sort per layer: deterministic, and cheap compared with the GEMMs that use it."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(L, N) expert ids -> offsets (L, E + 1), row_to_assignment (L, N), assignment_to_row (L, N), all int32."""
    layers, rows = expert_ids.shape
    if expert_ids.dtype.itemsize < 4:
        expert_ids = expert_ids.int()  # a byte cannot hold E = 256
    key = expert_ids.clamp(max=num_experts).masked_fill_(expert_ids < 0, num_experts)
    # Small keys sort faster; int16 holds every id up to num_experts itself.
    key = key.to(torch.int16 if num_experts < 2**15 else torch.int64)
    sorted_key, row_to_assignment = key.sort(dim=1, stable=True)
    assignment_to_row = torch.empty_like(row_to_assignment)
    assignment_to_row.scatter_(1, row_to_assignment, torch.arange(rows, device=key.device).expand(layers, rows))
    bounds = torch.arange(num_experts + 1, device=key.device, dtype=key.dtype)
    offsets = torch.searchsorted(sorted_key, bounds.expand(layers, -1).contiguous(), out_int32=True)
    return offsets, row_to_assignment.int(), assignment_to_row.int()
