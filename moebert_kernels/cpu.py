"""Properties of the CPU: its vendor, the dtypes that it multiplies fast, and where tensors begin for it."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch

_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "dot", "i8mm")
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
_ALIGNMENT = 64  # bytes, of torch's allocations on a CPU


@functools.cache
def capabilities() -> dict[str, Any]:
    """torch's list of instructions by name; empty where torch has none."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


@functools.cache
def is_amd() -> bool:
    """Whether this is AMD's CPU, for which MKL and oneDNN do not take the fast paths that they have for Intel's."""
    name = capabilities().get("cpu_name")
    if name is None and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line for line in lines if line.startswith("vendor_id")), None)
    return "AMD" in (name or "")


def has_int8_instructions() -> bool:
    """Whether products of 8-bit numbers are added in 32 bits by one instruction (VNNI, AMX, dot product)."""
    found = capabilities()
    return any(found.get(name) for name in _INT8) if found else torch.cpu._is_vnni_supported()


def has_bfloat16_instructions() -> bool:
    """Whether bfloat16 numbers are multiplied without a conversion to float32."""
    found = capabilities()
    return any(found.get(name) for name in _BFLOAT16) if found else torch.cpu._is_avx512_bf16_supported()


def warn_if_slow(dtype: str) -> None:
    """Warn where this CPU lacks the instructions that make a dtype fast."""
    if dtype.startswith("int8") and not has_int8_instructions():
        warnings.warn(
            "this CPU has no int8 dot products (VNNI, AMX): activations get 7 bits instead of 8, and int8 gains less",
            stacklevel=3,
        )
    if dtype == "int8-bfloat16" and not has_bfloat16_instructions():
        warnings.warn(
            "this CPU has no bfloat16 instructions: what is between products is converted to float32 and back; use "
            "'int8-token', which has the same products",
            stacklevel=3,
        )
    if dtype == "bfloat16" and not has_bfloat16_instructions():
        warnings.warn(
            "this CPU has no bfloat16 instructions: products are computed in float32 after conversions, so that "
            "bfloat16 saves memory but no time; use 'float32' or 'int8'",
            stacklevel=3,
        )


def aligned(module: Any) -> Any:
    """The module itself, its tensors copied that do not begin where torch allocates, as those mapped from a file do.

    Matrix products of some CPUs sum in another order there, and results must not depend on where a model came from.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return module
