"""Hash routing: one launch for all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels.kernels.hash_route import hash_route
from moebert_kernels.kernels.launch import empty, recorded


@recorded
def forward(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(N,) token ids through (L, V) tables -> (L, N) int32 expert ids, -1 where masked or outside the tables."""
    expert_ids = empty(token_ids, tables.shape[0], token_ids.shape[0], dtype=torch.int32)
    hash_route(token_ids, tables, attention_mask, expert_ids)
    return expert_ids
