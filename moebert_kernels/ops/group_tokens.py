"""Grouping: sort the assignments of tokens to experts by expert, stably, for one layer or for all at once."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels import backend
from moebert_kernels.grouping import Grouping
from moebert_kernels.ops._checks import (
    check_integers,
    check_not_traced,
    check_num_experts,
    inside_op,
    opaque,
    transformed,
    trusted,
)
from moebert_kernels.ops.hash_route import check_token_ids, route_flat


def group_tokens(expert_ids: Tensor, num_experts: int) -> Grouping:
    """Group tokens by expert.

    Args:
        expert_ids: (T,) or (T, top_k) integer; flatten other shapes, such as (B, T, top_k), to these. Ids outside
            [0, num_experts) are skipped.
        num_experts: E >= 1.

    Returns:
        Grouping with int32 offsets (E + 1,), row_to_assignment and assignment_to_row (T * top_k,).

    Raises:
        ValueError: a dtype or shape disagrees with the above.
    """
    check_not_traced("group_tokens")
    expert_ids, top_k = check_expert_ids(expert_ids)
    check_num_experts(num_experts)
    run = torch.ops.moebert_kernels.group_tokens if opaque(expert_ids) or transformed() else _group_tokens
    offsets, row_to_assignment, assignment_to_row = run(expert_ids.reshape(1, -1), num_experts)
    return trusted(Grouping(offsets[0], row_to_assignment[0], assignment_to_row[0], top_k))


def check_expert_ids(expert_ids: Tensor, name: str = "expert_ids") -> tuple[Tensor, int]:
    """Ids (T,) or (T, top_k) in a dtype that kernels load, and top_k."""
    expert_ids = check_integers(name, expert_ids)
    if expert_ids.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape (T,) or (T, top_k), got {tuple(expert_ids.shape)}")
    top_k = 1 if expert_ids.ndim == 1 else expert_ids.shape[1]
    if top_k < 1:
        raise ValueError(f"{name}: expected top_k >= 1, got {tuple(expert_ids.shape)}")
    return expert_ids, top_k


def group_tokens_by_hash(
    token_ids: Tensor, tables: Tensor, num_experts: int, attention_mask: Tensor | None = None
) -> list[Grouping]:
    """Route by hash and group, for all layers at once: hash routing depends on the token ids alone.

    Args:
        token_ids: any shape, integer, flattened to T tokens.
        tables: (L, V) integer. One table per layer.
        num_experts: E >= 1.
        attention_mask: shape of `token_ids`; tokens where it is 0 are skipped.

    Returns:
        One Grouping per layer.

    Raises:
        ValueError: a dtype, shape or device disagrees with the above.
    """
    check_not_traced("group_tokens_by_hash")
    tables = check_integers("tables", tables)
    check_num_experts(num_experts)
    if tables.ndim != 2:
        raise ValueError(f"tables: expected shape (L, V), got {tuple(tables.shape)}")
    token_ids = check_token_ids(token_ids, tables, attention_mask)
    mask = None if attention_mask is None else attention_mask.reshape(-1)
    one_node = opaque(token_ids) or transformed()
    by_hash = torch.ops.moebert_kernels.group_tokens_by_hash if one_node else _group_tokens_by_hash
    maps = by_hash(token_ids.reshape(-1), tables, mask, num_experts)
    return [trusted(Grouping(*layer)) for layer in zip(*(m.unbind(0) for m in maps), strict=True)]


def _group_tokens(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    with inside_op(expert_ids):
        return backend.implementation("group_tokens", expert_ids).forward(expert_ids, num_experts)


def _group_tokens_by_hash(
    token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(L, N) maps of (N,) token ids; in one step where the backend has one."""
    with inside_op(token_ids):
        grouping = backend.implementation("group_tokens", token_ids)
        if hasattr(grouping, "by_hash"):
            return grouping.by_hash(token_ids, tables, attention_mask, num_experts)
    return _group_tokens(route_flat(token_ids, tables, attention_mask), num_experts)


@torch.library.custom_op("moebert_kernels::group_tokens", mutates_args=())
def _group_tokens_op(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _group_tokens(expert_ids, num_experts)


@_group_tokens_op.register_fake
def _(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_maps(expert_ids, expert_ids.shape[0], expert_ids.shape[1], num_experts)


@torch.library.custom_op("moebert_kernels::group_tokens_by_hash", mutates_args=())
def _group_tokens_by_hash_op(
    token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _group_tokens_by_hash(token_ids, tables, attention_mask, num_experts)


@_group_tokens_by_hash_op.register_fake
def _(
    token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_maps(token_ids, tables.shape[0], token_ids.shape[0], num_experts)


def _empty_maps(ids: Tensor, layers: int, rows: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = ids.new_empty(layers, num_experts + 1, dtype=torch.int32)
    permutation = ids.new_empty(layers, rows, dtype=torch.int32)
    return offsets, permutation, torch.empty_like(permutation)
