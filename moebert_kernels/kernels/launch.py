"""Calls whose launches are known: 1 us of the host for a launch instead of 15 to 25.

Triton's own `kernel[grid](...)` binds some 40 arguments, looks at the value of each and builds the key of its cache
from them, at every launch. But what an op allocates and launches follows from the layouts of its tensors and its other
arguments. So the first call of a `recorded` function with such a key notes its allocations and launches, and later
calls only repeat them with new addresses. Addresses that are no multiples of 16 bytes, overlapping arguments and hooks
(profilers) run the function itself every time.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.config import precision_of

_INTERPRETED = triton.knobs.runtime.interpret
_SCRATCH_ALIGNMENT = 512  # bytes, as of torch's allocator
_MOST_KEYS = 4096  # of a function; lengths of batches are part of the keys

Function = TypeVar("Function", bound=Callable[..., Any])


class _Local(threading.local):
    recording: Recording | None = None


_local = _Local()
_plans: list[dict[Hashable, _Plan]] = []  # of all functions


def forget() -> None:
    """Drop all plans: for tests that change what they follow from."""
    for ready in _plans:
        ready.clear()


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launch a Triton kernel on the current device and stream, and note it where a call is recorded."""
    compiled = _with_scratch(lambda: kernel[grid](*arguments, **constants))
    if _local.recording is not None:
        _local.recording.launched(_Launch(kernel, compiled, (*grid, 1, 1)[:3], arguments, constants))


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape)`, noted."""
    tensor = like.new_empty(shape, dtype=dtype or like.dtype)
    if _local.recording is not None:
        _local.recording.add(tensor)
    return tensor


def made(make: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
    """`make(source)`, noted: what torch computes of an argument, or the argument itself."""
    tensor = make(source)
    if _local.recording is not None and tensor is not source:
        _local.recording.add(tensor, make, source)
    return tensor


def recorded(function: Function) -> Function:
    """A function whose work is `empty`, `made` and `launch`, which returns such tensors, in a list, a tuple or alone.

    Its arguments are tensors, Groupings and what can be hashed. One that runs inside another is part of it.
    """
    ready: dict[Hashable, _Plan] = {}
    _plans.append(ready)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _local.recording is not None:
            return function(*args, **kwargs)
        tensors: list[Tensor] = []
        inputs = _flat((*args, *kwargs.values()), tensors)
        addresses = [tensor.data_ptr() for tensor in tensors]
        together = 0
        for address in addresses:
            together |= address
        if together % 16 or _hooked():
            return function(*args, **kwargs)
        device = 0 if _INTERPRETED else driver.active.get_current_device()
        key = (device, *kwargs, *inputs)
        plan = ready.get(key)
        if plan is not None:
            return plan.run(tensors, addresses, device)
        recording = _local.recording = Recording(tensors)
        try:
            outputs = function(*args, **kwargs)
        finally:
            _local.recording = None
        plan = recording.plan(outputs)
        if plan is not None:
            if len(ready) >= _MOST_KEYS:
                ready.clear()
            ready[key] = plan
        return outputs

    call.ready = ready  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _flat(values: Iterable[Any], tensors: list[Tensor]) -> list[Hashable]:
    """What decides about launches; tensors go into the list."""
    key: list[Hashable] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            dtype = value.dtype
            key += (dtype, value.shape, value.stride())
            if dtype is torch.float32:
                key.append(precision_of(dtype))
        elif isinstance(value, Grouping):
            key.append(value.top_k)
            key += _flat((value.offsets, value.row_to_assignment, value.assignment_to_row), tensors)
        else:
            key.append(value)
    return key


def _hooked() -> bool:
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _with_scratch(run: Callable[[], Any]) -> Any:
    """Run what launches, with torch's memory for descriptors that a kernel makes, and leave the caller's allocator."""

    def inside() -> Any:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        return run()

    return contextvars.copy_context().run(inside)


class _Launch(NamedTuple):
    """A launch as Triton made it."""

    kernel: Any
    compiled: Any  # None: interpreted
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a call does, by slots of tensors: first its arguments, then what it makes and allocates."""

    made: Sequence[tuple[int, Callable[[Tensor], Tensor], int]]  # slot, and of which argument
    allocated: Sequence[tuple[int, Sequence[int], Sequence[int], torch.dtype]]  # slot, shape, strides: what is returned
    scratch: Sequence[tuple[int, int]]  # slot, first byte: the rest, in one piece
    scratch_bytes: int
    launches: Sequence[Callable[[list[Any], list[int], int], None]]  # of tensors, addresses and the stream
    slots: int
    outputs: Sequence[int | None]
    container: type | None  # of the outputs; None: one alone

    def run(self, arguments: list[Tensor], addresses: list[int], device: int) -> Any:
        where, more = arguments[0].device, [0] * (self.slots - len(arguments))
        tensors: list[Any] = arguments + more
        addresses += more
        for slot, make, source in self.made:
            tensors[slot] = tensor = make(tensors[source])
            addresses[slot] = tensor.data_ptr()
        for slot, shape, strides, dtype in self.allocated:  # by the function of torch that costs least: 3 us
            tensors[slot] = tensor = torch.empty_strided(shape, strides, dtype=dtype, device=where)
            addresses[slot] = tensor.data_ptr()
        if self.scratch_bytes:
            scratch = torch.empty_strided((self.scratch_bytes,), (1,), dtype=torch.uint8, device=where)
            base = scratch.data_ptr()
            for slot, first in self.scratch:
                addresses[slot] = base + first
        stream = 0 if _INTERPRETED else driver.active.get_current_stream(device)
        for launch_again in self.launches:
            launch_again(tensors, addresses, stream)
        outputs = [None if slot is None else tensors[slot] for slot in self.outputs]
        return outputs[0] if self.container is None else self.container(outputs)


class Recording:
    """A call that is noted."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        self.tensors = list(arguments)  # of the slots; they live as long as this, so that no address is given twice
        self.arguments = len(arguments)
        self.made: list[tuple[int, Callable[[Tensor], Tensor], int]] = []
        self.launches: list[_Launch] = []
        ends = sorted((tensor.data_ptr(), _end(tensor)) for tensor in arguments if tensor.numel())
        self.complete = bool(arguments) and all(end <= first for (_, end), (first, _) in pairwise(ends))

    def slot(self, tensor: Tensor) -> int | None:
        return next((i for i, known in enumerate(self.tensors) if known is tensor), None)

    def add(self, tensor: Tensor, make: Any = None, source: Tensor | None = None) -> None:
        if make is not None and source is not None:
            slot = self.slot(source)
            if slot is None or slot >= self.arguments:
                self.complete = False
            else:
                self.made.append((len(self.tensors), make, slot))
        self.tensors.append(tensor)

    def launched(self, launch: _Launch) -> None:
        self.launches.append(launch)

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """The slot that a tensor is or is a view of, and where in it, in elements.

        Raises:
            LookupError: there is none.
        """
        slot = self.slot(tensor)
        if slot is not None:
            return slot, 0
        address = tensor.data_ptr()
        for slot, known in enumerate(self.tensors):
            if known.data_ptr() <= address < _end(known) and known.dtype == tensor.dtype and known.numel():
                return slot, (address - known.data_ptr()) // known.element_size()
        raise LookupError

    def plan(self, outputs: Any) -> _Plan | None:
        """None: the call did what a plan does not hold."""
        container = type(outputs) if isinstance(outputs, (list, tuple)) else None
        returned = [None if t is None else self.slot(t) for t in (outputs if container else (outputs,))]
        unknown = any(t is not None and self.slot(t) is None for t in (outputs if container else (outputs,)))
        if not self.complete or unknown:
            return None
        try:
            launches = [_launch_again(launch, self.place) for launch in self.launches]
        except LookupError:
            return None
        made = {slot for slot, *_ in self.made}
        kept = self.launches and self.launches[0].compiled is None  # the interpreter needs tensors
        allocated, scratch, total = [], [], 0
        for slot, tensor in enumerate(self.tensors):
            if slot < self.arguments or slot in made:
                continue
            if kept or slot in returned:
                allocated.append((slot, tuple(tensor.shape), tensor.stride(), tensor.dtype))
            else:
                scratch.append((slot, total))
                total += -(-tensor.numel() * tensor.element_size() // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT
        return _Plan(self.made, allocated, scratch, total, launches, len(self.tensors), returned, container)


def _end(tensor: Tensor) -> int:
    """The address past the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _launch_again(
    launch: _Launch, place: Callable[[Tensor], tuple[int, int]]
) -> Callable[[list[Any], list[int], int], None]:
    """The launch with other tensors in its slots."""
    kernel, compiled, grid, arguments, constants = launch
    places = [(i, value, *place(value)) for i, value in enumerate(arguments) if isinstance(value, Tensor)]
    template = [None if isinstance(value, Tensor) else value for value in arguments]
    if compiled is None:
        views = [(i, tensor.shape, tensor.stride(), slot, first) for i, tensor, slot, first in places]

        def interpret(tensors: list[Any], addresses: list[int], stream: int) -> None:
            values = template.copy()
            for i, shape, stride, slot, first in views:
                values[i] = tensors[slot].as_strided(shape, stride, tensors[slot].storage_offset() + first)
            kernel[grid](*values, **constants)

        return interpret
    template += [constants[name] for name in kernel.arg_names[len(arguments) :]]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    pointers = [(i, slot, first * tensor.element_size()) for i, tensor, slot, first in places]

    def again(tensors: list[Any], addresses: list[int], stream: int) -> None:
        values = template.copy()
        for i, slot, offset in pointers:
            values[i] = addresses[slot] + offset
        run(*grid, stream, function, metadata, None, None, None, *values)

    if compiled.metadata.global_scratch_size:
        return lambda *call: _with_scratch(lambda: again(*call))
    return again
