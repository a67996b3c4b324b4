"""Argument checks and casts that the ops share. Every message: `name: expected what, got what`."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moebert_kernels.activation import ACTIVATIONS, is_gated
from moebert_kernels.grouping import Grouping

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)  # that kernels load
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_NOTHING = nullcontext()


def opaque(x: Tensor) -> bool:
    """Whether the op must appear as one node: while torch compiles, exports, traces, or runs without data."""
    return torch.compiler.is_compiling() or x.is_meta or _get_current_dispatch_mode() is not None


def transformed() -> bool:
    """Whether the call is inside a transform of torch.func, whose tensors kernels cannot read."""
    return torch._C._are_functorch_transforms_active()


def check_not_traced(op: str) -> None:
    """The first check of every op: in torch.jit.trace sizes are tensors, and routing would become a constant."""
    if torch.jit.is_tracing():
        raise ValueError(
            f"{op}: expected a call that torch.jit.trace does not record, got one: the trace would route every input "
            "as its example; use torch.export"
        )


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_integers(name: str, ids: Tensor) -> Tensor:
    """`ids` in a dtype that kernels load."""
    check_tensor(name, ids)
    if ids.dtype in INTEGERS:
        return ids
    if ids.dtype in _WIDE_UNSIGNED:
        return ids.long()  # what wraps becomes negative: out of every range, as it was
    raise ValueError(f"{name}: expected an integer dtype, got {ids.dtype}")


def check_shape(name: str, tensor: Tensor, wanted: dict[str, int]) -> None:
    """`wanted`: dimension names and sizes in order, e.g. {"E": 4, "I": 8}."""
    check_tensor(name, tensor)
    if (*tensor.shape,) != (*wanted.values(),):
        sizes = ", ".join(f"{dim}={size}" for dim, size in wanted.items())
        raise ValueError(f"{name}: expected shape ({sizes}), got {tuple(tensor.shape)}")


def check_num_experts(num_experts: int) -> None:
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
        raise ValueError(f"num_experts: expected an integer >= 1, got {num_experts!r}")


def check_probability(name: str, p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {p}")


def check_seed(seed: Tensor | None) -> None:
    if seed is not None and (not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.ndim != 0):
        got = f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise ValueError(f"dropout_seed: expected an int64 tensor of shape (), got {got}")


def check_dtypes_and_devices(first: str, x: Tensor, others: dict[str, Tensor | None]) -> None:
    """All of `others` on x's device and, outside autocast, of x's dtype."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{first}: expected dtype {', '.join(str(d) for d in FLOATS)}, got {x.dtype}")
    casting = autocast_dtype(x) is not None
    device, dtype = x.device, x.dtype
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device} (as {first}), got {tensor.device}")
        if casting and tensor.dtype in FLOATS and tensor.dtype != torch.float64:
            continue
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected dtype {dtype} (as {first}), got {tensor.dtype}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of GEMM operands; None outside autocast and for float64, which it leaves alone."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def inside_op(x: Tensor) -> AbstractContextManager[object]:
    """Where an op runs: on x's GPU, and without autocast, since operands are cast already."""
    casting = autocast_dtype(x) is not None
    elsewhere = x.device.type == "cuda" and x.device.index != torch.cuda.current_device()
    if not casting and not elsewhere:
        return _NOTHING
    contexts = ExitStack()
    if casting:
        contexts.enter_context(torch.autocast(x.device.type, enabled=False))
    if elsewhere:
        contexts.enter_context(torch.cuda.device(x.device))
    return contexts


def to_dtype(dtype: torch.dtype | None, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast what is there; `dtype` None leaves everything as it is. Differentiable."""
    return list(tensors) if dtype is None else [None if t is None else _cast_once(t, dtype) for t in tensors]


def _cast_once(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast that one call uses, forward and backward; no other call does.

    A weight's cast cannot be kept for the next call. Fused optimizers and writes through `.data` or numpy change a
    weight but not its version counter or its address, and autocast's own cache, which lives as long as the outermost
    context, misses them inside it. The cost: 6 bytes of traffic per float32 element and call, as a layer of
    torch.nn.Linear has once per context.
    """
    return tensor.to(dtype)


def check_grouping(name: str, grouping: Grouping, num_experts: int, rows: int | None = None) -> None:
    if grouping.num_experts != num_experts:
        raise ValueError(f"{name}: expected a grouping over E={num_experts} experts, got {grouping.num_experts}")
    if rows is not None and grouping.num_rows != rows:
        raise ValueError(f"{name}: expected a grouping of {rows} rows, got {grouping.num_rows}")


def check_ffn_weights(
    hidden: int, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> None:
    """Shapes of an expert feed-forward's weights over inputs of `hidden` columns."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_tensor("w1", w1)
    check_tensor("w2", w2)
    if w2.ndim != 3:
        raise ValueError(f"w2: expected shape (E, H, I), got {tuple(w2.shape)}")
    num_experts, width = w2.shape[0], w2.shape[2]
    if num_experts < 1:
        raise ValueError(f"w2: expected E >= 1 experts, got {tuple(w2.shape)}")
    rows = {"2I": 2 * width} if is_gated(activation) else {"I": width}
    check_shape("w1", w1, {"E": num_experts, **rows, "H": hidden})
    check_shape("w2", w2, {"E": num_experts, "H": hidden, "I": width})
    if b1 is not None:
        check_shape("b1", b1, {"E": num_experts, **rows})
    if b2 is not None:
        check_shape("b2", b2, {"E": num_experts, "H": hidden})
