"""One definition of an op's derivative for both of its forms: eager and opaque.

Eager calls skip the custom-op wrapper and go through an `autograd.Function`; while torch compiles or exports, the same
forward and backward run as functional custom ops. Both have a first derivative in reverse mode. A second derivative,
forward mode and torch.vmap raise, because torch's own treatment of each would in some case give zeros or silently drop
a term.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from moebert_kernels import backend
from moebert_kernels.ops._checks import transformed

Output = Tensor | tuple[Tensor, ...]


def _outputs(output: Output) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


class Differentiable:
    """An op made of `forward(*args)` and `backward(*args)`, which gives gradients or None.

    `forward` gives a tensor, or several as a tuple: not a tuple of one, whose clamp in a compiled model's training
    torch 2.13 cannot make functional. Only the first is differentiable; the others are saved for backward, which takes
    dy, the first `tensor_arguments` arguments, the other outputs, the other arguments and which of the
    `differentiable` arguments need a gradient.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Output],
        backward: Callable[..., Any],
        fake_forward: Callable[..., Output],
        fake_backward: Callable[..., tuple[Tensor, ...]],
        tensor_arguments: int,
        differentiable: tuple[int, ...],
    ) -> None:
        forward_op = torch.library.custom_op(f"moebert_kernels::{name}", forward, mutates_args=())

        @functools.wraps(backward)
        def whole_backward(dy: Tensor, *args: Any) -> Any:
            return or_empty(dy, backward(dy, *args))

        backward_op = torch.library.custom_op(f"moebert_kernels::{name}_backward", whole_backward, mutates_args=())
        forward_op.register_fake(fake_forward)
        backward_op.register_fake(fake_backward)
        backward_op.register_autograd(second_derivative(name))

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Output) -> None:
            ctx.save_for_backward(*inputs[:tensor_arguments], *_outputs(output)[1:])
            ctx.constants = inputs[tensor_arguments:]
            ctx.preference = backend.preference()

        def run_backward(run: Callable[..., tuple[Tensor, ...]], ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            wanted = ctx.needs_input_grad  # a new tuple at every look
            needs = [wanted[i] for i in differentiable]
            with backend.preferring(ctx.preference):
                grads = run(dy, *saved, *ctx.constants, needs)
            places: list[Tensor | None] = [None] * len(wanted)
            for i, need, grad in zip(differentiable, needs, grads, strict=True):
                places[i] = grad if need else None
            return tuple(places)

        forward_op.register_autograd(
            lambda ctx, dy, *_: run_backward(backward_op, ctx, dy), setup_context=setup_context
        )

        backward_once = without_derivative(name, backward)

        class Eager(first_order(name)):  # type: ignore[misc]
            @staticmethod
            def forward(*args: Any) -> Output:
                return forward(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Output) -> None:
                ctx.mark_non_differentiable(*_outputs(output)[1:])
                setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
                return run_backward(backward_once, ctx, dy)

        self._name = name
        self._forward = forward
        self._forward_op = forward_op
        self._eager = Eager

    def __call__(self, opaque: bool, trains: bool, *args: Any) -> Tensor:
        """The first output; `trains`: what `needs_saving` says of the differentiable arguments."""
        check_forward_mode(self._name, *args)
        if opaque and transformed():
            check_not_recorded(self._name)
        elif opaque:
            return _outputs(self._forward_op(*args))[0]
        if trains or transformed():
            return _outputs(apply(self._eager, *args))[0]
        return _outputs(self._forward(*args))[0]

    def needs_saving(self, *tensors: Tensor | None) -> bool:
        """Whether backward may run, and forward has something to keep for it."""
        return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply` of all arguments, as torch does it but for `inspect.signature`, which takes 40 us."""
    if transformed():
        return function.apply(*args)
    alive = [unwrap_if_dead(arg) if isinstance(arg, Tensor) else arg for arg in args]
    return super(torch.autograd.Function, function).apply(*alive)  # type: ignore[misc]


def first_order(name: str) -> type[torch.autograd.Function]:
    """The base of an op's function: torch.vmap and forward mode raise."""

    class FirstOrder(torch.autograd.Function):
        @staticmethod
        def vmap(*_: Any) -> NoReturn:
            raise ValueError(f"{name}: expected no torch.vmap (jacrev) over its tensors, got one: use a loop")

        @staticmethod
        def jvp(*_: Any) -> NoReturn:
            _refuse_forward_mode(name)

    return FirstOrder


def check_forward_mode(name: str, *args: Any) -> None:
    """Raise if a tensor carries a tangent; a custom op would drop it."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args):
        _refuse_forward_mode(name)


def check_not_recorded(name: str) -> None:
    """Raise where a graph is made of a transform of torch.func, in which torch's custom ops have no derivative.

    Other modes, as that which counts FLOPs, see the eager form; in a graph it would be the example's routing.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # which takes long to import

    if get_proxy_mode() is not None:
        raise ValueError(f"{name}: expected no transform of torch.func while make_fx or torch.export records, got one")


def _refuse_forward_mode(name: str) -> NoReturn:
    raise ValueError(f"{name}: expected reverse-mode differentiation, got forward mode (jvp, jacfwd, dual tensors)")


def without_derivative(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` as a function of all that it reads, so that its own derivative always raises.

    `once_differentiable` looks at the incoming gradient alone: if that is a constant, as of a loss that is linear in
    y, it passes the second derivative by in silence.
    """

    class Once(first_order(name)):  # type: ignore[misc]
        @staticmethod
        def forward(*args: Any) -> Any:
            return tuple(backward(*args))

        @staticmethod
        def setup_context(*_: Any) -> None:
            pass

        backward = staticmethod(second_derivative(name))

    def run(*args: Any) -> Any:
        return apply(Once, *args) if torch.is_grad_enabled() or transformed() else backward(*args)

    return run


def second_derivative(name: str) -> Callable[..., NoReturn]:
    """What stands for the derivative of an op's backward."""

    def refuse(*_: Any) -> NoReturn:
        raise ValueError(f"{name}: expected a first derivative, got a second one (create_graph, grad of grad, hessian)")

    return refuse


def or_empty(like: Tensor, grads: Iterable[Tensor | None]) -> Any:
    """Custom ops return tensors only: a gradient that nobody needs is an empty one."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)
