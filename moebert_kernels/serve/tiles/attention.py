"""Attention of bidirectional encoders by a kernel of our own, on x86-64 CPUs with AMX or AVX-512.

transformers looks functions of attention up by a name in the model's configuration. `attention` computes what its
"sdpa" does, and leaves to that what the kernel is not made for. MPNet has attention of its own, and a class here.
Where a converted model's feed-forwards run in int8, torch's own attention takes up to a third of the time
(docs/experiments.md, 2026-12-01).
"""

from __future__ import annotations

import copy
import ctypes
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from moebert_kernels.serve.dtypes import input_dtype
from moebert_kernels.serve.tiles import SWITCH, attention_kernel

NAME = "moebert_tiles"

_pointer, _strides = ctypes.c_void_p, ctypes.c_int64 * 3


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("q", "k", "v", "y", "mask", "bias")),
        *((f"{name}_strides", _strides) for name in ("q", "k", "v", "mask", "bias")),
        *((name, ctypes.c_int) for name in ("sequences", "heads", "queries", "keys", "size")),
        *((name, ctypes.c_int) for name in ("is_float32", "amx", "threads")),
        ("scale", ctypes.c_float),
    )


def use_attention(model: Any, dtype: str) -> None:
    """Let a model that is prepared in this dtype compute its attention here, if it is an encoder and the kernel runs.

    A model that was given another implementation than transformers' default keeps it. MPNet's layers, which ask for no
    implementation, become `_MPNetSelfAttention` in any case.
    """
    if os.environ.get(SWITCH) == "0" or isinstance(attention_kernel(input_dtype(dtype)), str):
        return
    for module in model.modules():
        if type(module) is MPNetSelfAttention:
            module.__class__ = _MPNetSelfAttention
    if _is_encoder(model):
        _own_configuration(model)
        model.set_attn_implementation(NAME)


def _is_encoder(model: Any) -> bool:
    """Whether transformers computes all attention of the model by "sdpa", and the model writes no text."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    by_default = all(m.config._attn_implementation == "sdpa" and m._can_set_attn_implementation() for m in models)
    writes = any(m.can_generate() or getattr(m.config, "is_encoder_decoder", False) for m in models)
    # some decoders do more for an implementation named sdpa than to call it
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    return by_default and not writes and not causal


def _own_configuration(model: nn.Module) -> None:
    """Copy the model's configurations, which other models may have too: transformers gives all models one object."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            vars(module)["config"] = copy.deepcopy(config, copies)


def uses_attention(model: Any) -> bool:
    """Whether `use_attention` has changed the model, and the kernel runs on this machine."""
    by_name = model.config._attn_implementation == NAME
    changed = by_name or any(type(module) is _MPNetSelfAttention for module in model.modules())
    return changed and not isinstance(attention_kernel(input_dtype(model.prepared.dtype)), str)


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
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = not dropout and not any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    unmasked = attention_mask is None
    if plain and not (causal and unmasked and query.shape[2] > 1) and (unmasked or attention_mask.dtype == torch.bool):
        y = attend(query, key, value, attention_mask, None, query.shape[3] ** -0.5 if scaling is None else scaling)
        if y is not None:
            return y, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor | None:
    """softmax(scale q k' + bias) v by the kernel, or None if it cannot read these tensors.

    Args:
        query: (B, h, T, D) float32 or bfloat16.
        key, value: (B, h, S, D) in its dtype.
        mask: boolean, of a shape that expands to (B, h, T, S): whether a key counts for a query; None: all do.
        bias: as large, in the dtype of the others; None: 0.
        scale: of the scores.

    Returns:
        (B, T, h, D), 0 for a query for which no key counts.
    """
    kernel = attention_kernel(query.dtype) if _can_read(query, key, value, mask, bias) else ""
    if isinstance(kernel, str):
        return None
    run, amx = kernel
    (B, h, T, D), S = query.shape, key.shape[2]
    of_scores = [None if x is None else x.expand(B, h, T, S) for x in (mask, bias)]
    q, k, v, m, b = (
        x if x is None or x.stride(3) == 1 else x.contiguous() for x in (query, key, value, *of_scores)
    )  # fmt: skip
    y = query.new_empty(B, T, h, D)
    call = _Attention(
        *(None if x is None else x.data_ptr() for x in (q, k, v, y, m, b)),
        *(_strides(*((0, 0, 0) if x is None else x.stride()[:3])) for x in (q, k, v, m, b)),
        B, h, T, S, D, query.dtype == torch.float32, amx, torch.get_num_threads(), scale,
    )  # fmt: skip
    run(ctypes.byref(call))
    return y


def _can_read(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernel is made for such tensors: of as many heads each, with numbers in memory, without gradients."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    tensors = [x for x in (query, key, value, bias) if x is not None]
    given = tensors if mask is None else [*tensors, mask]
    if any(isinstance(x, FakeTensor) or x.device.type != "cpu" for x in given):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    one_dtype = query.dtype in (torch.float32, torch.bfloat16) and all(x.dtype == query.dtype for x in tensors)
    (B, h, _, D), S = query.shape, key.shape[2]
    return one_dtype and key.shape == value.shape == (B, h, S, D) and query.numel() > 0 and S > 0


class _MPNetSelfAttention(MPNetSelfAttention):
    """MPNet's attention, whose scores have a bias for each distance, by the kernel."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """As MPNet's own, which computes what the kernel cannot: weights of attention, gradients, dropout.

        In a sequence of padding alone the outputs are 0, and not the mean of all values.
        """
        y = None
        if not output_attentions and not (self.training and self.dropout.p):
            shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
            q, k, v = (layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
            # of numbers that are 0 or the lowest there is
            mask = None if attention_mask is None else attention_mask >= 0
            y = attend(q, k, v, mask, position_bias, self.attention_head_size**-0.5)
        if y is None:
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        return (self.o(y.flatten(2)),)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
