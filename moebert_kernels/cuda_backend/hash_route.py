"""Hash routing: one launch for all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels import native
from moebert_kernels.cuda_backend._arguments import lookup_arguments, stream_of


def forward(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(N,) token ids through (L, V) tables -> (L, N) int32 expert ids, -1 where masked or outside the tables."""
    layers, tokens = tables.shape[0], token_ids.shape[0]
    expert_ids = token_ids.new_empty(layers, tokens, dtype=torch.int32)
    native.module().hash_route(
        *lookup_arguments(token_ids, tables, attention_mask),
        expert_ids.data_ptr(), layers, tokens, stream_of(token_ids),
    )  # fmt: skip
    return expert_ids
