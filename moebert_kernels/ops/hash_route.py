"""Hash routing: the expert of a token is a table entry of its vocabulary id."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels import backend
from moebert_kernels.ops._checks import check_integers, check_mask, check_not_traced, inside_op, opaque, transformed


def hash_route(token_ids: Tensor, table: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Look up the expert of each token (MoEBERT, arXiv 2204.07675, section 3.2).

    Args:
        token_ids: any shape, integer. Vocabulary ids; ids outside [0, V) are never read out of bounds.
        table: (V,) integer. Expert of each vocabulary id.
        attention_mask: shape of `token_ids`, bool or number; 0 means padding.

    Returns:
        int32, shape of `token_ids`; -1 where masked or outside the table, or where the entry is no int32.

    Raises:
        ValueError: a dtype, shape or device disagrees with the above.
    """
    check_not_traced("hash_route")
    table = check_integers("table", table)
    if table.ndim != 1:
        raise ValueError(f"table: expected shape (V,), got {tuple(table.shape)}")
    token_ids = check_token_ids(token_ids, table, attention_mask)
    mask = None if attention_mask is None else attention_mask.reshape(-1)
    return route_flat(token_ids.reshape(-1), table[None], mask)[0].view(token_ids.shape)


def check_token_ids(token_ids: Tensor, table: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`token_ids` in a dtype that kernels load."""
    token_ids = check_integers("token_ids", token_ids)
    if token_ids.device != table.device:
        raise ValueError(f"token_ids: expected device {table.device} (as the table), got {token_ids.device}")
    check_mask(attention_mask, "token_ids", token_ids)
    return token_ids


def route_flat(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(N,) ids through (L, V) tables -> (L, N) int32. Arguments are checked."""
    run = torch.ops.moebert_kernels.hash_route if opaque(token_ids) or transformed() else _hash_route
    return run(token_ids, tables, attention_mask)


def _hash_route(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None) -> Tensor:
    with inside_op(token_ids):
        return backend.implementation("hash_route", token_ids).forward(token_ids, tables, attention_mask)


@torch.library.custom_op("moebert_kernels::hash_route", mutates_args=())
def _hash_route_op(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None) -> Tensor:
    return _hash_route(token_ids, tables, attention_mask)


@_hash_route_op.register_fake
def _(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None) -> Tensor:
    return token_ids.new_empty(tables.shape[0], token_ids.shape[0], dtype=torch.int32)
