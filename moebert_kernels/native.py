"""The compiled module `moebert_kernels._C`: what is in it, and why it cannot run where it cannot."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "moebert_kernels._C"
FOLDER = Path(__file__).parent


def record(folder: Path | None = None) -> dict[str, Any]:
    """`built`; if so `archs`, `ptx`, `compilers`, `ops` and `left_out` (op -> reason), else the `reason`."""
    try:
        found: dict[str, Any] = json.loads(((folder or FOLDER) / "_C.json").read_text())  # of build_native.py
    except FileNotFoundError:
        return {"built": False, "reason": "this copy of the package was never built; see `make build`"}
    return found


@cache
def module() -> ModuleType:
    """The module, imported.

    Raises:
        ImportError: it was not built, or not for this Python.
    """
    return importlib.import_module(NAME)


def device_error(device: torch.device | None = None) -> str:
    """Why a GPU (default: the current one) cannot run the module, in one line; "" if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    return str(module().device_error(index))


def unavailable(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot run on such tensors, or None."""
    if dtype == torch.float64:
        return "computes in float32, asked for float64"
    found = record()
    if not found["built"]:
        return f"not built: {found['reason']}"
    if kernel not in found["ops"]:
        return f"not built: {kernel}: {found['left_out'].get(kernel, 'not in this build; see `make build`')}"
    if device.type != "cuda":
        return f"needs a CUDA device, got {device.type}"
    try:
        error = device_error(device)
    except ImportError as not_imported:
        return f"{NAME} does not import: {not_imported}"
    return f"built for {', '.join(found['archs'])} and {found['ptx']}, got: {error}" if error else None
