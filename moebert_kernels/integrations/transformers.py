"""transformers' Mixture-of-Experts models on our ops: `experts_implementation="moebert_kernels"`.

transformers hands an experts module and its routing to the function registered here. Tokens are grouped once. Experts
of a standard form are then one `fused_moe_ffn`; experts with a gate, an activation or a norm of their own are two
`expert_gemm`s with the module's own code on the rows between them, and a sum in the order of each token's experts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import activations
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, use_experts_implementation

from moebert_kernels.activation import GATED
from moebert_kernels.ops._checks import FLOATS, autocast_dtype, check_integers, check_shape, check_tensor
from moebert_kernels.ops.expert_gemm import expert_gemm
from moebert_kernels.ops.fused_moe_ffn import fused_moe_ffn
from moebert_kernels.ops.group_tokens import group_tokens

NAME = "moebert_kernels"

# Functions and exact classes: a subclass may compute something else. nn.GELU is both of its forms, by its argument.
_ACTIVATIONS: dict[Any, str] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
    functional.silu: "silu",
    functional.gelu: "gelu",
    functional.relu: "relu",
}
_GATED = {plain: gated for gated, plain in GATED.items()}

_OPTIONS = ("has_gate", "has_bias", "is_concatenated", "is_transposed")  # of every decorated class
_NEWER_OPTIONS = ("has_post_expert_norm",)  # not yet in transformers 5.17
# What a still newer one lets an experts class ask for and this file knows nothing of, with the harmless value.
_UNKNOWN_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(use_experts_implementation).parameters.items()
    if name not in (*_OPTIONS, *_NEWER_OPTIONS, "experts_class", "experts_interface")
}


def register() -> None:
    """Offer `experts_forward` to transformers as `experts_implementation="moebert_kernels"`.

    Call it once before a model is asked to use it; calling it again changes nothing.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run an experts module of transformers: y[t] = sum_j p[t, j] * expert_e(x[t]) with e = top_k_index[t, j].

    Args:
        experts: a module whose class is decorated with transformers' `use_experts_implementation`: gate_up_proj
            (E, 2I, H) or, without a gate, up_proj (E, I, H); down_proj (E, H, I); with is_transposed their last two
            dimensions are swapped. With has_bias gate_up_proj_bias (E, 2I) or up_proj_bias (E, I), and down_proj_bias
            (E, H). Weights are read as views, never copied.
        hidden_states: x, (T, H) float.
        top_k_index: (T, top_k) integer. Ids outside [0, E) (another device's experts) are skipped: they add nothing to
            y or to any gradient.
        top_k_weights: p, (T, top_k) float. In float32 it stays so, and its gradient too.

    Returns:
        (T, H), dtype of `hidden_states`. Computed in the dtype of the weights, under autocast in its dtype.

    Raises:
        ValueError: the module is not of the form above, or a shape, dtype or device disagrees with it.

    Differentiable once in hidden_states, top_k_weights and all parameters of the module.
    """
    check_options(experts)
    w1, b1, w2, b2 = weights_of(experts)
    _check_inputs(hidden_states, top_k_index, top_k_weights, hidden=w2.shape[1])
    grouping = group_tokens(top_k_index, w2.shape[0])
    casting = autocast_dtype(hidden_states)
    x = hidden_states.to(casting or w1.dtype)
    activation = activation_of(experts)
    if activation is None or w1.dtype != w2.dtype:
        own: Any = experts  # torch types every attribute of a module as Tensor | Module
        rows = expert_gemm(x, w1, grouping, b1, gather=True)
        rows = own._apply_gate(rows) if own.has_gate else own.act_fn(rows)
        rows = expert_gemm(rows.to(casting or w2.dtype), w2, grouping, b2)
        if has_post_norm(experts):
            rows = own.post_expert_norm(rows)
        y = _weighted_sum(
            rows.index_select(0, grouping.assignment_to_row), top_k_index, top_k_weights, grouping.num_experts
        )
    else:
        p = top_k_weights
        if p.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
            p = p.to(x.dtype)
        y = fused_moe_ffn(x, grouping, w1, b1, w2, b2, routing_weights=p, activation=activation)
    return y.to(hidden_states.dtype)


def _weighted_sum(assignments: Tensor, ids: Tensor, p: Tensor, num_experts: int) -> Tensor:
    """Outputs of all assignments (T * top_k, H) -> (T, H) in the order of a token's experts: the same bits twice."""
    routed = (ids >= 0) & (ids < num_experts)
    p = torch.where(routed, p, 0)  # outputs of skipped assignments are 0, but a norm's bias may have changed that
    return (assignments.view(*ids.shape, assignments.shape[1]) * p.unsqueeze(-1)).sum(1)


def is_experts(module: nn.Module) -> bool:
    """Whether its class is decorated with transformers' `use_experts_implementation`."""
    return all(hasattr(module, option) for option in _OPTIONS)


def check_options(experts: nn.Module) -> None:
    """Raise the ValueErrors of `experts_forward` that the module's options cause."""
    name = type(experts).__name__
    if missing := [option for option in _OPTIONS if not hasattr(experts, option)]:
        raise ValueError(
            f"{name}: expected a class decorated with transformers' use_experts_implementation, "
            f"got one without {', '.join(missing)}"
        )
    for option, harmless in _UNKNOWN_OPTIONS.items():
        if (value := getattr(experts, option, harmless)) != harmless:
            known = ", ".join((*_OPTIONS, *_NEWER_OPTIONS))
            raise ValueError(
                f"{name}: expected no options but {known}, got {option}={value!r} of a newer transformers; "
                'another experts_implementation, such as "grouped_mm", may know it'
            )
    if experts.has_gate and not experts.is_concatenated and _has_default_gate(experts):
        raise ValueError(
            f"{name}: expected an _apply_gate of its own for interleaved gates (is_concatenated=False), "
            "got the default one, which is for concatenated gates"
        )


def weights_of(experts: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w1 (E, 2I or I, H), b1, w2 (E, H, I), b2: checked views of the module's parameters."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    w1, w2 = _parameter(experts, up), _parameter(experts, "down_proj")
    b1 = b2 = None
    for name, w in ((up, w1), ("down_proj", w2)):
        if w.ndim != 3:
            raise ValueError(f"{type(experts).__name__}.{name}: expected 3 dimensions, got shape {tuple(w.shape)}")
    if experts.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    num_experts, hidden, width = w2.shape
    rows = {"2I": 2 * width} if experts.has_gate else {"I": width}
    check_shape(_place(experts, up), w1, {"E": num_experts, **rows, "H": hidden})
    if experts.has_bias:
        b1, b2 = _parameter(experts, f"{up}_bias"), _parameter(experts, "down_proj_bias")
        check_shape(_place(experts, f"{up}_bias"), b1, {"E": num_experts, **rows})
        check_shape(_place(experts, "down_proj_bias"), b2, {"E": num_experts, "H": hidden})
        b1, b2 = b1.to(w1.dtype), b2.to(w2.dtype)
    return w1, b1, w2, b2


def _place(experts: nn.Module, name: str) -> str:
    layout = " (transposed)" if experts.is_transposed and not name.endswith("_bias") else ""
    return f"{type(experts).__name__}.{name}{layout}"


def _parameter(experts: nn.Module, name: str) -> Tensor:
    value = getattr(experts, name, None)
    check_tensor(f"{type(experts).__name__}.{name}", value)
    if value.dtype not in FLOATS:
        raise ValueError(
            f"{type(experts).__name__}.{name}: expected dtype {', '.join(str(d) for d in FLOATS)}, got {value.dtype}"
        )
    return value


def _check_inputs(x: Tensor, ids: Tensor, p: Tensor, hidden: int) -> None:
    check_integers("top_k_index", ids)
    if ids.ndim != 2:
        raise ValueError(f"top_k_index: expected shape (T, top_k), got {tuple(ids.shape)}")
    check_shape("hidden_states", x, {"T": ids.shape[0], "H": hidden})
    check_shape("top_k_weights", p, {"T": ids.shape[0], "top_k": ids.shape[1]})
    for name, tensor in (("hidden_states", x), ("top_k_weights", p)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: expected dtype {', '.join(str(d) for d in FLOATS)}, got {tensor.dtype}")


def has_post_norm(experts: nn.Module) -> bool:
    return bool(getattr(experts, "has_post_expert_norm", False))


def _has_default_gate(experts: nn.Module) -> bool:
    return getattr(experts._apply_gate, "__func__", None) is _default_apply_gate


def activation_of(experts: nn.Module) -> str | None:
    """The activation of `fused_moe_ffn` that is all the module does between its matrices; None if there is none."""
    if has_post_norm(experts) or (experts.has_gate and not _has_default_gate(experts)):
        return None
    act_fn = experts.act_fn
    if type(act_fn) is nn.GELU:
        name = "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    else:
        name = _ACTIVATIONS.get(type(act_fn) if isinstance(act_fn, nn.Module) else act_fn, "")
    return _GATED.get(name) if experts.has_gate else name or None
