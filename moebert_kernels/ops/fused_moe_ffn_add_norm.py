"""The MoEBERT expert: y[t] = p[t] * LayerNorm_e(x[t] + dropout(FFN_e(x[t])))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moebert_kernels import backend, dropout
from moebert_kernels.grouping import Grouping
from moebert_kernels.ops._checks import (
    as_rows,
    autocast_dtype,
    check_dtypes_and_devices,
    check_eps,
    check_features,
    check_ffn_weights,
    check_not_traced,
    check_probability,
    check_seed,
    check_shape,
    checked_once,
    inside_op,
    opaque,
    to_dtype,
)
from moebert_kernels.ops._differentiable import Differentiable
from moebert_kernels.ops._routing import check_routing, grouped, inferred_from_ids, resolve_routing_weights


def fused_moe_ffn_add_norm(
    x: Tensor, routing: Grouping | Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, *,
    routing_weights: Tensor | None = None, eps: float = 1e-12, activation: str = "gelu",
    dropout_p: float = 0.0, hidden_dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
    recompute: bool = False, in_order: bool = False,
) -> Tensor:  # fmt: skip
    """Feed-forward, dropout, residual and per-expert LayerNorm: y[t] = p[t] * LN_e(x[t] + dropout(FFN_e(x[t]))).

    Args:
        x: (..., H) float. Also the residual.
        routing: a top-1 `Grouping`, or expert ids: integer (...) or (..., 1). Tokens with ids outside [0, E) pass
            unchanged: y = x and dx = dy.
        w1: (E, I, H), or (E, 2I, H) with the gate's rows first for gated activations. Any strides.
        b1: (E, I) or (E, 2I), or None.
        w2: (E, H, I). Any strides.
        b2: (E, H), or None.
        norm_weight: (E, H).
        norm_bias: (E, H).
        routing_weights: p, shape of the expert ids and dtype of x or float32, in which its gradient is too; None
            means 1.
        eps: added to the variance; finite, at least 0.
        activation: gelu (erf), gelu_tanh, relu, relu2 (its square), silu, identity; gated: swiglu, geglu,
            geglu_tanh, reglu.
        dropout_p: probability of dropping an element of the FFN's output, in [0, 1 - 2^-17): masks have 16 bits each.
        hidden_dropout_p: the same for an activation.
        dropout_seed: () int64 on x's device; drawn from torch's generator when None.
        recompute: keep only the inputs for backward.
        in_order: x holds the rows of `routing`, a Grouping, as `add_norm_in_order` writes them; so does dx. y, its
            gradient and routing_weights are by token, and each mask is the one of the token.

    Returns:
        Shape of `x`. Its dtype; under autocast float32, as torch.nn.functional.layer_norm does it.

    Raises:
        ValueError: a shape, dtype, device or value disagrees with the above. The op also raises one under
            torch.jit.trace, torch.vmap, forward-mode differentiation and for a second derivative.

    Under autocast every call casts what it multiplies: 6 bytes of traffic for each float32 element of the weights.
    Differentiable once in x, all weights and biases, the norm's parameters and routing_weights.
    Source: MoEBERT (arXiv 2204.07675), section 3, and the authors' expert layer. Reference:
    `moebert_kernels.reference.fused_moe_ffn_add_norm`.
    """
    check_not_traced("fused_moe_ffn_add_norm")

    def check() -> None:
        check_features(x)
        check_ffn_weights(x.shape[-1], w1, b1, w2, b2, activation)
        check_shape("norm_weight", norm_weight, {"E": w1.shape[0], "H": x.shape[-1]})
        check_shape("norm_bias", norm_bias, {"E": w1.shape[0], "H": x.shape[-1]})
        check_probability("dropout_p", dropout_p)
        check_probability("hidden_dropout_p", hidden_dropout_p)
        check_eps(eps)
        check_seed(dropout_seed, x)
        weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "norm_weight": norm_weight, "norm_bias": norm_bias}
        check_dtypes_and_devices("x", x, weights)

    gemm_dtype = autocast_dtype(x) if isinstance(x, Tensor) else None
    checked_once(
        check, (x, w1, b1, w2, b2, norm_weight, norm_bias, dropout_seed),
        activation, dropout_p, hidden_dropout_p, eps, gemm_dtype,
    )  # fmt: skip
    routing, top_k = check_routing(x, routing, w1.shape[0], max_top_k=1)
    if in_order and isinstance(routing, Tensor):
        raise ValueError("routing: expected with in_order the Grouping by which x is ordered, got expert ids")
    routing_weights = resolve_routing_weights(x, top_k, routing_weights)
    if (dropout_p > 0 or hidden_dropout_p > 0) and dropout_seed is None:
        dropout_seed = dropout.draw_seed(x.device)

    weights = to_dtype(gemm_dtype, w1, b1, w2, b2)
    add_dtype = None if gemm_dtype is None else torch.float32
    flat, *norm = to_dtype(add_dtype, as_rows(x), norm_weight, norm_bias)
    norm.append(routing_weights)
    trains, one_node = _FUSED_MOE_FFN_ADD_NORM.needs_saving(flat, *weights, *norm), opaque(x)
    if isinstance(routing, Tensor) and not (trains or one_node or dropout_p or hidden_dropout_p):
        y = inferred_from_ids("fused_moe_ffn_add_norm", flat, routing, *weights, *norm, float(eps), activation)
        if y is not None:
            return y.view(x.shape)
    grouping = grouped(routing, w1.shape[0])
    y = _FUSED_MOE_FFN_ADD_NORM(
        one_node, trains, flat, *weights, *norm,
        grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row, dropout_seed,
        float(eps), activation, float(dropout_p), float(hidden_dropout_p), in_order, trains and not recompute,
    )  # fmt: skip
    return y if x.ndim == 2 else y.view(x.shape)


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    routing_weights: Tensor | None, offsets: Tensor, row_to_assignment: Tensor, assignment_to_row: Tensor,
    seed: Tensor | None, eps: float, activation: str, dropout_p: float, hidden_dropout_p: float, in_order: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grouping = Grouping(offsets, row_to_assignment, assignment_to_row)
    with inside_op(x):
        return backend.implementation("fused_moe_ffn_add_norm", x).forward(
            x, grouping, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation,
            dropout_p, hidden_dropout_p, seed, save, in_order,
        )  # fmt: skip


def _backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, routing_weights: Tensor | None,
    offsets: Tensor, row_to_assignment: Tensor, assignment_to_row: Tensor, seed: Tensor | None, h_pre: Tensor,
    ffn: Tensor, eps: float, activation: str, dropout_p: float, hidden_dropout_p: float, in_order: bool, save: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grouping = Grouping(offsets, row_to_assignment, assignment_to_row)
    with inside_op(x):
        grads = backend.implementation("fused_moe_ffn_add_norm", x).backward(
            dy, x, h_pre, ffn, grouping, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation,
            dropout_p, hidden_dropout_p, seed, tuple(needs), in_order,
        )  # fmt: skip
    return grads


def _fake_forward(
    x: Tensor, w1: Tensor, b1: Any, w2: Any, b2: Any, norm_weight: Any, norm_bias: Any, routing_weights: Any,
    offsets: Any, row_to_assignment: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    save = rest[-1]
    rows = row_to_assignment.shape[0] if save else 0
    return x.new_empty(x.shape), w1.new_empty(rows, w1.shape[1]), w1.new_empty(rows, x.shape[1])


def _fake_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = rest[:8], rest[-1]  # x, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights
    return tuple(t.new_empty(t.shape) if need else dy.new_empty(0) for t, need in zip(inputs, needs, strict=True))


_FUSED_MOE_FFN_ADD_NORM = Differentiable(
    "fused_moe_ffn_add_norm", _forward, _backward, _fake_forward, _fake_backward,
    tensor_arguments=12, differentiable=(0, 1, 2, 3, 4, 5, 6, 7),
)  # fmt: skip
