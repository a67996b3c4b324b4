"""Grouping: one launch for all layers, by hash without expert ids in between (with a memset for long layers)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebert_kernels import native
from moebert_kernels.cuda_backend import hash_route
from moebert_kernels.cuda_backend._arguments import lookup_arguments, stream_of
from moebert_kernels.torch_backend import group_tokens as by_sorting

Maps = tuple[Tensor, Tensor, Tensor]


def forward(expert_ids: Tensor, num_experts: int) -> Maps:
    """(L, N) expert ids -> offsets (L, E + 1), row_to_assignment (L, N), assignment_to_row (L, N), all int32."""
    if num_experts > native.module().max_grouped_experts:  # a warp's counters would not fit
        return by_sorting.forward(expert_ids, num_experts)
    return _group(expert_ids, None, None, expert_ids.shape[0], num_experts)[0]


def by_hash(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None, num_experts: int) -> Maps:
    """(N,) token ids through (L, V) tables -> the maps of `forward`."""
    if num_experts > native.module().max_grouped_experts:
        return forward(hash_route.forward(token_ids, tables, attention_mask), num_experts)
    return _group(token_ids, tables, attention_mask, tables.shape[0], num_experts)[0]


def with_tile_maps(expert_ids: Tensor, num_experts: int, block_rows: Sequence[int]) -> tuple[Maps, list[Tensor]]:
    """The maps of `forward`, and of the same launch `Grouping.tile_map` of each layer for up to 4 sizes of a tile.

    Args:
        expert_ids: (L, N) integer.
        num_experts: 1 to 1,024.
        block_rows: the sizes, in rows.

    Returns:
        The maps, and for each size (L, N // size + E, 2) int32.
    """
    return _group(expert_ids, None, None, expert_ids.shape[0], num_experts, block_rows)


def _group(
    ids: Tensor, tables: Tensor | None, mask: Tensor | None, layers: int, num_experts: int,
    block_rows: Sequence[int] = (),
) -> tuple[Maps, list[Tensor]]:  # fmt: skip
    kernels, tokens = native.module(), ids.shape[-1]
    offsets = ids.new_empty(layers, num_experts + 1, dtype=torch.int32)
    row_to_assignment = ids.new_empty(layers, tokens, dtype=torch.int32)
    assignment_to_row = torch.empty_like(row_to_assignment)
    tile_maps = [offsets.new_empty(layers, tokens // rows + num_experts, 2) for rows in block_rows]
    scratch_bytes = kernels.group_tokens_workspace_bytes(layers, tokens, num_experts)
    workspace = ids.new_empty(scratch_bytes, dtype=torch.uint8) if scratch_bytes else None
    kernels.group_tokens(
        *lookup_arguments(ids, tables, mask), tables is not None,
        offsets.data_ptr(), row_to_assignment.data_ptr(), assignment_to_row.data_ptr(),
        [(tile_map.data_ptr(), rows) for tile_map, rows in zip(tile_maps, block_rows, strict=True)],
        0 if workspace is None else workspace.data_ptr(), layers, tokens, num_experts, stream_of(ids),
    )  # fmt: skip
    return (offsets, row_to_assignment, assignment_to_row), tile_maps
