"""What a caller may pass as `routing` and `routing_weights`, made uniform."""

from __future__ import annotations

import math

from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.ops._checks import check_grouping, check_tensor
from moebert_kernels.ops.group_tokens import group_tokens


def resolve_routing(x: Tensor, routing: Grouping | Tensor, num_experts: int, max_top_k: int | None) -> Grouping:
    """A Grouping of x's tokens, from one or from expert ids: ids (...) are top-1, ids (..., top_k) are top-k."""
    num_tokens = math.prod(x.shape[:-1])
    if isinstance(routing, Grouping):
        check_grouping("routing", routing, num_experts, num_tokens * routing.top_k)
        grouping = routing
    else:
        check_tensor("routing", routing)
        leading = tuple(x.shape[:-1])
        if routing.ndim not in (x.ndim - 1, x.ndim) or tuple(routing.shape[: len(leading)]) != leading:
            wanted = ", ".join(str(size) for size in leading)
            raise ValueError(
                f"routing: expected expert ids of shape ({wanted},) or ({wanted}, top_k), got {tuple(routing.shape)}"
            )
        ids = routing.reshape(num_tokens, *routing.shape[len(leading) :])
        if routing.device != x.device:
            raise ValueError(f"routing: expected device {x.device} (as x), got {routing.device}")
        grouping = group_tokens(ids, num_experts)
    if max_top_k is not None and grouping.top_k > max_top_k:
        raise ValueError(f"routing: expected top_k <= {max_top_k}, got {grouping.top_k}")
    return grouping


def resolve_routing_weights(x: Tensor, grouping: Grouping, weights: Tensor | None) -> Tensor | None:
    """(T, top_k) from (...), (..., top_k), (T,) or (T, top_k), as differentiable views."""
    if weights is None:
        return None
    check_tensor("routing_weights", weights)
    leading, top_k = tuple(x.shape[:-1]), grouping.top_k
    allowed = [(*leading, top_k), (grouping.num_tokens, top_k)]
    if top_k == 1:
        allowed += [leading, (grouping.num_tokens,)]
    if tuple(weights.shape) not in allowed:
        raise ValueError(f"routing_weights: expected shape {allowed[0]}, got {tuple(weights.shape)}")
    return weights.reshape(grouping.num_tokens, top_k)
