"""Expert weights from a matrix-product-operator (MPO) decomposition whose central tensor all experts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moebert_kernels import backend
from moebert_kernels.ops._checks import (
    autocast_dtype,
    check_dtypes_and_devices,
    check_not_traced,
    check_shape,
    check_tensor,
    inside_op,
    opaque,
    to_dtype,
    transformed,
)
from moebert_kernels.ops._differentiable import (
    check_forward_mode,
    check_not_recorded,
    first_order,
    or_empty,
    second_derivative,
    without_derivative,
)


def mpo_expert_weights(
    central: Tensor, aux: Sequence[Tensor], *, offsets: Tensor | None = None, central_site: int | None = None
) -> Tensor:
    """Multiply the site tensors of every expert up to its weight, in nn.Linear layout.

    W_e[i_1..i_n, j_1..j_n] = A_e1[i_1, j_1] ... C[i_c, j_c] ... A_en[i_n, j_n], a product of matrices over the bonds
    (MPOE, arXiv 2203.01104).

    Args:
        central: (D_c, i_c, j_c, D_c+1) float, shared by all experts. Any strides, as all others.
        aux: the auxiliary tensors (E, D_k, i_k, j_k, D_k+1) in site order, without the central one; at least one. The
            outer bonds are 1.
        offsets: (E + 1,) int32, a `Grouping`'s, on the same device: experts without rows get zeros and cost nothing. A
            GPU looks it up itself.
        central_site: position of the central tensor among all sites; None: len(aux) // 2.

    Returns:
        (E, out, in) with out = prod i_k, in = prod j_k. Dtype of `central`; under autocast its dtype.

    Raises:
        ValueError: a shape, dtype, device or position disagrees with the above; or a second derivative, forward mode,
            torch.vmap or torch.jit.trace is asked for.

    Under autocast every call casts what it multiplies: 6 bytes of traffic for each float32 element of the weights.
    Differentiable once in central and aux. Backward needs the arguments alone: nothing else is kept for it. A tensor
    that needs no gradient saves its part of the work, for instance a central tensor that is masked in this step.
    Reference: `moebert_kernels.reference.mpo_expert_weights`.
    """
    check_not_traced(_NAME)
    central_site = _check(central, aux, offsets, central_site)
    offsets = None if offsets is None else offsets.contiguous()  # as kernels read them
    tensors = to_dtype(autocast_dtype(central), central, *aux)
    check_forward_mode(_NAME, *tensors)
    if opaque(central) and transformed():
        check_not_recorded(_NAME)
    elif opaque(central):
        return _mpo_expert_weights(tensors, offsets, central_site)
    if transformed() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return _Eager.apply(offsets, central_site, *tensors)
    return _forward(tensors, offsets, central_site)


def _check(central: Tensor, aux: Sequence[Tensor], offsets: Tensor | None, central_site: int | None) -> int:
    """The position of the central tensor, if the arguments fit together."""
    check_tensor("central", central)
    if central.ndim != 4 or 0 in central.shape:
        raise ValueError(f"central: expected shape (D, i, j, D') of sizes >= 1, got {tuple(central.shape)}")
    if isinstance(aux, Tensor) or not hasattr(aux, "__getitem__") or len(aux) == 0:
        got = "a tensor" if isinstance(aux, Tensor) else "none" if hasattr(aux, "__getitem__") else type(aux).__name__
        raise ValueError(f"aux: expected a sequence of at least one tensor (E, D, i, j, D'), got {got}")
    if central_site is None:
        central_site = len(aux) // 2
    if not isinstance(central_site, int) or isinstance(central_site, bool) or not 0 <= central_site <= len(aux):
        raise ValueError(f"central_site: expected a position from 0 to {len(aux)}, got {central_site!r}")
    for k, site in enumerate(aux):
        check_tensor(f"aux[{k}]", site)
        if site.ndim != 5 or 0 in site.shape:
            raise ValueError(f"aux[{k}]: expected shape (E, D, i, j, D') of sizes >= 1, got {tuple(site.shape)}")
    num_experts = aux[0].shape[0]
    names = [f"aux[{k}]" for k in range(len(aux))]
    shapes = [tuple(site.shape[1:]) for site in aux]
    names.insert(central_site, "central")
    shapes.insert(central_site, tuple(central.shape))
    bond, before = 1, "the outer bond"
    for name, shape in zip(names, shapes, strict=True):
        if shape[0] != bond:
            raise ValueError(f"{name}: expected a left bond of {bond} ({before}), got {shape[0]}")
        bond, before = shape[-1], f"as {name}"
    if bond != 1:
        raise ValueError(f"{names[-1]}: expected a right bond of 1 (the outer bond), got {bond}")
    for k, site in enumerate(aux):
        if site.shape[0] != num_experts:
            raise ValueError(f"aux[{k}]: expected E={num_experts} experts (as aux[0]), got {site.shape[0]}")
    check_dtypes_and_devices("central", central, {f"aux[{k}]": site for k, site in enumerate(aux)})
    if offsets is not None:
        check_shape("offsets", offsets, {"E + 1": num_experts + 1})
        if offsets.dtype != torch.int32 or offsets.device != central.device:
            raise ValueError(f"offsets: expected int32 on {central.device}, got {offsets.dtype} on {offsets.device}")
    return central_site


def _forward(tensors: Sequence[Tensor], offsets: Tensor | None, central_site: int) -> Tensor:
    central, *aux = tensors
    with inside_op(central):
        return backend.implementation("mpo_expert_weights", central).forward(central, aux, offsets, central_site)


def _backward(
    dw: Tensor, tensors: Sequence[Tensor], offsets: Tensor | None, central_site: int, needs: Sequence[bool]
) -> list[Tensor | None]:
    central, *aux = tensors
    with inside_op(central):
        return backend.implementation("mpo_expert_weights", central).backward(
            dw, central, aux, offsets, central_site, needs
        )


def _flat_backward(
    dw: Tensor, offsets: Tensor | None, central_site: int, needs: Sequence[bool], *tensors: Tensor
) -> tuple[Tensor, ...]:
    return or_empty(dw, _backward(dw, tensors, offsets, central_site, needs))


_NAME = "mpo_expert_weights"
_backward_once = without_derivative(_NAME, _flat_backward)


class _Eager(first_order(_NAME)):  # type: ignore[misc]
    @staticmethod
    def forward(offsets: Tensor | None, central_site: int, *tensors: Tensor) -> Tensor:
        return _forward(tensors, offsets, central_site)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        offsets, ctx.central_site, *tensors = inputs
        ctx.save_for_backward(offsets, *tensors)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        offsets, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        grads = _backward_once(dw, offsets, ctx.central_site, needs, *tensors)
        return None, None, *_needed(grads, needs)


def _needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


# `Differentiable` takes a fixed number of tensors; the opaque form of this op takes them as one list.
@torch.library.custom_op("moebert_kernels::mpo_expert_weights", mutates_args=())
def _mpo_expert_weights(tensors: Sequence[Tensor], offsets: Tensor | None, central_site: int) -> Tensor:
    return _forward(tensors, offsets, central_site)


@torch.library.custom_op("moebert_kernels::mpo_expert_weights_backward", mutates_args=())
def _mpo_expert_weights_backward(
    dw: Tensor, tensors: Sequence[Tensor], offsets: Tensor | None, central_site: int, needs: Sequence[bool]
) -> list[Tensor]:
    return list(_flat_backward(dw, offsets, central_site, needs, *tensors))


@_mpo_expert_weights.register_fake
def _(tensors: Sequence[Tensor], offsets: Tensor | None, central_site: int) -> Tensor:
    central, *aux = tensors
    rows, columns = central.shape[1], central.shape[2]
    for site in aux:
        rows, columns = rows * site.shape[2], columns * site.shape[3]
    return central.new_empty(aux[0].shape[0], rows, columns)


@_mpo_expert_weights_backward.register_fake
def _(dw: Tensor, tensors: Sequence[Tensor], offsets: Any, central_site: int, needs: Sequence[bool]) -> list[Tensor]:
    return [dw.new_empty(tensor.shape if need else 0) for tensor, need in zip(tensors, needs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, offsets, ctx.central_site = inputs
    ctx.save_for_backward(offsets, *tensors)


def _opaque_backward(ctx: Any, dw: Tensor) -> tuple[Any, ...]:
    offsets, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[0])
    grads = _mpo_expert_weights_backward(dw, tensors, offsets, ctx.central_site, needs)
    return _needed(grads, needs), None, None


_mpo_expert_weights.register_autograd(_opaque_backward, setup_context=_setup_context)
_mpo_expert_weights_backward.register_autograd(second_derivative(_NAME))
