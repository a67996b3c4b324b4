"""Argument checks and casts that the ops share. Every message: `name: expected what, got what`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, is_traceable_wrapper_subclass

from moebert_kernels import dropout
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


_PASSED: set[tuple[object, ...]] = set()  # calls that passed their checks, by all that these look at
_MOST_PASSED = 4096


def checked_once(check: Callable[[], None], tensors: Sequence[Tensor | None], *values: object) -> None:
    """Run `check`, unless a call whose tensors and values look the same has passed it.

    What cannot be a key (symbolic sizes, arguments of wrong types) is checked at every call, and in a dispatch mode,
    in which more passes.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        check()
        return
    try:
        looks: list[object] = []
        for t in tensors:
            looks += (None,) if t is None else (t.__class__, t.shape, t.dtype, t.device, t.layout, t.is_neg())
        key = (check.__code__, *looks, *values, *map(type, values))
        if key in _PASSED:
            return
    except (AttributeError, TypeError, RuntimeError):
        check()
        return
    check()
    if len(_PASSED) >= _MOST_PASSED:
        _PASSED.clear()
    _PASSED.add(key)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
        raise ValueError(f"{name}: expected a dense tensor, got {got}")
    if is_traceable_wrapper_subclass(value) and not opaque(value):  # DTensor: kernels would read from address 0
        raise ValueError(
            f"{name}: expected a plain tensor, as to_local() or wait() gives it, got {type(value).__name__}"
        )
    if not torch.compiler.is_compiling() and value.is_neg():  # kernels read memory as it is
        raise ValueError(f"{name}: expected the result of resolve_neg(), got a negative view, as .conj().imag gives it")


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
    if not is_number(p) or not 0 <= p < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {p!r}")
    if dropout.threshold(p) == dropout.threshold(1.0):
        raise ValueError(f"{name}: expected less than 1 - 2^-17, since masks have 16 bits per element, got {p!r}")


def check_seed(seed: Tensor | None, x: Tensor) -> None:
    if seed is None:
        return
    check_tensor("dropout_seed", seed)
    if seed.dtype != torch.int64 or seed.ndim != 0:
        got = f"{seed.dtype} of shape {tuple(seed.shape)}"
        raise ValueError(f"dropout_seed: expected int64 of shape (), got {got}")
    if seed.device != x.device:
        raise ValueError(f"dropout_seed: expected device {x.device} (as x), got {seed.device}")


def check_dtypes_and_devices(first: str, x: Tensor, others: dict[str, Tensor | None]) -> None:
    """Check that all of `others` are on x's device and, outside autocast, have x's dtype."""
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
    casting = torch._C._is_any_autocast_enabled() and autocast_dtype(x) is not None
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
    """Cast the tensors that are not None; return them unchanged if `dtype` is None. Differentiable."""
    return list(tensors) if dtype is None else [None if t is None else _cast_once(t, dtype) for t in tensors]


def _cast_once(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast that one call uses, forward and backward; no other call does.

    A weight's cast cannot be kept for the next call. Fused optimizers and writes through `.data` or numpy change a
    weight but not its version counter or its address, and autocast's own cache, which lives as long as the outermost
    context, misses them inside it. The cost: 6 bytes of traffic per float32 element and call, as a layer of
    torch.nn.Linear has once per context.
    """
    return tensor.to(dtype)


def check_grouping(name: str, grouping: Grouping, num_experts: int, x: Tensor, tokens: int | None = None) -> None:
    """A Grouping over `num_experts` experts on x's device, of `tokens` tokens if that is given."""
    check_maps(name, grouping)
    if grouping.offsets.device != x.device:
        raise ValueError(f"{name}: expected a grouping on {x.device} (as x), got one on {grouping.offsets.device}")
    if grouping.num_experts != num_experts:
        raise ValueError(f"{name}: expected a grouping over E={num_experts} experts, got {grouping.num_experts}")
    if tokens is not None and grouping.num_rows != tokens * grouping.top_k:
        got = f"{grouping.num_tokens} with top_k={grouping.top_k}"
        raise ValueError(f"{name}: expected a grouping of {tokens} tokens, got one of {got}")


def check_ffn_weights(
    hidden: int, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> None:
    """Check the shapes of an expert feed-forward's weights for inputs of `hidden` columns."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_tensor("w1", w1)
    check_tensor("w2", w2)
    if w2.ndim != 3:
        raise ValueError(f"w2: expected shape (E, H, I), got {tuple(w2.shape)}")
    num_experts, width = w2.shape[0], w2.shape[2]
    if num_experts < 1 or width < 1:
        raise ValueError(f"w2: expected shape (E, H, I) with E, I >= 1, got {tuple(w2.shape)}")
    rows = {"2I": 2 * width} if is_gated(activation) else {"I": width}
    check_shape("w1", w1, {"E": num_experts, **rows, "H": hidden})
    check_shape("w2", w2, {"E": num_experts, "H": hidden, "I": width})
    if b1 is not None:
        check_shape("b1", b1, {"E": num_experts, **rows})
    if b2 is not None:
        check_shape("b2", b2, {"E": num_experts, "H": hidden})


def check_features(x: Tensor, name: str = "x") -> None:
    """x of shape (..., H) with H >= 1."""
    check_tensor(name, x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape (..., H) with H >= 1, got {tuple(x.shape)}")


def as_rows(x: Tensor) -> Tensor:
    """(..., H) -> (T, H)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def check_eps(eps: float) -> None:
    if not is_number(eps) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")


def check_mask(mask: Tensor | None, name: str, tokens: Tensor) -> None:
    """An attention mask for `tokens`, called `name`, of any dtype that can be compared with 0."""
    if mask is None:
        return
    check_tensor("attention_mask", mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask: expected shape {tuple(tokens.shape)} (as {name}), got {tuple(mask.shape)}")
    if mask.dtype not in (torch.bool, *INTEGERS, *_WIDE_UNSIGNED, *FLOATS):
        raise ValueError(f"attention_mask: expected bool, integers or floats, got {mask.dtype}")
    if mask.device != tokens.device:
        raise ValueError(f"attention_mask: expected device {tokens.device} (as {name}), got {mask.device}")


def check_maps(name: str, grouping: Grouping) -> None:
    """Check, once for each Grouping made by hand, that its maps fit together: else kernels would leave their bounds.

    The maps' values are checked only on a CPU, because reading them back from a GPU would wait for it.
    """
    if getattr(grouping, _CHECKED, False):
        return
    offsets, rows = grouping.offsets, grouping.row_to_assignment
    for field in ("offsets", "row_to_assignment", "assignment_to_row"):
        tensor = getattr(grouping, field)
        check_tensor(f"{name}.{field}", tensor)
        if tensor.dtype != torch.int32 or tensor.device != offsets.device or tensor.ndim != 1:
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name}.{field}: expected one dimension of int32 on {offsets.device}, got {got}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}.{field}: expected a contiguous tensor, got strides {tensor.stride()}")
    top_k, num_rows = grouping.top_k, rows.shape[0]
    if not isinstance(top_k, int) or top_k < 1 or num_rows % top_k or grouping.assignment_to_row.shape[0] != num_rows:
        got = f"{num_rows} and {grouping.assignment_to_row.shape[0]} rows, top_k={top_k!r}"
        raise ValueError(f"{name}: expected maps of T * top_k rows with an integer top_k >= 1, got {got}")
    if offsets.shape[0] < 1:
        raise ValueError(f"{name}.offsets: expected shape (E + 1,), got {tuple(offsets.shape)}")
    if opaque(offsets) or transformed():
        return
    if offsets.device.type == "cpu":
        bounds = offsets.tolist()
        if bounds[0] != 0 or sorted(bounds) != bounds or bounds[-1] > num_rows:
            raise ValueError(f"{name}.offsets: expected ascending values from 0 to at most {num_rows}, got {bounds}")
        if not torch.equal(rows.sort().values, torch.arange(num_rows, dtype=torch.int32)):
            raise ValueError(f"{name}.row_to_assignment: expected a permutation of 0 to {num_rows - 1}, got another")
        if not torch.equal(rows.argsort(), grouping.assignment_to_row.long()):
            raise ValueError(f"{name}.assignment_to_row: expected the inverse of row_to_assignment, got another")
    trusted(grouping)


_CHECKED = "_checked"  # not a field: a Grouping that `dataclasses.replace` makes is checked again


def trusted(grouping: Grouping) -> Grouping:
    """The grouping, marked as one whose maps fit together."""
    if not torch.compiler.is_compiling():
        object.__setattr__(grouping, _CHECKED, True)
    return grouping


def is_number(value: object) -> bool:
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)
