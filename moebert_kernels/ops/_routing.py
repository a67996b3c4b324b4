"""Bring every form of `routing` and `routing_weights` that a caller may pass into one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moebert_kernels import backend
from moebert_kernels.grouping import Grouping
from moebert_kernels.ops._checks import FLOATS, autocast_dtype, check_grouping, check_tensor, inside_op
from moebert_kernels.ops.group_tokens import check_expert_ids, group_tokens


def check_routing(
    x: Tensor, routing: Grouping | Tensor, num_experts: int, max_top_k: int | None
) -> tuple[Grouping | Tensor, int]:
    """A Grouping of x's tokens, or expert ids (T, top_k), and top_k: ids (...) are top-1, ids (..., top_k) top-k."""
    num_tokens = math.prod(x.shape[:-1])
    checked: Grouping | Tensor
    if isinstance(routing, Grouping):
        check_grouping("routing", routing, num_experts, x, num_tokens)
        checked, top_k = routing, routing.top_k
    else:
        check_tensor("routing", routing)
        leading = tuple(x.shape[:-1])
        if routing.ndim not in (x.ndim - 1, x.ndim) or tuple(routing.shape[: len(leading)]) != leading:
            wanted = ", ".join(str(size) for size in leading)
            raise ValueError(
                f"routing: expected expert ids of shape ({wanted},) or ({wanted}, top_k), got {tuple(routing.shape)}"
            )
        top_k = 1 if routing.ndim == len(leading) else routing.shape[-1]
        if routing.device != x.device:
            raise ValueError(f"routing: expected device {x.device} (as x), got {routing.device}")
        checked, top_k = check_expert_ids(routing.reshape(num_tokens, top_k), "routing")
    if max_top_k is not None and top_k > max_top_k:
        raise ValueError(f"routing: expected top_k <= {max_top_k}, got {top_k}")
    return checked, top_k


def grouped(routing: Grouping | Tensor, num_experts: int) -> Grouping:
    """The Grouping of what `check_routing` returned."""
    return routing if isinstance(routing, Grouping) else group_tokens(routing, num_experts)


def resolve_routing(x: Tensor, routing: Grouping | Tensor, num_experts: int, max_top_k: int | None) -> Grouping:
    """A Grouping of x's tokens, checked, from one or from expert ids."""
    return grouped(check_routing(x, routing, num_experts, max_top_k)[0], num_experts)


def inferred_from_ids(op: str, x: Tensor, ids: Tensor, *arguments: object) -> Tensor | None:
    """The output of `op` computed from ungrouped expert ids (T, top_k); None if its backend needs a Grouping."""
    with inside_op(x):
        chosen = backend.implementation(op, x)
        return chosen.from_ids(x, ids, *arguments) if hasattr(chosen, "from_ids") else None


def resolve_routing_weights(x: Tensor, top_k: int, weights: Tensor | None) -> Tensor | None:
    """(T, top_k) from (...), (..., top_k), (T,) or (T, top_k), differentiably: of x's dtype or float32.

    Routers compute in float32. What they learn from is the difference between experts, which is lost where the
    gradient of a weight is rounded to 16 bits; under autocast, too, it is float32.
    """
    if weights is None:
        return None
    check_tensor("routing_weights", weights)
    leading, num_tokens = tuple(x.shape[:-1]), math.prod(x.shape[:-1])
    allowed = [(*leading, top_k), (num_tokens, top_k)]
    if top_k == 1:
        allowed += [leading, (num_tokens,)]
    if tuple(weights.shape) not in allowed:
        raise ValueError(f"routing_weights: expected shape {allowed[0]}, got {tuple(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"routing_weights: expected device {x.device} (as x), got {weights.device}")
    weights = weights.reshape(num_tokens, top_k)
    if autocast_dtype(x) is not None and weights.dtype in FLOATS and weights.dtype != torch.float64:
        return weights.to(torch.float32)
    if weights.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise ValueError(f"routing_weights: expected dtype {x.dtype} (as x) or torch.float32, got {weights.dtype}")
    return weights
