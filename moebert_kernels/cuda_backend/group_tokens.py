"""Grouping: one launch for all layers, by hash without expert ids in between (with a memset for long layers)."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels import native
from moebert_kernels.cuda_backend._arguments import INTEGERS, pointer, stream_of
from moebert_kernels.torch_backend import group_tokens as by_sorting
from moebert_kernels.torch_backend import hash_route

Maps = tuple[Tensor, Tensor, Tensor]


def forward(expert_ids: Tensor, num_experts: int) -> Maps:
    """(L, N) expert ids -> offsets (L, E + 1), row_to_assignment (L, N), assignment_to_row (L, N), all int32."""
    if num_experts > native.module().max_grouped_experts:  # a warp's counters would not fit
        return by_sorting.forward(expert_ids, num_experts)
    return _group(expert_ids, None, None, expert_ids.shape[0], num_experts)


def by_hash(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None, num_experts: int) -> Maps:
    """(N,) token ids through (L, V) tables -> the maps of `forward`."""
    if num_experts > native.module().max_grouped_experts:
        return forward(hash_route.forward(token_ids, tables, attention_mask), num_experts)
    return _group(token_ids, tables, attention_mask, tables.shape[0], num_experts)


def _group(ids: Tensor, tables: Tensor | None, mask: Tensor | None, layers: int, num_experts: int) -> Maps:
    """ids (N,) or (L, N), tables (L, V) or None, a mask (N,) of any number or None."""
    kernels, tokens = native.module(), ids.shape[-1]
    offsets = ids.new_empty(layers, num_experts + 1, dtype=torch.int32)
    row_to_assignment = ids.new_empty(layers, tokens, dtype=torch.int32)
    assignment_to_row = torch.empty_like(row_to_assignment)
    scratch_bytes = kernels.group_tokens_workspace_bytes(layers, tokens, num_experts)
    workspace = ids.new_empty(scratch_bytes, dtype=torch.uint8) if scratch_bytes else None
    if mask is not None and mask.is_complex():
        mask = mask != 0
    kernels.group_tokens(
        ids=ids.data_ptr(),
        ids_stride_layer=ids.stride(0) if ids.ndim == 2 else 0,
        ids_stride=ids.stride(-1),
        ids_type=INTEGERS[ids.dtype],
        tables=pointer(tables),
        tables_stride_layer=0 if tables is None else tables.stride(0),
        tables_stride=0 if tables is None else tables.stride(1),
        tables_type=0 if tables is None else INTEGERS[tables.dtype],
        mask=pointer(mask),
        mask_stride=0 if mask is None else mask.stride(0),
        mask_bytes=1 if mask is None else mask.element_size(),
        mask_is_float=mask is not None and mask.is_floating_point(),
        vocab_size=0 if tables is None else tables.shape[1],
        by_hash=tables is not None,
        offsets=offsets.data_ptr(),
        row_to_assignment=row_to_assignment.data_ptr(),
        assignment_to_row=assignment_to_row.data_ptr(),
        workspace=pointer(workspace),
        layers=layers,
        tokens=tokens,
        num_experts=num_experts,
        stream=stream_of(ids),
    )
    return offsets, row_to_assignment, assignment_to_row
