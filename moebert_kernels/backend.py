"""Which implementation runs an op here, and why: the only place that chooses.

`_OFFERS` names what exists, best first; the first that can run on the tensor's device and dtype does. An op's
implementation in backend `b` is the module `moebert_kernels.<folder of b>.<op>`; the order changes only with a
committed measurement.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moebert_kernels import native

BACKENDS = ("cuda", "triton", "torch")
ENVIRONMENT_VARIABLE = "MOEBERT_KERNELS_BACKEND"

_FOLDERS = {"cuda": "cuda_backend", "triton": "triton_backend", "torch": "torch_backend"}
_OFFERS: dict[str, tuple[str, ...]] = {
    "hash_route": ("triton", "torch"),
    "group_tokens": ("triton", "cuda", "torch"),
    "expert_gemm": ("triton", "cuda", "torch"),
    "fused_moe_ffn": ("triton", "cuda", "torch"),
    "fused_moe_ffn_add_norm": ("triton", "cuda", "torch"),
    "mpo_expert_weights": ("triton", "torch"),
    "add_norm_in_order": ("triton", "torch"),
}
OPS = tuple(_OFFERS)
# The forms of an op in CUDA, best first, by their kernels in moebert_kernels._C. An op has the backend if it has one of
# them; at each call its module in cuda_backend asks which of them applies, and takes Triton's kernels where none does.
_CUDA_FORMS = {
    "group_tokens": ("group_tokens",),
    "expert_gemm": ("expert_gemm",),
    "fused_moe_ffn": ("tiny_ffn", "expert_gemm"),
    "fused_moe_ffn_add_norm": ("tiny_ffn", "expert_gemm_norm", "expert_gemm"),
}
_WITHOUT_TRITON = ("group_tokens",)
_OPTIONAL_FORMS = ("expert_gemm_norm",)  # of which `use_backend` can do without


@dataclass(frozen=True)
class Choice:
    """What runs `op`, and in one line why it is this one."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True)
class _Preference:
    backend: str
    strict: bool
    source: str
    without: tuple[str, ...] = ()


_preference: ContextVar[_Preference | None] = ContextVar("moebert_kernels_backend", default=None)


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")


@contextmanager
def use_backend(name: str, strict: bool = False, without: tuple[str, ...] = ()) -> Iterator[None]:
    """Prefer backend `name` inside this context.

    Args:
        name: "cuda", "triton" or "torch".
        strict: raise where that backend lacks an op, instead of falling back with one warning.
        without: forms in CUDA that are not asked, to measure or to test the next one: "expert_gemm_norm".

    Raises:
        ValueError: unknown name or form.
    """
    _check_name(name, "use_backend")
    if unknown := set(without) - set(_OPTIONAL_FORMS):
        raise ValueError(f"without: expected some of {', '.join(_OPTIONAL_FORMS)}, got {', '.join(sorted(unknown))}")
    token = _preference.set(_Preference(name, strict, "use_backend", tuple(without)))
    try:
        yield
    finally:
        _preference.reset(token)


def preference() -> Any:
    """What is preferred here, for `preferring`: autograd runs backward in threads that inherit no context variables."""
    return _preference.get()


class preferring:
    """What `preference` found elsewhere is preferred inside."""

    def __init__(self, there: Any) -> None:
        self._there = there

    def __enter__(self) -> None:
        self._token = _preference.set(self._there)

    def __exit__(self, *_: object) -> None:
        _preference.reset(self._token)


def _current_preference() -> _Preference | None:
    preference = _preference.get()
    if preference is None and (name := os.environ.get(ENVIRONMENT_VARIABLE)):
        _check_name(name, ENVIRONMENT_VARIABLE)
        preference = _Preference(name, False, ENVIRONMENT_VARIABLE)
    return preference


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def form_allowed(kernel: str) -> bool:
    """Whether `use_backend` does not do without this form here."""
    preference = _current_preference()
    return preference is None or kernel not in preference.without


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on any device: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def kernel_unavailable(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this kernel of `moebert_kernels._C` cannot run on such tensors, or None."""
    found = native.unavailable(kernel, device, dtype)
    if found is None and kernel.startswith("expert_gemm") and torch.cuda.get_device_capability(device)[0] != 9:
        return "it multiplies by wgmma, which needs compute capability 9.x"
    return found


@cache
def unavailable(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on such tensors, or None."""
    if backend == "torch":
        return None
    if backend == "cuda":
        found = [kernel_unavailable(kernel, device, dtype) for kernel in _CUDA_FORMS[op]]
        if None not in found:
            return found[0]
        return None if op in _WITHOUT_TRITON else unavailable(op, "triton", device, dtype)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "computes in float32, asked for float64"
    if device.type != "cuda":
        return None if interpreting() else f"needs a CUDA device, got {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0, got {major}.{minor}"


@cache
def _first_offer(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    passed = [f"{name} is not in this version" for name in BACKENDS if name not in _OFFERS[op]]
    for name in _OFFERS[op]:
        found = unavailable(op, name, device, dtype)
        if found is None and name == "triton" and device.type != "cuda":
            found = "its interpreter runs only on request"
        if found is None:
            break
        passed.append(f"{name}: {found}")
    return Choice(op, name, "; ".join(passed) or "first of what can run here")


def choose(op: str, x: Tensor | None = None) -> Choice:
    """The backend that runs `op` now on a tensor like x; None: float32 on this machine's best device.

    Raises:
        RuntimeError: a strict preference names a backend that does not offer the op, or not here.
    """
    if x is None:
        device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32
    else:
        device, dtype = x.device, x.dtype
    preference = _current_preference()
    if preference is None:
        return _first_offer(op, device, dtype)
    offers = _OFFERS[op]
    found: str | None = f"only {', '.join(offers)}"
    if preference.backend in offers:
        found = unavailable(op, preference.backend, device, dtype)
        if found is None:
            return Choice(op, preference.backend, f"asked for by {preference.source}")
    message = f"{op}: expected a {preference.backend} implementation ({preference.source}), got {found}"
    if preference.strict:
        raise RuntimeError(message)
    other = _first_offer(op, device, dtype).backend
    _warn_once(f"{message}; {other} runs instead. See `moebert doctor`.")
    return Choice(op, other, f"{preference.source} prefers {preference.backend}, got {found}")


@cache
def _module(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"moebert_kernels.{_FOLDERS[backend]}.{op}")


def implementation(op: str, x: Tensor) -> ModuleType:
    """The module that runs `op` now on x."""
    return _module(op, choose(op, x).backend)


def explain() -> list[Choice]:
    """What would run each op here, and why."""
    return [choose(op) for op in OPS]
