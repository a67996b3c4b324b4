"""The process that does what one process can do: it imports torch once, and answers task after task through a pipe.

`gpu.Machine` starts it, ends it when a task takes too long, and starts another when the device is lost.
"""

from __future__ import annotations

import importlib
import json
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 1.0  # of timing for each case
PARTIAL = ".partial"


def main(pipe: Connection, folder: Path, rehearse: bool) -> None:
    """Answer tasks until the pipe is closed; what they print goes to `<folder>/worker.txt`."""
    log = os.open(folder / "worker.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(answer(task, folder, rehearse))


def answer(task: tuple[str, ...], folder: Path, rehearse: bool) -> dict[str, Any]:
    """ "status": "ok", "failed", or "missing" for a package that is not there; "note": one line; "lost": the device."""
    lost = False
    try:
        importlib.invalidate_caches()  # `_C` may have been built since
        from benchmarks import clocks
        from benchmarks.measuring import Target

        target = Target.of("cpu" if rehearse else "cuda", smoke=rehearse)
        outcome = TASKS[task[0]](target, folder, *task[1:])
        lost = clocks.device_lost()
    except ModuleNotFoundError as error:
        outcome = {"status": "missing", "note": f"{error.name} is missing"}
    except Exception as error:  # whatever a step raises must not cost the others
        traceback.print_exc()
        outcome = {"status": "failed", "note": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        lost = "clocks" in locals() and clocks.device_lost()
    return outcome | ({"status": "failed", "lost": True} if lost else {})


def suite(target: Any, folder: Path, what: str, name: str) -> dict[str, Any]:
    """One case of a suite into the suite's file."""
    from benchmarks import gpu_plan, results, suites, views

    cases = suites.cases(what, target)
    if target.smoke:  # tiny cases under the names of those of a GPU
        cases = [replace(cases[i % len(cases)], name=named) for i, named in enumerate(gpu_plan.cases_of(what))]
    result = results.run_suite(what, cases, target, seconds=SECONDS, min_rounds=5, folder=folder, only=name)
    if name in result["broken"]:
        return {"status": "failed", "note": result["broken"][name]}
    case = next(case for case in result["cases"] if case["name"] == name)
    mine = case["providers"][views.ours(case)]
    wrong = {name: entry["refused"] for name, entry in case["providers"].items()
             if "refused" in entry and (views.is_ours(case, name) or name == case["baseline"])}  # fmt: skip
    if wrong or "median_ms" not in mine:
        return {"status": "failed", "note": f"refused: {wrong}" if wrong else str(mine)}
    ratio = mine.get("speed_over_baseline", {}).get("median")
    note = f"{1e3 * mine['median_ms']:.4g} us" + (f", {ratio:.2f}x {case['baseline']}" if ratio else "")
    missed = [results.requirement_text(r) for r in case["requirements"] if not r["passed"]]
    return {"status": "ok", "note": note} | ({"missed": missed} if missed else {})


def check(target: Any, folder: Path, name: str) -> dict[str, Any]:
    """Every op with the kernels of one backend, as `moebert doctor` does it, into gpu-checks.json."""
    from moebert_kernels import backend, doctor

    backend.unavailable.cache_clear()  # they may have been asked before `_C` was built
    backend.kernel_unavailable.cache_clear()
    if name == "cuda":
        found = doctor.cuda_self_test()
    elif name == "tiles":
        with backend.use_backend("torch" if target.smoke else "triton", strict=True):
            found = doctor.tiles_self_test(*[(doctor.Sizes(),)] * target.smoke)
    else:
        with backend.use_backend("torch" if target.smoke else name, strict=True):
            found = doctor.self_test()
    path = folder / "gpu-checks.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    write(path, json.dumps(known | {name: found}, indent=1) + "\n")
    wrong = [f"{op}: {result['message']}" for op, result in found.items() if not result["ok"]]
    note = f"{len(found) - len(wrong)} of {len(found)} right"
    if name == "cuda" and wrong:  # benchmarks refuse wrong results form by form: the others are measured
        return {"status": "ok", "note": note, "missed": wrong}
    return {"status": "failed", "note": f"{note}; {'; '.join(wrong)}"} if wrong else {"status": "ok", "note": note}


def tune(target: Any, folder: Path, kind: str) -> dict[str, Any]:
    """What `pick_config` predicts with into gpu-tuned.json, which has the form of its file."""
    from benchmarks import gpu_tune
    from benchmarks.environment import environment

    path, measured = folder / "gpu-tuned.json", gpu_tune.measure(kind, target)
    known = json.loads(path.read_text())["us"] if path.exists() else {}
    device = environment(target).get("gpu", target.device.type)
    write(path, json.dumps({"device": device, "us": known | {kind: measured}}, indent=1) + "\n")
    return {"status": "ok", "note": f"{len(measured)} tiles"}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"suite": suite, "check": check, "tune": tune}


def write(path: Path, text: str) -> None:
    """The whole file or none of it; `moebert_kernels.files` does so too, but imports torch, which gpu.py does not."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
