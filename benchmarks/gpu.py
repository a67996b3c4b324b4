"""`make gpu`: everything that needs a GPU, in stages; each leaves one JSON and one log in the results folder.

python -m benchmarks.gpu --stage build --results DIR        # versions, devices, a self-test of every op
python -m benchmarks.gpu --stage test --results DIR         # the tests of the ops and kernels, on the GPU
python -m benchmarks.gpu --stage bench --results DIR        # speed against dense layers and other ways
python -m benchmarks.gpu --stage sanitize --results DIR     # compute-sanitizer, where it is installed
python -m benchmarks.gpu --stage tune --results DIR         # the numbers that pick_config predicts with
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, results_folder
from benchmarks.measuring import Target

TESTS = ["tests/ops", "tests/kernels/test_gpu.py", "tests/kernels/test_any_shape.py", "tests/kernels/test_dropout.py"]
SANITIZED = ["tests/ops", "-k", "triton and (single_token or skewed) and bfloat16"]
STAGE_SECONDS = 9 * 60


class _Both(io.TextIOBase):
    """Prints, and keeps what was printed."""

    def __init__(self, log: Path) -> None:
        self.log = log.open("w", encoding="utf-8")

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return self.log.write(text)


def command(*words: str) -> dict[str, Any]:
    """Run a program, passing its output on line by line."""
    print("+", *words)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = []
    for line in process.stdout:
        print(line, end="")
        last = [*last[-19:], line.rstrip()]
    return {"command": list(words), "status": process.wait(), "last_lines": last}


def build() -> dict[str, Any]:
    """The doctor's report; exit status 1 if an op disagrees with its reference."""
    return command(sys.executable, "-m", "moebert_kernels.doctor")


def test() -> dict[str, Any]:
    return command(sys.executable, "-m", "pytest", "-q", "-x", *TESTS, "-k", "not torch-")


def bench() -> dict[str, Any]:
    from benchmarks import gpu_ffn

    cases = gpu_ffn.run(rounds=15)
    return {"status": int(any(case["missed"] for case in cases)), "cases": cases}


def sanitize() -> dict[str, Any]:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return {"status": 0, "skipped": "compute-sanitizer is not installed"}
    runs = [
        command(
            program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x", *SANITIZED
        )
        for tool in ("memcheck", "racecheck")
    ]
    return {"status": max(run["status"] for run in runs), "runs": runs}


def tune() -> dict[str, Any]:
    from benchmarks import gpu_tune

    return {"status": 0, **gpu_tune.run()}


STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "build": build, "test": test, "bench": bench, "sanitize": sanitize, "tune": tune
}  # fmt: skip


def main() -> int:
    """The worst status of the stages that ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/<device>")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("expected a CUDA device, got none: these stages measure and test on a GPU", file=sys.stderr)
        return 2
    folder = options.results or results_folder(Target.of("cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    worst = 0
    for name in STAGES if options.stage == "all" else [options.stage]:
        start = time.monotonic()
        with contextlib.redirect_stdout(_Both(folder / f"gpu-{name}.log")):
            outcome = STAGES[name]()
            seconds = time.monotonic() - start
            print(f"{name}: status {outcome['status']}, {seconds:.0f} s")
            if seconds > STAGE_SECONDS:
                print(f"{name}: expected at most {STAGE_SECONDS} s")
        outcome |= {"stage": name, "seconds": round(seconds, 1), "environment": environment(Target.of("cuda"))}
        (folder / f"gpu-{name}.json").write_text(json.dumps(outcome, indent=1) + "\n")
        worst = max(worst, outcome["status"])
    return worst


if __name__ == "__main__":
    sys.exit(main())
