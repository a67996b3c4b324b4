"""Which implementation runs an op here, and why: the only place that chooses.

`_OFFERS` names what exists, best first. An op's implementation in backend `b` is the module
`moebert_kernels.<folder of b>.<op>`; the order changes only with a committed measurement.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType

BACKENDS = ("cuda", "triton", "torch")
ENVIRONMENT_VARIABLE = "MOEBERT_KERNELS_BACKEND"

_FOLDERS = {"torch": "torch_backend"}
_OFFERS: dict[str, tuple[str, ...]] = {
    "hash_route": ("torch",),
    "group_tokens": ("torch",),
    "expert_gemm": ("torch",),
    "fused_moe_ffn": ("torch",),
    "fused_moe_ffn_add_norm": ("torch",),
}
OPS = tuple(_OFFERS)


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


_preference: ContextVar[_Preference | None] = ContextVar("moebert_kernels_backend", default=None)


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")


@contextmanager
def use_backend(name: str, strict: bool = False) -> Iterator[None]:
    """Prefer backend `name` inside this context.

    Args:
        name: "cuda", "triton" or "torch".
        strict: raise where that backend lacks an op, instead of falling back with one warning.

    Raises:
        ValueError: unknown name.
    """
    _check_name(name, "use_backend")
    token = _preference.set(_Preference(name, strict, "use_backend"))
    try:
        yield
    finally:
        _preference.reset(token)


def _current_preference() -> _Preference | None:
    preference = _preference.get()
    if preference is None and (name := os.environ.get(ENVIRONMENT_VARIABLE)):
        _check_name(name, ENVIRONMENT_VARIABLE)
        preference = _Preference(name, False, ENVIRONMENT_VARIABLE)
    return preference


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@cache
def _first_offer(op: str) -> Choice:
    missing = [name for name in BACKENDS if name not in _OFFERS[op]]
    return Choice(op, _OFFERS[op][0], f"first of what exists; not in this version: {', '.join(missing)}")


def choose(op: str) -> Choice:
    """The backend that runs `op` now.

    Raises:
        RuntimeError: a strict preference names a backend that does not offer the op.
    """
    preference = _current_preference()
    if preference is None:
        return _first_offer(op)
    offers = _OFFERS[op]
    if preference.backend in offers:
        return Choice(op, preference.backend, f"asked for by {preference.source}")
    message = (
        f"{op}: expected a {preference.backend} implementation ({preference.source}), got only {', '.join(offers)}"
    )
    if preference.strict:
        raise RuntimeError(message)
    _warn_once(f"{message}; {offers[0]} runs instead. See `moebert doctor`.")
    return Choice(op, offers[0], f"{preference.source} prefers {preference.backend}, which does not offer this op")


@cache
def _module(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"moebert_kernels.{_FOLDERS[backend]}.{op}")


def implementation(op: str) -> ModuleType:
    """The module that runs `op` now."""
    return _module(op, choose(op).backend)


def explain() -> list[Choice]:
    """What would run each op here, and why."""
    return [choose(op) for op in OPS]
