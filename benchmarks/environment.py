"""What a reader must know before he compares two numbers: versions, the machine, how busy it was."""

from __future__ import annotations

import hashlib
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
SOURCES, SUFFIXES = ("benchmarks", "csrc", "moebert_kernels", "tests"), (".py", ".json", ".cu", ".cuh", ".cpp", ".h")


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
    """Of this tree, so that equal names are equal code.

    Where tracked files other than results differ from the commit, "+" and a hash of how; without git, "files-" and a
    hash of the sources.
    """

    def git(*words: str) -> bytes:
        command = ["git", "-C", str(RESULTS.parent), *words]
        return subprocess.run(command, capture_output=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD").decode()
        changes = git("diff", "HEAD", "--no-ext-diff", "--binary", "--", "..", ":(exclude)results")
        return head + (f"+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return f"files-{_hash_of_sources()}"


def _hash_of_sources() -> str:
    root = RESULTS.parent.parent
    everything = hashlib.sha256()
    files = (path for folder in SOURCES for path in (root / folder).rglob("*") if path.suffix in SUFFIXES)
    for path in sorted(path for path in files if RESULTS not in path.parents):
        everything.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return everything.hexdigest()[:12]


def load_average() -> float | None:
    """Of the last minute; 1.0 is one busy core."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
