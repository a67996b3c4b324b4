"""Grouped GEMM: each expert's rows times that expert's weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moebert_kernels import backend
from moebert_kernels.grouping import Grouping
from moebert_kernels.ops._checks import (
    autocast_dtype,
    check_dtypes_and_devices,
    check_grouping,
    check_not_traced,
    check_shape,
    check_tensor,
    inside_op,
    opaque,
    to_dtype,
)
from moebert_kernels.ops._differentiable import Differentiable


def expert_gemm(
    x: Tensor, w: Tensor, grouping: Grouping, bias: Tensor | None = None, *, gather: bool = False
) -> Tensor:
    """Multiply each expert's rows by that expert's weight: y[r] = w[e] @ x[r] + bias[e].

    Args:
        x: (T * top_k, K) float, rows in grouped order; with `gather`, (T, K) in token order.
        w: (E, N, K), one nn.Linear-style weight per expert. Any strides.
        grouping: from `group_tokens`; rows of expert e are offsets[e]:offsets[e + 1].
        bias: (E, N), or None.
        gather: read x through the grouping.

    Returns:
        (T * top_k, N) rows in grouped order, zero past the routed ones. Dtype of `x`; under autocast its dtype.

    Raises:
        ValueError: a shape, dtype or device disagrees with the above; or a second derivative, forward mode,
            torch.vmap or torch.jit.trace is asked for.

    Under autocast every call casts what it multiplies: 6 bytes of traffic for each float32 element of the weights.
    Differentiable once in x, w and bias. Reference: `moebert_kernels.reference.expert_gemm`.
    """
    check_not_traced("expert_gemm")
    check_tensor("x", x)
    check_tensor("w", w)
    if not isinstance(grouping, Grouping):
        raise ValueError(f"grouping: expected a Grouping, got {type(grouping).__name__}")
    if w.ndim != 3 or 0 in w.shape:
        raise ValueError(f"w: expected shape (E, N, K) of sizes >= 1, got {tuple(w.shape)}")
    num_experts, columns, depth = w.shape
    check_grouping("grouping", grouping, num_experts, x)
    rows = {"T": grouping.num_tokens} if gather else {"T * top_k": grouping.num_rows}
    check_shape("x", x, {**rows, "K": depth})
    if bias is not None:
        check_shape("bias", bias, {"E": num_experts, "N": columns})
    check_dtypes_and_devices("x", x, {"w": w, "bias": bias})
    operands = to_dtype(autocast_dtype(x), x, w, bias)
    return _EXPERT_GEMM(
        opaque(x), _EXPERT_GEMM.needs_saving(*operands), *operands,
        grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row, grouping.top_k, gather,
    )  # fmt: skip


def _forward(
    x: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor, row_to_assignment: Tensor, assignment_to_row: Tensor,
    top_k: int, gather: bool,
) -> Tensor:  # fmt: skip
    grouping = Grouping(offsets, row_to_assignment, assignment_to_row, top_k)
    with inside_op(x):
        y: Tensor = backend.implementation("expert_gemm", x).forward(x, w, bias, grouping, gather)
    return y


def _backward(
    dy: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor, row_to_assignment: Tensor,
    assignment_to_row: Tensor, top_k: int, gather: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grouping = Grouping(offsets, row_to_assignment, assignment_to_row, top_k)
    with inside_op(x):
        grads = backend.implementation("expert_gemm", x).backward(dy, x, w, grouping, gather, tuple(needs))
    return grads


def _fake_forward(x: Tensor, w: Tensor, bias: Any, offsets: Any, row_to_assignment: Tensor, *_: Any) -> Tensor:
    return x.new_empty(row_to_assignment.shape[0], w.shape[1])


def _fake_backward(dy: Tensor, x: Tensor, w: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(t.shape if need else 0) for t, need in zip((x, w, bias), rest[-1], strict=True))


_EXPERT_GEMM = Differentiable(
    "expert_gemm", _forward, _backward, _fake_forward, _fake_backward,
    tensor_arguments=6, differentiable=(0, 1, 2),
)  # fmt: skip
