"""The LayerNorm before an expert, which writes its rows in the order of the experts."""

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
    check_grouping,
    check_not_traced,
    check_probability,
    check_seed,
    check_shape,
    check_tensor,
    checked_once,
    inside_op,
    opaque,
    to_dtype,
)
from moebert_kernels.ops._differentiable import Differentiable


def add_norm_in_order(
    residual: Tensor, added: Tensor, norm_weight: Tensor, norm_bias: Tensor, grouping: Grouping, *,
    eps: float = 1e-12, dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Residual, dropout and LayerNorm, written in the order of the experts: x[r] = LN(residual[t] + dropout(added[t])).

    `fused_moe_ffn_add_norm(x, grouping, ..., in_order=True)` reads such rows without a gather. Every token has a row,
    those without an expert too.

    Args:
        residual: (..., H) float, by token.
        added: its shape; what is dropped out and added.
        norm_weight: (H,).
        norm_bias: (H,).
        grouping: of the flattened tokens, top-1; row r is token t = row_to_assignment[r].
        eps: added to the variance; finite, at least 0.
        dropout_p: probability of dropping an element of `added`, in [0, 1 - 2^-17). Masks are those of the tokens.
        dropout_seed: () int64 on the device of `residual`; drawn from torch's generator when None.

    Returns:
        Shape of `residual`: the flattened result holds the rows. Its dtype; under autocast float32.

    Raises:
        ValueError: a shape, dtype, device or value disagrees with the above; or a second derivative, forward mode,
            torch.vmap or torch.jit.trace is asked for.

    Differentiable once in the four tensors. Reference: `moebert_kernels.reference.add_norm_in_order`.
    """
    check_not_traced("add_norm_in_order")

    def check() -> None:
        check_features(residual, "residual")
        check_tensor("added", added)
        if added.shape != residual.shape:
            raise ValueError(f"added: expected shape {tuple(residual.shape)} (as residual), got {tuple(added.shape)}")
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        for name, tensor in norm.items():
            check_shape(name, tensor, {"H": residual.shape[-1]})
        check_probability("dropout_p", dropout_p)
        check_eps(eps)
        check_seed(dropout_seed, residual)
        check_dtypes_and_devices("residual", residual, {"added": added, **norm})

    casting = isinstance(residual, Tensor) and autocast_dtype(residual) is not None
    checked_once(check, (residual, added, norm_weight, norm_bias, dropout_seed), eps, dropout_p, casting)
    if not isinstance(grouping, Grouping) or grouping.top_k != 1:
        got = f"one of top_k={grouping.top_k}" if isinstance(grouping, Grouping) else type(grouping).__name__
        raise ValueError(f"grouping: expected a top-1 Grouping, got {got}")
    flat = as_rows(residual)
    check_grouping("grouping", grouping, grouping.num_experts, residual, flat.shape[0])
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = dropout.draw_seed(residual.device)
    flat, weight, bias = to_dtype(torch.float32 if casting else None, flat, norm_weight, norm_bias)
    one_node = opaque(residual)
    operands = (flat, as_rows(added).contiguous(), weight, bias)
    y = _ADD_NORM_IN_ORDER(
        one_node, _ADD_NORM_IN_ORDER.needs_saving(*operands), *operands,
        grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row, dropout_seed,
        float(eps), float(dropout_p), one_node,
    )  # fmt: skip
    return y.view(residual.shape)


def _forward(
    residual: Tensor, added: Tensor, norm_weight: Tensor, norm_bias: Tensor, offsets: Tensor,
    row_to_assignment: Tensor, assignment_to_row: Tensor, seed: Tensor | None, eps: float, dropout_p: float,
    apart: bool,
) -> Tensor:  # fmt: skip
    grouping = Grouping(offsets, row_to_assignment, assignment_to_row)
    with inside_op(residual):
        y: Tensor = backend.implementation("add_norm_in_order", residual).forward(
            residual, added, norm_weight, norm_bias, grouping, eps, dropout_p, seed
        )
    return y


def _backward(
    dy: Tensor, residual: Tensor, added: Tensor, norm_weight: Tensor, norm_bias: Tensor, offsets: Tensor,
    row_to_assignment: Tensor, assignment_to_row: Tensor, seed: Tensor | None, eps: float, dropout_p: float,
    apart: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grouping = Grouping(offsets, row_to_assignment, assignment_to_row)
    with inside_op(residual):
        grads = backend.implementation("add_norm_in_order", residual).backward(
            dy, residual, added, norm_weight, norm_bias, grouping, eps, dropout_p, seed
        )
    if apart and grads[0] is grads[1]:  # outputs of a custom op are different tensors
        grads = (grads[0], grads[0].clone() if needs[1] else grads[0], *grads[2:])
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _fake_forward(residual: Tensor, *_: Any) -> Tensor:
    return residual.new_empty(residual.shape)


def _fake_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) if need else dy.new_empty(0) for t, need in zip(rest[:4], rest[-1], strict=True))


_ADD_NORM_IN_ORDER = Differentiable(
    "add_norm_in_order", _forward, _backward, _fake_forward, _fake_backward,
    tensor_arguments=8, differentiable=(0, 1, 2, 3),
)  # fmt: skip
