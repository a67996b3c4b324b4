"""Attention that hands its tokens to the experts in their order, so that these gather nothing (docs/design/0009).

    dense -> dropout, + residual, LayerNorm, written by row -> the experts' GEMMs, by row -> their norm, by token

The two modules of a layer meet in the state of the call: the one that writes leaves the tensor and its grouping there,
and `MoEFeedForward` takes them out and refuses any other tensor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.layers.feed_forward import MoEFeedForward
from moebert_kernels.nn.context import Call, Groupings, Tokens, current, derived_class, entered, plain_class
from moebert_kernels.ops.add_norm_in_order import add_norm_in_order
from moebert_kernels.ops.group_tokens import group_tokens

_PARTS = {"dense", "LayerNorm", "dropout"}  # of what ends BERT's attention
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}  # else 0.05


def set_expert_order(model: nn.Module, enabled: bool = True) -> int:
    """Let the LayerNorm behind each attention write its tokens in the order of the experts that read them next.

    It is off in a model that was converted or loaded, since no GPU has measured it. It fuses dropout, residual and norm
    behind the attention into one kernel, and spares the experts' matrix products their gathers. Parameters, what is
    saved, and outputs up to rounding stay as they are; dropout draws other masks. Under `torch.compile`, and where a
    forward has not grouped the tokens of a layer before, tokens keep their order.

    A layer takes part if its attention ends in `LayerNorm(dropout(dense(x)) + residual)`, if its feed-forward alone
    reads that, and if a trial on random numbers, made here, gives the same in both orders. Hooks on the attention and
    on its `output` get the rows, in the shape of the tokens; a hook that returns another tensor is an error of the
    forward.

    Args:
        model: converted, with hash routing; changed.
        enabled: False: back to the order of the tokens.

    Returns:
        How many layers were changed.

    Raises:
        UserError: no layer of the model can.
    """
    changed = 0
    for owner in model.modules():
        output: Any = _attention_output(owner)
        if output is None:
            continue
        if hasattr(output, "moe_layer"):
            output.__class__ = plain_class(type(output))
            del output.moe_layer
        if enabled:
            made: Any = ordered_class
            plain = _on_random_numbers(owner)
            object.__setattr__(output, "moe_layer", owner.output)  # no submodule: it has its place
            output.__class__ = made(type(output))
            if plain is None or not _close(_on_random_numbers(owner), plain):
                output.__class__ = plain_class(type(output))
                del output.moe_layer
                continue
        changed += 1
    if enabled and not changed:
        raise UserError(
            f"model: expected a converted encoder of BERT's family with hash routing and a LayerNorm behind its "
            f"attention, got {type(model).__name__} without such a layer"
        )
    return changed


@functools.cache
def ordered_class(base: Any) -> type:
    """The class of what ends an attention, which writes its tokens in the order of the layer behind it."""

    @functools.wraps(base.forward)
    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Any:
        tokens, layer, norm = current().tokens, self.moe_layer, self.LayerNorm
        if torch.compiler.is_compiling() or tokens is None or tokens.in_order is None:
            return base.forward(self, hidden_states, input_tensor)
        grouping = tokens.groupings.of(layer)
        hooked = norm._forward_hooks or norm._forward_pre_hooks or type(norm) is not nn.LayerNorm
        if grouping is None or hooked or not layer.can_read_in_order:
            return base.forward(self, hidden_states, input_tensor)
        added = self.dense(hidden_states)
        casting = torch.is_autocast_enabled(added.device.type)
        if norm.weight.is_meta or not (casting or added.dtype == input_tensor.dtype == norm.weight.dtype):
            return norm(self.dropout(added) + input_tensor)
        rows = add_norm_in_order(
            input_tensor, added, norm.weight, norm.bias, grouping, eps=norm.eps,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
        )  # fmt: skip
        tokens.in_order[:] = [(rows, grouping)]
        return rows

    return derived_class(ordered_class, base, (base,), {"forward": forward})


def _attention_output(owner: Any) -> Any:
    """What ends the attention before a layer that can read its tokens in their order; None: there is no such layer."""
    children = owner._modules
    layer, output = children.get("output"), getattr(children.get("attention"), "output", None)
    if not isinstance(layer, MoEFeedForward) or "crossattention" in children or not isinstance(output, nn.Module):
        return None
    norm = output._modules.get("LayerNorm")
    same = set(output._modules) == _PARTS and type(norm) is nn.LayerNorm and norm.bias is not None
    return output if same and layer.is_told_tokens and layer.can_read_in_order else None


@torch.no_grad()
def _on_random_numbers(owner: Any) -> Tensor | None:
    """What the layer around an attention and experts computes of 2 x 6 tokens; None: it needs more than these."""
    layer, modes = owner.output, [(module, module.training) for module in owner.modules()]
    weight = layer.experts.w1
    if weight.is_meta:  # offloaded
        return None
    ids = torch.arange(12, device=weight.device) % (layer.experts.num_experts + 1) - 1  # some are skipped
    x = torch.linspace(-1.0, 1.0, 12 * weight.shape[2], device=weight.device).mul(97).sin().view(2, 6, -1)
    groupings = Groupings({layer: group_tokens(ids, layer.experts.num_experts)})
    call = Call(Tokens(groupings, ids.view(2, 6), in_order=[]))
    owner.eval()
    try:
        with entered(call):
            y = owner(x.to(weight.dtype))
    except (
        AttributeError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # it needs other arguments, or changes what it hands on
        return None
    finally:
        for module, mode in modes:
            module.training = mode
    return y if isinstance(y, Tensor) else y[0]


def _close(got: Tensor | None, wanted: Tensor) -> bool:
    close = _CLOSE.get(wanted.dtype, 0.05)
    return got is not None and torch.allclose(got.float(), wanted.float(), atol=close, rtol=close)
