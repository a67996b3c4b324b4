"""Which code this is, and where results of a device lie. It imports no torch: `make gpu` asks before anything else."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMIT_VARIABLE, COMMIT_FILE = "MOEBERT_KERNELS_COMMIT", Path("build", "commit")
SOURCES = ("benchmarks", "cmake", "csrc", "moebert_kernels", "python", "tests")
SUFFIXES = (".py", ".json", ".cmake", ".cu", ".cuh", ".cpp", ".h")
WRITTEN_BY_BUILDS = ("_C.json",)  # they lie among the sources, and are none


def commit(root: Path = ROOT) -> str:
    """Of this tree: what the caller names in a variable or, where there is no git, in the file `build/commit`.

    With git: where tracked files other than results differ from the commit, "+" and a hash of how. Where nothing says
    which commit it is: "files-" and the hash of the sources.
    """

    def git(*words: str) -> bytes:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, check=True).stdout.strip()

    if named := os.environ.get(COMMIT_VARIABLE, "").strip():
        return named[:12]
    try:
        head = git("rev-parse", "--short=12", "HEAD").decode()
        changes = git("diff", "HEAD", "--no-ext-diff", "--binary", "--", ".", ":(exclude)benchmarks/results")
        return head + (f"+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        file = root / COMMIT_FILE
        return file.read_text().strip()[:12] if file.is_file() else f"files-{sources(root)}"


def sources(root: Path = ROOT) -> str:
    """A hash of all that results depend on: equal ones are equal code, whatever a commit is called."""
    everything = hashlib.sha256()
    files = (path for folder in SOURCES for path in (root / folder).rglob("*") if path.suffix in SUFFIXES)
    for path in sorted(path for path in files if path.name not in WRITTEN_BY_BUILDS):
        if not path.is_relative_to(root / "benchmarks" / "results"):
            everything.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return everything.hexdigest()[:12]


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
