"""The Mixture-of-Experts feed-forward: y[t] = sum_j p[t, j] * FFN_e(x[t])."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moebert_kernels import backend, dropout
from moebert_kernels.grouping import Grouping
from moebert_kernels.ops._checks import (
    as_rows,
    autocast_dtype,
    check_dtypes_and_devices,
    check_features,
    check_ffn_weights,
    check_not_traced,
    check_probability,
    check_seed,
    checked_once,
    inside_op,
    opaque,
    to_dtype,
)
from moebert_kernels.ops._differentiable import Differentiable
from moebert_kernels.ops._routing import check_routing, grouped, inferred_from_ids, resolve_routing_weights


def fused_moe_ffn(
    x: Tensor, routing: Grouping | Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *,
    routing_weights: Tensor | None = None, activation: str = "gelu",
    hidden_dropout_p: float = 0.0, dropout_seed: Tensor | None = None, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """Send each token through its experts: y[t] = sum_j p[t, j] * (w2[e] dropout(act(w1[e] x[t] + b1[e])) + b2[e]).

    Args:
        x: (..., H) float.
        routing: a `Grouping`, or expert ids: integer (...) for top-1, (..., top_k) for top-k. Assignments with ids
            outside [0, E) are skipped: they add nothing to y or to any gradient.
        w1: (E, I, H), or (E, 2I, H) with the gate's rows first for gated activations. Any strides.
        b1: (E, I) or (E, 2I), or None.
        w2: (E, H, I). Any strides.
        b2: (E, H), or None.
        routing_weights: p, shape of the expert ids and dtype of x or float32, in which its gradient is too; None
            means 1.
        activation: gelu (erf), gelu_tanh, relu, relu2 (its square), silu, identity; gated: swiglu, geglu,
            geglu_tanh, reglu.
        hidden_dropout_p: probability of dropping an activation, in [0, 1 - 2^-17): masks have 16 bits per element.
        dropout_seed: () int64 on x's device; drawn from torch's generator when None.
        recompute: keep only the inputs for backward instead of the pre-activations, (T * top_k, rows of w1[e]). Under
            autocast the inputs are its casts, of all experts' weights too.

    Returns:
        Shape of `x`. Its dtype; under autocast the autocast dtype, as torch.nn.functional.linear does it.

    Raises:
        ValueError: a shape, dtype, device or value disagrees with the above. The op also raises one under
            torch.jit.trace, torch.vmap, forward-mode differentiation and for a second derivative.

    Under autocast every call casts what it multiplies: 6 bytes of traffic for each float32 element of the weights.
    Differentiable once in x, w1, b1, w2, b2 and routing_weights. Reference: `moebert_kernels.reference.fused_moe_ffn`.
    """
    check_not_traced("fused_moe_ffn")

    def check() -> None:
        check_features(x)
        check_ffn_weights(x.shape[-1], w1, b1, w2, b2, activation)
        check_probability("hidden_dropout_p", hidden_dropout_p)
        check_seed(dropout_seed, x)
        check_dtypes_and_devices("x", x, {"w1": w1, "b1": b1, "w2": w2, "b2": b2})

    cast_to = autocast_dtype(x) if isinstance(x, Tensor) else None
    checked_once(check, (x, w1, b1, w2, b2, dropout_seed), activation, hidden_dropout_p, cast_to)
    routing, top_k = check_routing(x, routing, w1.shape[0], max_top_k=None)
    routing_weights = resolve_routing_weights(x, top_k, routing_weights)
    if hidden_dropout_p > 0 and dropout_seed is None:
        dropout_seed = dropout.draw_seed(x.device)

    flat, *weights = to_dtype(cast_to, as_rows(x), w1, b1, w2, b2)
    trains, one_node = _FUSED_MOE_FFN.needs_saving(flat, *weights, routing_weights), opaque(x)
    if isinstance(routing, Tensor) and not (trains or one_node or hidden_dropout_p):
        y = inferred_from_ids("fused_moe_ffn", flat, routing, *weights, routing_weights, activation)
        if y is not None:
            return y.view(x.shape)
    grouping = grouped(routing, w1.shape[0])
    y = _FUSED_MOE_FFN(
        one_node, trains, flat, *weights, routing_weights,
        grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row, dropout_seed, top_k, activation,
        float(hidden_dropout_p), trains and not recompute,
    )  # fmt: skip
    return y if x.ndim == 2 else y.view(x.shape)


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, routing_weights: Tensor | None,
    offsets: Tensor, row_to_assignment: Tensor, assignment_to_row: Tensor, seed: Tensor | None,
    top_k: int, activation: str, hidden_dropout_p: float, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grouping = Grouping(offsets, row_to_assignment, assignment_to_row, top_k)
    with inside_op(x):
        return backend.implementation("fused_moe_ffn", x).forward(
            x, grouping, w1, b1, w2, b2, routing_weights, activation, hidden_dropout_p, seed, save
        )  # fmt: skip


def _backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    routing_weights: Tensor | None, offsets: Tensor, row_to_assignment: Tensor, assignment_to_row: Tensor,
    seed: Tensor | None, h_pre: Tensor, top_k: int, activation: str, hidden_dropout_p: float, save: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grouping = Grouping(offsets, row_to_assignment, assignment_to_row, top_k)
    with inside_op(x):
        grads = backend.implementation("fused_moe_ffn", x).backward(
            dy, x, h_pre, grouping, w1, b1, w2, b2, routing_weights, activation, hidden_dropout_p, seed, tuple(needs)
        )  # fmt: skip
    return grads


def _fake_forward(
    x: Tensor, w1: Tensor, b1: Any, w2: Any, b2: Any, routing_weights: Any, offsets: Any, row_to_assignment: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    save = rest[-1]
    return x.new_empty(x.shape), x.new_empty(row_to_assignment.shape[0] if save else 0, w1.shape[1])


def _fake_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = rest[:6], rest[-1]  # x, w1, b1, w2, b2, routing_weights
    return tuple(t.new_empty(t.shape) if need else dy.new_empty(0) for t, need in zip(inputs, needs, strict=True))


_FUSED_MOE_FFN = Differentiable(
    "fused_moe_ffn", _forward, _backward, _fake_forward, _fake_backward,
    tensor_arguments=10, differentiable=(0, 1, 2, 3, 4, 5),
)  # fmt: skip
