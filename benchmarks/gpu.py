"""`make gpu`: everything that needs a GPU, in stages in order of importance; see benchmarks/README.md.

    python -m benchmarks.gpu --stage STAGE --results DIR --extras DIR --again

build compiles the CUDA part for this GPU and lets every op test itself; test runs the tests on the GPU; bench times the
ops, e2e whole models; sanitize runs compute-sanitizer; tune measures what `pick_config` predicts with. A call goes on
where the one before it was cut, and all work without a network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import extras, gpu_tests, suites
from benchmarks.environment import environment, results_folder
from benchmarks.gpu_tune import KINDS
from benchmarks.measuring import Target
from benchmarks.stages import Step, run_stage

ROOT = Path(__file__).resolve().parents[1]
# Each is less than 9 minutes, all together less than 25; what is cut goes on with the next call.
BUDGETS_S = {"build": 180, "test": 360, "bench": 420, "e2e": 280, "sanitize": 140, "tune": 100}
PYTHON = sys.executable
# The machine may lack what the project's own options of pytest need, such as pytest-timeout.
PYTEST = (PYTHON, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib -ra", "-p", "no:cacheprovider")


def build_steps(results: Path) -> list[Step]:
    native = {"MOEBERT_KERNELS_BUILD_CUDA": "1", "MOEBERT_KERNELS_CUDA_ARCHS": "native"}
    return [
        Step("compile", (PYTHON, "setup.py", "build_native", "--inplace"), native, _no_compiler()),
        Step("doctor", (PYTHON, "-m", "moebert_kernels.doctor")),
    ]


def test_steps(results: Path) -> list[Step]:
    return [
        Step(path, (*PYTEST, path, "-k", gpu_tests.EXPRESSION), skipped=_not_installed(gpu_tests.NEEDS.get(path)))
        for path in gpu_tests.TESTS
    ]


def suite_steps(names: tuple[str, ...], results: Path) -> list[Step]:
    """One process for each suite: an error of the device ends one of them."""
    run = (PYTHON, "-m", "benchmarks", "run", "--device", "cuda", "--output", str(results), "--budget", "{seconds}")
    return [
        Step(name, (*run, "--what", name), unfinished=partial(_not_run, results / f"{name}.json")) for name in names
    ]


def sanitize_steps(results: Path) -> list[Step]:
    program = shutil.which("compute-sanitizer")
    reason = "" if program else "compute-sanitizer is not installed"
    return [
        Step(
            f"{tool}-{path}",
            (program or "", "--tool", tool, "--error-exitcode", "9", *PYTEST, "-x", path, "-k", expression),
            gpu_tests.ENVIRONMENT | (gpu_tests.UNWRITTEN if tool == "initcheck" else {}), reason,
        )
        for tool, chosen in gpu_tests.SANITIZED.items()
        for path, expression in chosen.items()
    ]  # fmt: skip


def tune_steps(results: Path) -> list[Step]:
    output = str(results / "gpu-tuned.json")  # no suite's result, as all that is named gpu-*
    return [Step(kind, (PYTHON, "-m", "benchmarks.gpu_tune", "--kind", kind, "--output", output)) for kind in KINDS]


STAGES: dict[str, Callable[[Path], list[Step]]] = {
    "build": build_steps,
    "test": test_steps,
    "bench": partial(suite_steps, suites.OPS),
    "e2e": partial(suite_steps, suites.MODELS),
    "sanitize": sanitize_steps,
    "tune": tune_steps,
}


def main(arguments: list[str] | None = None) -> int:
    """0 if everything that ran ended well and nothing is left, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--extras", type=Path, help="a folder of wheels and checkouts to use besides")
    parser.add_argument("--again", action="store_true", help="do what is on record once more")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("expected a CUDA device, got none: these stages measure and test on a GPU", file=sys.stderr)
        return 2
    target = Target.of("cuda")
    folder = (options.results or results_folder(target)).resolve()
    more = extras.prepare(options.extras, ROOT / "build" / "extras") if options.extras else extras.Extras()
    for name, reason in more.left_out.items():
        print(f"extras: {name} is left out: {reason}")
    paths = [ROOT, *more.paths, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1",
                 "TOKENIZERS_PARALLELISM": "false", **more.variables}  # fmt: skip
    sys.path += map(str, more.paths)  # where `_not_installed` looks, too
    stamp = environment(target) | {"extras": more.found, "extras_left_out": more.left_out}
    os.chdir(ROOT)
    os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"  # where nvcc and compute-sanitizer are, often unlisted
    failed = False
    for name in STAGES if options.stage == "all" else [options.stage]:
        if options.again and name in ("bench", "e2e"):
            for what in suites.OPS if name == "bench" else suites.MODELS:
                (folder / f"{what}.json").unlink(missing_ok=True)
        steps = STAGES[name](folder)
        record = run_stage(name, steps, folder, budget_s=BUDGETS_S[name], stamp=stamp, environment=variables,
                           again=options.again)  # fmt: skip
        ending = "finished" if record["finished"] else "not finished: call it again to go on"
        print(f"{name}: status {record['status']}, {record['seconds']:.0f} s, {ending}", flush=True)
        failed |= bool(record["status"]) or not record["finished"]
    return int(failed)


def _not_installed(package: str | None) -> str:
    """Why what needs the package cannot run, or ""."""
    return f"{package} is not installed" if package and importlib.util.find_spec(package) is None else ""


def _no_compiler() -> str:
    """Why nothing can be compiled here, or ""."""
    try:
        from build_native import find_nvcc
    except ImportError as error:
        return f"{error.name} is not installed"
    return "" if find_nvcc() else "nvcc was not found"


def _not_run(path: Path) -> str:
    """Cases that a suite left for the next call."""
    try:
        left = json.loads(path.read_text())["not_run"]
    except (OSError, ValueError):
        return "no result was written"
    return f"{len(left)} cases not run: {', '.join(left)}" if left else ""


if __name__ == "__main__":
    sys.exit(main())
