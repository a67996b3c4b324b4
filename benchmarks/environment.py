"""What a reader must know before he compares two numbers: versions, the machine, how busy it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import moebert_kernels
from benchmarks.measuring import Target

RESULTS = Path(__file__).resolve().parent / "results"


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
        "commit": commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu_model(),
        **gpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": load_average(),
    }


def results_folder(target: Target) -> Path:
    """benchmarks/results/<device>."""
    return RESULTS / device_slug(torch.cuda.get_device_name(target.device) if target.on_gpu else None)


def device_slug(model: str | None = None) -> str:
    """A device's model (None: the CPU's) as a folder name, e.g. "intel-xeon-processor-2.50ghz" or "nvidia-h200"."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|@", " ", (model or cpu_model()).lower())
    return re.sub(r"[^a-z0-9.]+", "-", words).strip("-")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str:
    """Of this tree, with "+changes" where tracked files other than results differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":(exclude)results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load_average() -> float | None:
    """Of the last minute; 1.0 is one busy core."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
