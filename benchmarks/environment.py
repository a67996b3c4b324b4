"""What a reader must know before he compares two numbers: versions, the machine, how busy it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import moebert_kernels
from benchmarks import identity
from benchmarks.gpu_plan import CUDA_FORMS, DESCRIPTORS
from benchmarks.measuring import Target


def environment(target: Target) -> dict[str, Any]:
    """Plain data for a result file."""
    packages = ("torch", "transformers", "numpy", "triton")
    gpu = {}
    if target.on_gpu:
        properties = torch.cuda.get_device_properties(target.device)
        gpu = {"gpu": properties.name, "sm": f"{properties.major}{properties.minor}", "cuda": torch.version.cuda}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": target.device.type,
        "dtype": target.dtype_name,
        "moebert_kernels": moebert_kernels.__version__,
        "commit": identity.commit(),
        "sources": identity.sources(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": identity.cpu_model(),
        **gpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")} or None,
        "withheld": [name for name in (DESCRIPTORS, CUDA_FORMS) if os.environ.get(name) == "0"] or None,
        "load_average_before": load_average(),
    }


def results_folder(target: Target) -> Path:
    """benchmarks/results/<device>."""
    model = torch.cuda.get_device_name(target.device) if target.on_gpu else None
    return identity.RESULTS / identity.device_slug(model)


def load_average() -> float | None:
    """Of the last minute; 1.0 is one busy core."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
