"""One definition of an op's derivative for both of its forms: eager and opaque.

Eager calls skip the custom-op wrapper and go through an `autograd.Function`; while torch compiles or exports, the same
forward and backward run as functional custom ops. A second derivative raises in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moebert_kernels import backend


class Differentiable:
    """An op made of `forward(*args) -> tuple[Tensor, ...]` and `backward(*args) -> tuple[Tensor, ...]`.

    Only the first output is differentiable; the others are saved for backward. `save(args, outputs)` returns the
    tensors and the constants that `backward` takes after `dy`; `spread(grads)` puts the gradients into the places of
    forward's arguments.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Tensor, ...]],
        fake_forward: Callable[..., tuple[Tensor, ...]],
        fake_backward: Callable[..., tuple[Tensor, ...]],
        tensor_arguments: int,
        differentiable: tuple[int, ...],
    ) -> None:
        forward_op = torch.library.custom_op(f"moebert_kernels::{name}", forward, mutates_args=())
        backward_op = torch.library.custom_op(f"moebert_kernels::{name}_backward", backward, mutates_args=())
        forward_op.register_fake(fake_forward)
        backward_op.register_fake(fake_backward)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.save_for_backward(*inputs[:tensor_arguments], *output[1:])
            ctx.constants = inputs[tensor_arguments:]
            ctx.preferring = backend.preferring_as_here()

        def run_backward(run: Callable[..., tuple[Tensor, ...]], ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            needs = [ctx.needs_input_grad[i] for i in differentiable]
            with ctx.preferring():
                grads = run(dy, *saved, *ctx.constants, needs)
            places: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
            for i, need, grad in zip(differentiable, needs, grads, strict=True):
                places[i] = grad if need else None
            return tuple(places)

        forward_op.register_autograd(
            lambda ctx, dy, *_: run_backward(backward_op, ctx, dy), setup_context=setup_context
        )

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> tuple[Tensor, ...]:
                return forward(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
                ctx.mark_non_differentiable(*output[1:])
                setup_context(ctx, inputs, output)

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
                return run_backward(backward, ctx, dy)

        self._forward = forward
        self._forward_op = forward_op
        self._eager = Eager
        self._differentiable = differentiable

    def __call__(self, opaque: bool, *args: Any) -> Tensor:
        if opaque:
            return self._forward_op(*args)[0]
        if torch.is_grad_enabled() and any(_requires_grad(args[i]) for i in self._differentiable):
            return self._eager.apply(*args)[0]
        return self._forward(*args)[0]

    def needs_saving(self, *tensors: Tensor | None) -> bool:
        """Whether backward may run, and forward has something to keep for it."""
        return torch.is_grad_enabled() and any(_requires_grad(t) for t in tensors)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def or_empty(like: Tensor, grads: list[Tensor | None]) -> Any:
    """Custom ops return tensors only: a gradient that nobody needs is an empty one."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)
