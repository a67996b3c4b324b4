"""Calls whose launches are known: 1 us of the host for a launch instead of 15 to 25.

Triton's own `kernel[grid](...)` binds some 40 arguments, looks at the value of each and builds the key of its cache
from them, at every launch. But what an op allocates and launches follows from the layouts of its tensors and its other
arguments. So the first call of a `recorded` function with such a key notes its allocations and launches, and later
calls only repeat them with new addresses. Addresses that are no multiples of 16 bytes (but for a Grouping's),
overlapping arguments and hooks (profilers) run the function itself every time.
"""

from __future__ import annotations

import contextvars
import functools
import operator
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
from moebert_kernels.kernels.config import noting, precision_of

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
    # Triton 3.9 warns that 3.10 fuses no products and sums where a launch does not ask for it.
    compiled = _with_scratch(lambda: kernel[grid](*arguments, enable_fp_fusion=True, **constants))
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
        maps: list[Tensor] = []
        inputs = _flat((*args, *kwargs.values()), tensors, maps)
        addresses = [tensor.data_ptr() for tensor in tensors]
        if functools.reduce(operator.or_, addresses, 0) % 16 or _hooked():
            return function(*args, **kwargs)
        tensors += maps
        addresses += [tensor.data_ptr() for tensor in maps]
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


def _flat(values: Iterable[Any], tensors: list[Tensor], maps: list[Tensor]) -> list[Hashable]:
    """What decides about launches; tensors go into the lists, those of Groupings into the second."""
    key: list[Hashable] = []
    float32 = torch.float32
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            dtype = value.dtype
            key += (dtype, value.shape, value.stride())
            if dtype is float32:
                key.append(precision_of(dtype))
        elif isinstance(value, Grouping):  # whose maps kernels take as contiguous int32
            offsets, rows = value.offsets, value.row_to_assignment
            maps += (offsets, rows, value.assignment_to_row)
            key += (value.top_k, offsets.shape, rows.shape)
        else:
            key.append(value)
    return key


def _hooked() -> bool:
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls) or noting()


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
    """What a call does, of its tensors, their addresses and the device."""

    again: Callable[[list[Tensor], list[int], int], Any]

    def run(self, tensors: list[Tensor], addresses: list[int], device: int) -> Any:
        return self.again(tensors, addresses, device)


def _stream(device: int) -> int:
    return 0 if _INTERPRETED else driver.active.get_current_stream(device)


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
        several = isinstance(outputs, (list, tuple))
        returned = [None if t is None else self.slot(t) for t in (outputs if several else (outputs,))]
        unknown = any(t is not None and self.slot(t) is None for t in (outputs if several else (outputs,)))
        if not self.complete or unknown:
            return None
        kept = set(range(self.arguments)) | {slot for slot, *_ in self.made}
        interpreted = bool(self.launches) and self.launches[0].compiled is None
        new = [slot for slot in range(len(self.tensors)) if slot not in kept]
        make = _interpreted if interpreted else _written
        try:
            return _Plan(make(self, new, type(outputs)(returned) if several else returned[0]))
        except LookupError:
            return None


def _end(tensor: Tensor) -> int:
    """The address past the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _interpreted(recording: Recording, new: Sequence[int], outputs: Any) -> Callable[..., Any]:
    """The plan for Triton's interpreter, which takes tensors."""
    made, slots = tuple(recording.made), len(recording.tensors)
    layouts = [(slot, tensor.shape, tensor.stride(), tensor.dtype) for slot, tensor in _of(recording, new)]
    launches = []
    for kernel, _, grid, arguments, constants in recording.launches:
        views = [
            (i, value.shape, value.stride(), *recording.place(value))
            for i, value in enumerate(arguments) if isinstance(value, Tensor)
        ]  # fmt: skip
        values = [None if isinstance(value, Tensor) else value for value in arguments]
        launches.append((kernel[grid], values, views, constants))

    def again(arguments: list[Tensor], addresses: list[int], device: int) -> Any:
        tensors: list[Any] = arguments + [None] * (slots - len(arguments))
        for slot, make, source in made:
            tensors[slot] = make(tensors[source])
        for slot, shape, strides, dtype in layouts:
            tensors[slot] = torch.empty_strided(shape, strides, dtype=dtype, device=arguments[0].device)
        for run, template, views, constants in launches:
            values: list[Any] = template.copy()
            for i, shape, stride, slot, first in views:
                values[i] = tensors[slot].as_strided(shape, stride, tensors[slot].storage_offset() + first)
            run(*values, **constants)
        if not isinstance(outputs, (list, tuple)):
            return None if outputs is None else tensors[outputs]
        return type(outputs)([None if slot is None else tensors[slot] for slot in outputs])

    return again


def _of(recording: Recording, slots: Sequence[int]) -> list[tuple[int, Tensor]]:
    return [(slot, recording.tensors[slot]) for slot in slots]


def _written(recording: Recording, new: Sequence[int], outputs: Any) -> Callable[..., Any]:
    """The plan for a GPU as a function that is written out: loops over slots and arguments cost as much as launches."""
    names: dict[str, Any] = {"torch": torch, "_stream": _stream, "_with_scratch": _with_scratch}
    names["kernels"] = [noted.compiled for noted in recording.launches]  # Triton 3.9 unloads those that nothing holds

    def named(value: Any) -> str:
        if value is None or type(value) in (int, bool):
            return repr(value)
        names[name := f"v{len(names)}"] = value
        return name

    returned = set(outputs) if isinstance(outputs, (list, tuple)) else {outputs}
    lines = [f"[{', '.join(f'a{slot}' for slot in range(recording.arguments))}] = addresses"]
    for slot, make, source in recording.made:
        lines.append(f"t{slot} = {named(make)}(tensors[{source}]); a{slot} = t{slot}.data_ptr()")
    scratch, scratch_bytes = {}, 0
    for slot, tensor in _of(recording, new):
        if slot in returned:
            lines.append(f"t{slot} = {_allocation(recording, tensor, named)}; a{slot} = t{slot}.data_ptr()")
        else:
            scratch[slot] = scratch_bytes
            scratch_bytes += -(-tensor.numel() * tensor.element_size() // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT
    if scratch_bytes:
        options = f"dtype={named(torch.uint8)}, device=tensors[0].device"
        lines.append(f"scratch = torch.empty_strided(({scratch_bytes},), (1,), {options})")
    lines.append("base = scratch.data_ptr()" if scratch_bytes else "base = 0")
    lines += [f"a{slot} = base + {first}" for slot, first in scratch.items()]
    lines.append("stream = _stream(device)")
    lines += [_written_launch(noted, recording.place, named) for noted in recording.launches]
    slots = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    values = [
        "None" if slot is None else f"tensors[{slot}]" if slot < recording.arguments else f"t{slot}" for slot in slots
    ]
    listed = f"[{', '.join(values)}]"
    whole = listed if isinstance(outputs, list) else f"tuple({listed})" if isinstance(outputs, tuple) else values[0]
    lines.append(f"return {whole}")
    exec("def again(tensors, addresses, device):\n    " + "\n    ".join(lines), names)
    again: Callable[..., Any] = names["again"]
    return again


def _allocation(recording: Recording, tensor: Tensor, named: Callable[[Any], str]) -> str:
    """By the function of torch that costs least: 0.8 us where an argument has the layout, 1.1 us elsewhere."""
    layout = (tensor.shape, tensor.stride(), tensor.dtype)
    for slot, known in enumerate(recording.tensors[: recording.arguments]):
        if (known.shape, known.stride(), known.dtype) == layout and known.is_contiguous():
            return f"torch.empty_like(tensors[{slot}])"
    shape, strides = tuple(tensor.shape), tensor.stride()
    return f"torch.empty_strided({shape}, {strides}, dtype={named(tensor.dtype)}, device=tensors[0].device)"


def _written_launch(noted: _Launch, place: Callable[[Tensor], tuple[int, int]], named: Callable[[Any], str]) -> str:
    """A launch of the compiled kernel, with the addresses of other tensors."""
    kernel, compiled, grid, arguments, constants = noted
    values = [str(size) for size in grid]
    values += ["stream", named(compiled.function), named(compiled.packed_metadata), "None", "None", "None"]
    for value in arguments:
        if isinstance(value, Tensor):
            slot, first = place(value)
            values.append(f"a{slot} + {first * value.element_size()}" if first else f"a{slot}")
        else:
            values.append(named(value))
    values += [named(constants[name]) for name in kernel.arg_names[len(arguments) :]]
    line = f"{named(compiled.run)}({', '.join(values)})"
    return f"_with_scratch(lambda: {line})" if compiled.metadata.global_scratch_size else line
