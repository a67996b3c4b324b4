"""What `make gpu` works with: what is installed here, one worker, commands, and what a killed call left running."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import gpu_worker
from benchmarks.gpu_plan import NATIVE, SANITIZER, Step
from benchmarks.identity import ROOT

MARK = "MOEBERT_KERNELS_GPU_RUN"  # in the environment of all that a call starts
CORES_LEFT = 4  # by the build, for the worker
Outcome = dict[str, Any]  # "status": ok, failed, missing (a package) or cut (out of time); "note": one line


class Machine:
    """Does steps in real time.

    Args:
        folder: of the results; logs go there.
        rehearse: tiny shapes on the CPU, and the commands that steps name for it.
    """

    def __init__(self, folder: Path, rehearse: bool = False) -> None:
        self.folder, self.rehearse = folder, rehearse
        self.worker: Any = None
        self.pipe: Any = None

    def now(self) -> float:
        return time.monotonic()

    def pause(self) -> None:
        time.sleep(0.2)

    def work(self, task: tuple[str, ...], limit_s: float) -> Outcome:
        """Let the worker do a task."""
        if self.worker is None or not self.worker.is_alive():
            spawn = multiprocessing.get_context("spawn")
            self.pipe, theirs = spawn.Pipe()
            self.worker = spawn.Process(target=gpu_worker.main, args=(theirs, self.folder, self.rehearse))
            self.worker.start()
            theirs.close()
        try:
            self.pipe.send(task)
            if not self.pipe.poll(limit_s):
                self.close()
                return {"status": "cut", "note": f"after {limit_s:.0f} s"}
            outcome: Outcome = self.pipe.recv()
        except (EOFError, OSError):
            self.worker.join(5)
            code = self.worker.exitcode
            self.close()
            return {"status": "failed", "note": f"its process ended with {code}"}
        if outcome.pop("lost", False):
            self.close()
            outcome["note"] += "; the device was lost, the next step gets a new process"
        return outcome

    def start(self, step: Step, limit_s: float) -> Command:
        words = step.rehearsal if self.rehearse else step.command
        return Command(words, self.folder / f"{step.name.replace('/', '-')}.txt", limit_s)

    def withhold(self, variable: str) -> None:
        """Leave out from now on what the environment's `variable` is for."""
        os.environ[variable] = "0"
        self.close()  # the next worker sees it

    def close(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.join()
        self.worker = None


class Command:
    """A process with all that it starts, ended in time; its output goes to a file."""

    def __init__(self, words: tuple[str, ...], log: Path, limit_s: float) -> None:
        self.log, self.limit_s, self.end = log, limit_s, time.monotonic() + limit_s
        cores = str(max(1, (os.cpu_count() or 1) - CORES_LEFT))
        variables = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": cores}
        if SANITIZER in words:  # so that neighbours in a cache do not hide what lies past an end
            variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        with log.open("wb") as output:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                            cwd=ROOT, env=variables, start_new_session=True)  # fmt: skip

    def outcome(self) -> Outcome | None:
        """None while it runs."""
        status = self.process.poll()
        late = time.monotonic() > self.end
        if status is None and not late:
            return None
        self.kill()
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        if status is None:
            return {"status": "cut", "note": f"after {self.limit_s:.0f} s", "last_lines": lines}
        if status == 0:
            return {"status": "ok", "note": lines[-1].strip("= ") if lines else ""}
        missing = re.search(r"No module named '?([\w.]+)", "\n".join(lines))
        if missing:
            return {"status": "missing", "note": f"{missing[1]} is missing"}
        return {"status": "failed", "note": f"status {status}", "last_lines": lines}

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def end_leftovers(folder: Path) -> int:
    """End what a killed call on this folder left running, so that nothing disturbs the times of this one."""
    ended, mark = 0, f"{MARK}={folder}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if int(path.parent.name) != os.getpid() and mark in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)
                ended += 1
    return ended


def unpack_wheels(folder: Path, target: Path) -> dict[str, str]:
    """Install the wheels of a folder aside, without a network and without what they need; name -> why one cannot be."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps",
           "--no-compile", "--quiet", "--upgrade", "--target", str(target))  # fmt: skip
    wheels = [wheel for wheel in sorted(folder.glob("*.whl")) if not (target / f".{wheel.name}").exists()]
    refused: dict[str, str] = {}

    def install(*some: Path) -> bool:
        done = subprocess.run([*pip, *map(str, some)], capture_output=True, text=True)
        for wheel in some:
            if done.returncode == 0:
                (target / f".{wheel.name}").touch()
            else:
                refused[wheel.name] = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[0]
        return done.returncode == 0

    if wheels and not install(*wheels) and len(wheels) > 1:  # one that does not fit must not cost the others
        refused.clear()
        for wheel in wheels:
            install(wheel)
    return refused


def look(names: Iterable[str]) -> dict[str, str | None]:
    """Package, tool or `_C` -> its version or place; None where it is missing."""
    importlib.invalidate_caches()
    return {name: _native() if name == NATIVE else _tool(name) or _package(name) for name in names}


def _tool(name: str) -> str | None:
    return shutil.which(name) if name in ("nvcc", "cmake", "ninja", SANITIZER) else None


def _package(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "of unknown version"


def _native() -> str | None:
    """What the module in this tree was built for, if it is one of this Python's."""
    folder = ROOT / "moebert_kernels"
    with contextlib.suppress(OSError, ValueError, KeyError):
        built = json.loads((folder / "_C.json").read_text())
        if built["built"] and (folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
            return f"{', '.join(built['archs'])}: {', '.join(built['ops'])}"
    return None


def gpu_of_this_machine() -> str | None:
    """Its name, as torch says it too; None without one."""
    query = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.strip().splitlines()[0].strip() if printed.strip() else None
