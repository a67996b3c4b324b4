"""Hash routing: a fixed table, token id -> expert, saved and moved with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.grouping import Grouping
from moebert_kernels.nn._checks import check_sizes
from moebert_kernels.ops.group_tokens import group_tokens_by_hash
from moebert_kernels.ops.hash_route import hash_route


class HashRouter(nn.Module):
    """Route each token by its id alone: `expert_ids = table[token_ids]` (MoEBERT, 2204.07675, section 3.2).

    Args:
        table: (V,) of any integer dtype, values in [0, num_experts). Kept as a persistent buffer `table` of
            `table_dtype(num_experts)`.
        num_experts: E.

    Raises:
        UserError: a table of another shape, dtype or range, here and in `load_state_dict`.
    """

    table: Tensor

    def __init__(self, table: Tensor, num_experts: int) -> None:
        super().__init__()
        check_sizes(num_experts=num_experts)
        self.num_experts = num_experts
        self.register_buffer("table", checked_table(table, num_experts).clone())

    def forward(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Expert ids, int32 of the shape of `token_ids`; -1 where `attention_mask` is 0 or the id has no entry."""
        return hash_route(token_ids, self.table, attention_mask)

    @property
    def vocab_size(self) -> int:
        return self.table.shape[0]

    def resize(self, vocab_size: int) -> None:
        """Cut the table, or extend it: new tokens get random experts from torch's CPU generator."""
        extra = vocab_size - self.vocab_size
        if extra > 0:
            drawn = torch.randint(0, self.num_experts, (extra,), dtype=self.table.dtype)
            self.table = torch.cat([self.table, drawn.to(self.table.device)])
        else:
            self.table = self.table[:vocab_size].clone()

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, num_experts={self.num_experts}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "table"
        if key in state_dict:
            state_dict[key] = checked_table(state_dict[key], self.num_experts, self.vocab_size, key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def group_by_hash(
    routers: Sequence[HashRouter], token_ids: Tensor, attention_mask: Tensor | None = None
) -> list[Grouping] | None:
    """The groupings of token ids for all layers in one step, before the first of them runs.

    Args:
        routers: one for each layer.
        token_ids, attention_mask: as for `group_tokens_by_hash`.

    Returns:
        A Grouping per router. None where one step cannot do it, and each layer has to route by its own router: tables
        on other devices, or loaded only when their module runs (big-model inference of accelerate).
    """
    tables = [router.table for router in routers]
    if any(table.device != token_ids.device for table in tables):
        return None
    return group_tokens_by_hash(token_ids, _stacked(tables), routers[0].num_experts, attention_mask)


def join_tables(routers: Sequence[HashRouter]) -> None:
    """Place the tables of these routers one after another in memory, so that no forward has to stack them."""
    for router, table in zip(routers, torch.stack([router.table for router in routers]), strict=True):
        router.table = table


def _stacked(tables: Sequence[Tensor]) -> Tensor:
    """The tables as (L, V), without a copy if they lie one after another in memory."""
    first, V = tables[0], tables[0].shape[0]
    if not torch.compiler.is_compiling() and not first.is_meta:
        start, step = first.data_ptr(), V * first.element_size()
        inside = first.untyped_storage().nbytes() >= (first.storage_offset() + len(tables) * V) * first.element_size()
        if inside and all(table.data_ptr() == start + k * step for k, table in enumerate(tables)):
            return first.as_strided((len(tables), V), (V, 1))
    return torch.stack(tuple(tables))


def table_dtype(num_experts: int) -> torch.dtype:
    """uint8 where it is enough: all layers' tables are read in every forward. int16 cannot be broadcast by DDP."""
    return torch.uint8 if num_experts <= 256 else torch.int32


def checked_table(table: Tensor, num_experts: int, vocab_size: int | None = None, name: str = "table") -> Tensor:
    """The table, contiguous and of `table_dtype`, after checking its shape, dtype and values.

    Raises:
        UserError: what was expected and what came.
    """
    if not isinstance(table, Tensor):
        raise UserError(f"{name}: expected a tensor, got {type(table).__name__}")
    entries = "(V,)" if vocab_size is None else f"({vocab_size},), one entry per token of the vocabulary"
    if table.ndim != 1 or (vocab_size is not None and table.shape[0] != vocab_size):
        raise UserError(f"{name}: expected shape {entries}, got {tuple(table.shape)}")
    if table.dtype.is_floating_point or table.dtype.is_complex or table.dtype == torch.bool:
        raise UserError(f"{name}: expected integers, got {table.dtype}")
    # On the meta device, where transformers builds a model before it loads it, there are no values yet.
    if not table.is_meta and table.numel():
        low, high = table.min().item(), table.max().item()
        if low < 0 or high >= num_experts:
            raise UserError(f"{name}: expected experts in [0, {num_experts}), got values from {low} to {high}")
    return table.to(table_dtype(num_experts)).contiguous()
