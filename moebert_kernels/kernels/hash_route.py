"""Hash routing: table lookups for all layers in one launch, never out of bounds."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.kernels.launch import launch
from moebert_kernels.kernels.tiles import ceil_div

_BLOCK = 1024


@triton.jit(do_not_specialize=["N"])
def _hash_route_kernel(
    TokenIds, stride_ids,  # (N,)
    Tables, stride_tl, stride_tv,  # (L, V)
    Mask, stride_mask,  # (N,) or null
    ExpertIds,  # (L, N) int32, contiguous
    N, V,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(TokenIds + token * stride_ids, mask=token < N, other=-1).to(tl.int64)
    inside = (ids >= 0) & (ids < V)
    if HAS_MASK:
        inside = inside & (tl.load(Mask + token * stride_mask, mask=token < N, other=0) != 0)
    expert = tl.load(Tables + layer * stride_tl + ids * stride_tv, mask=inside, other=-1)
    narrow = expert.to(tl.int32)
    inside = inside & (narrow == expert)  # an entry that is no int32 is nobody's id
    tl.store(ExpertIds + layer * N + token, tl.where(inside, narrow, -1), mask=token < N)


def hash_route(token_ids: Tensor, tables: Tensor, attention_mask: Tensor | None, expert_ids: Tensor) -> None:
    """Launch: expert_ids (L, N) int32 of token_ids (N,) through tables (L, V)."""
    (layers, vocab_size), tokens = tables.shape, token_ids.shape[0]
    if layers * tokens == 0:
        return
    arguments = (
        token_ids, token_ids.stride(0),
        tables, *tables.stride(),
        attention_mask, 0 if attention_mask is None else attention_mask.stride(0),
        expert_ids,
        tokens, vocab_size,
    )  # fmt: skip
    constants = {"HAS_MASK": attention_mask is not None, "BLOCK": _BLOCK}
    launch(_hash_route_kernel, (ceil_div(tokens, _BLOCK), layers), arguments, constants)
