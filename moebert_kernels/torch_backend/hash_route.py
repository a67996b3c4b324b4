"""Hash routing: one bounds-safe table lookup."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(N,) token ids through (L, V) tables -> (L, N) int32 expert ids, -1 where masked or outside the tables."""
    vocab_size = tables.shape[1]
    token_ids = token_ids.long()  # a byte cannot be compared with V = 256
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if attention_mask is not None:
        outside |= attention_mask == 0
    if vocab_size == 0:
        return torch.full((tables.shape[0], token_ids.shape[0]), -1, dtype=torch.int32, device=token_ids.device)
    experts = tables.index_select(1, token_ids.masked_fill(outside, 0))
    expert_ids = experts.int().masked_fill_(outside, -1)
    return expert_ids.masked_fill_(expert_ids != experts, -1) if tables.dtype == torch.int64 else expert_ids
