"""The expert feed-forward of a tiny batch: two launches, with residual and norm or without, inference only.

Takes a `Grouping`, or expert ids that the kernels look through themselves: then nothing runs before them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moebert_kernels import backend, native
from moebert_kernels.cuda_backend._arguments import ACTIVATIONS, FLOATS, INTEGERS, pointer, stream_of
from moebert_kernels.grouping import Grouping


def applies(x: Tensor, top_k: int, w1: Tensor) -> bool:
    """Whether x's GPU has the kernels and they can do x (T, H) with w1 (E, I or 2I, H).

    They take at most 256 tokens of one expert each, and dtypes that they know.
    """
    return (
        top_k == 1
        and backend.kernel_unavailable("tiny_ffn", x.device, x.dtype) is None
        and x.shape[0] <= native.module().tiny_ffn_max_tokens
        and w1.shape[0] <= native.module().tiny_ffn_max_experts
        and w1.dtype in FLOATS
        and x.dtype in (w1.dtype, torch.float32)
    )


def add_norm(
    x: Tensor, routing: Grouping | Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, routing_weights: Tensor | None, eps: float, activation: str,
) -> Tensor:  # fmt: skip
    """y (T, H) = p * LayerNorm_e(x + FFN_e(x)) in x's dtype; y = x where a token has no expert.

    Args:
        x: (T, H), T <= 256, any strides.
        routing: a top-1 `Grouping`, or expert ids, (T,) or (T, 1) integers.
        w1: (E, I, H), or (E, 2I, H) for gated activations. Any strides; x's dtype, or lower with x in float32.
        b1: (E, I) or (E, 2I), or None.
        w2: (E, H, I). Any strides.
        b2: (E, H), or None.
        norm_weight: (E, H), in x's dtype. None: y = p * FFN_e(x), and 0 where a token has no expert.
        norm_bias: (E, H), in x's dtype.
        routing_weights: (T,) or (T, 1), in x's dtype, or None.
        eps: added to the variance.
        activation: one of `moebert_kernels.activation.ACTIVATIONS`.
    """
    (tokens, hidden), (experts, _, width) = x.shape, w2.shape
    y = x.new_empty(tokens, hidden)
    if y.numel() == 0:
        return y
    dtype, number = FLOATS[w1.dtype], ACTIVATIONS[activation]
    scratch = w1.new_empty(
        _workspace_bytes(tokens, hidden, width, experts, dtype, number, norm_weight is not None) // w1.element_size()
    )
    ids, grouping = (None, routing) if isinstance(routing, Grouping) else (routing, None)
    b1, b2, norm_weight, norm_bias, routing_weights = (
        None if tensor is None else tensor.contiguous() for tensor in (b1, b2, norm_weight, norm_bias, routing_weights)
    )
    native.module().tiny_ffn(
        ids=pointer(ids),
        ids_stride=0 if ids is None else ids.stride(0),
        ids_type=0 if ids is None else INTEGERS[ids.dtype],
        offsets=0 if grouping is None else grouping.offsets.data_ptr(),
        row_to_assignment=0 if grouping is None else grouping.row_to_assignment.data_ptr(),
        x=x.data_ptr(),
        x_stride_t=x.stride(0),
        x_stride_h=x.stride(1),
        w1=w1.data_ptr(),
        w1_stride_e=w1.stride(0),
        w1_stride_n=w1.stride(1),
        w1_stride_k=w1.stride(2),
        b1=pointer(b1),
        w2=w2.data_ptr(),
        w2_stride_e=w2.stride(0),
        w2_stride_n=w2.stride(1),
        w2_stride_k=w2.stride(2),
        b2=pointer(b2),
        norm_weight=pointer(norm_weight),
        norm_bias=pointer(norm_bias),
        routing_weights=pointer(routing_weights),
        y=y.data_ptr(),
        workspace=scratch.data_ptr(),
        tokens=tokens,
        hidden=hidden,
        width=width,
        experts=experts,
        dtype=dtype,
        x_dtype=FLOATS[x.dtype],
        activation=number,
        eps=eps,
        stream=stream_of(x),
    )
    return y


def ffn(
    x: Tensor, routing: Grouping | Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    routing_weights: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """y (T, H) = p * FFN_e(x), 0 where a token has no expert. Arguments as in `add_norm`."""
    return add_norm(x, routing, w1, b1, w2, b2, None, None, routing_weights, 0.0, activation)


@lru_cache(maxsize=1024)
def _workspace_bytes(*sizes: int) -> int:
    return native.module().tiny_ffn_workspace_bytes(*sizes)
