"""Attention of bidirectional encoders by a kernel of our own, on x86-64 CPUs with AMX or AVX-512.

transformers looks functions of attention up by a name in the model's configuration. This one computes what its "sdpa"
does, and leaves to that what the kernel is not made for. Where a converted model's feed-forwards run in int8, torch's
own attention takes up to a third of the time (docs/experiments.md, 2026-12-01).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from moebert_kernels.serve.dtypes import input_dtype
from moebert_kernels.serve.tiles import SWITCH, attention_kernel

NAME = "moebert_tiles"

_pointer, _strides = ctypes.c_void_p, ctypes.c_int64 * 3


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("q", "k", "v", "y", "mask")),
        *((f"{name}_strides", _strides) for name in ("q", "k", "v", "mask")),
        *((name, ctypes.c_int) for name in ("sequences", "heads", "queries", "keys", "size")),
        *((name, ctypes.c_int) for name in ("is_float32", "amx", "threads")),
        ("scale", ctypes.c_float),
    )


def use_attention(model: Any, dtype: str) -> None:
    """Let a model that is prepared in this dtype compute its attention here, if it is an encoder and the kernel runs.

    A model that was given another implementation than transformers' default keeps it.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    by_default = all(m.config._attn_implementation == "sdpa" and m._can_set_attn_implementation() for m in models)
    # some decoders do more for an implementation named sdpa than to call it
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    if not by_default or causal or os.environ.get(SWITCH) == "0":
        return
    if not isinstance(attention_kernel(input_dtype(dtype)), str):
        model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k') v by the kernel, or by transformers' `sdpa_attention_forward` if that cannot compute it.

    Args:
        module: the layer of attention, whose `is_causal` counts where the argument is None.
        query: (B, h, T, D), by the kernel in float32 or bfloat16.
        key, value: (B, h, S, D) each.
        attention_mask: whether a key counts for a query, of a shape that expands to (B, h, T, S); None: all do. The
            output of a query for which none counts is 0.
        scaling: of the scores; None: D^-0.5.
        dropout, is_causal, kwargs: as there; the kernel has no dropout and no mask of its own.

    Returns:
        (B, T, h, D), and None for the weights.
    """
    (B, h, T, D), S = query.shape, key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = not dropout and not any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    kernel = attention_kernel(query.dtype) if plain and _can_read(query, key, value, attention_mask) else ""
    if isinstance(kernel, str) or (causal and T > 1 and attention_mask is None):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    run, amx = kernel
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    mask = None if attention_mask is None else attention_mask.expand(B, h, T, S)
    if mask is not None and mask.stride(3) != 1:
        mask = mask.contiguous()
    y = q.new_empty(B, T, h, D)
    call = _Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), None if mask is None else mask.data_ptr(),
        *(_strides(*x.stride()[:3]) for x in (q, k, v)), _strides(*((0, 0, 0) if mask is None else mask.stride()[:3])),
        B, h, T, S, D, q.dtype == torch.float32, amx, torch.get_num_threads(), D**-0.5 if scaling is None else scaling,
    )  # fmt: skip
    run(ctypes.byref(call))
    return y, None


def _can_read(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel is made for such tensors: of as many heads each, with numbers in memory, without gradients."""
    tensors = (query, key, value)
    if torch.jit.is_tracing() or any(isinstance(x, FakeTensor) or x.device.type != "cpu" for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    one_dtype = query.dtype in (torch.float32, torch.bfloat16) and query.dtype == key.dtype == value.dtype
    (B, h, _, D), S = query.shape, key.shape[2]
    alike = key.shape == value.shape == (B, h, S, D) and query.numel() > 0 and S > 0
    return one_dtype and alike and (mask is None or mask.dtype == torch.bool)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
