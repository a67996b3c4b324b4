"""A stage: commands in order of importance within a budget of seconds, recorded one by one in a JSON and a log.

What a record holds as done is not done again by the next call, so a stage that was cut goes on where it stopped. A
command that fails is done, too: its status stays on record until the stage is run `--again`. One that was cut, since it
takes longer than what was left, comes after those that were cut less often: it cannot starve them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAST_LINES = 20
LEAST_SECONDS = 5.0  # no command begins with less left
RESERVE_SECONDS = 20.0  # of what is left, for a command that stops by itself to end what it has begun


@dataclass(frozen=True)
class Step:
    """One command of a stage.

    Attributes:
        name: unique in its stage.
        words: the command; `{seconds}` in a word becomes when to begin nothing new.
        environment: variables on top of the stage's.
        skipped: why it cannot run here, or "".
        unfinished: after the command, what it left undone (asked of the results it wrote), or "".
    """

    name: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    skipped: str = ""
    unfinished: Callable[[], str] = lambda: ""


def run_stage(
    name: str, steps: Sequence[Step], folder: Path, *, budget_s: float, stamp: Mapping[str, Any],
    environment: Mapping[str, str], again: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run what is not on record yet.

    Args:
        name: of the stage; `<folder>/gpu-<name>.json` and `.log` are its record.
        steps: in order of importance.
        folder: for the record.
        budget_s: after this many seconds a command is ended, and the others are left for the next call.
        stamp: plain data that says where and what this is; a record with another commit or GPU is begun anew.
        environment: of the commands.
        again: do all steps again.

    Returns:
        The record: "status" is 0, or 1 if a step failed or was cut; "finished": nothing is left for another call.
    """
    path = folder / f"gpu-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    earlier = {} if again else _earlier(path, stamp)
    known = {name: outcome for name, outcome in earlier.items() if _done(outcome) and "skipped" not in outcome}
    cuts = {step.name: earlier.get(step.name, {}).get("cuts", 0) for step in steps}
    record: dict[str, Any] = {"stage": name, "environment": dict(stamp), "budget_s": budget_s, "seconds": 0.0,
                              "status": 0, "finished": False, "steps": known}  # fmt: skip
    start = time.monotonic()
    with (folder / f"gpu-{name}.log").open("a" if known else "w", encoding="utf-8") as log:
        for step in sorted(steps, key=lambda step: cuts[step.name]):
            left_s = budget_s - (time.monotonic() - start)
            if step.name in known:
                print(f"{name}: {step.name}: done before", flush=True)
                continue
            if step.skipped:
                outcome: dict[str, Any] = {"skipped": step.skipped}
            elif left_s < LEAST_SECONDS:
                outcome = {"not_run": "no time left"}
            else:
                outcome = _run(step, left_s, environment, log)
            _tell(f"{name}: {step.name}: {_summary(outcome)}", log)
            if times := cuts[step.name] + ("cut" in outcome):
                outcome["cuts"] = times
            record["steps"][step.name] = outcome
            record["seconds"] = round(time.monotonic() - start, 1)
            record["status"] = int(any(_failed(o) for o in record["steps"].values()))
            record["finished"] = all(_done(record["steps"].get(s.name, {})) for s in steps)
            _write(path, record)
    record["finished"] = all(_done(record["steps"].get(step.name, {})) for step in steps)
    record["status"] = int(any(_failed(outcome) for outcome in record["steps"].values()))
    _write(path, record)
    return record


def _run(step: Step, left_s: float, environment: Mapping[str, str], log: Any) -> dict[str, Any]:
    """The command with its output passed on line by line, ended with all it started when its time is over."""
    stop_s = max(0.0, left_s - RESERVE_SECONDS)
    words = [word.replace("{seconds}", f"{stop_s:.0f}") for word in step.words]
    _tell("+ " + " ".join(words), log)
    start = time.monotonic()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, **environment, **step.environment}, start_new_session=True,
    )  # fmt: skip
    was_cut = threading.Event()

    def end() -> None:
        was_cut.set()
        _kill(process)

    timer = threading.Timer(left_s, end)
    timer.start()
    last: list[str] = []
    try:
        for line in process.stdout:
            _tell(line.rstrip("\n"), log)
            last = [*last[-LAST_LINES + 1 :], line.rstrip()]
        status = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    outcome: dict[str, Any] = {"command": words, "status": status, "seconds": round(time.monotonic() - start, 1)}
    if was_cut.is_set():
        outcome["cut"] = f"after {left_s:.0f} s"
    elif unfinished := step.unfinished():
        outcome["unfinished"] = unfinished
    return outcome | {"last_lines": last}


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _earlier(path: Path, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Outcomes of the steps in a record of the same code on the same GPU."""
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    same = all(earlier.get("environment", {}).get(key) == stamp.get(key) for key in ("commit", "gpu", "torch"))
    return earlier["steps"] if same else {}


def _done(outcome: Mapping[str, Any]) -> bool:
    if "skipped" in outcome:
        return True
    return "status" in outcome and "cut" not in outcome and "unfinished" not in outcome


def _failed(outcome: Mapping[str, Any]) -> bool:
    return "cut" in outcome or outcome.get("status", 0) != 0


def _summary(outcome: Mapping[str, Any]) -> str:
    for word in ("skipped", "not_run", "cut", "unfinished"):
        if word in outcome:
            return f"{word.replace('_', ' ')}: {outcome[word]}"
    return f"{'failed, status ' + str(outcome['status']) if outcome['status'] else 'ok'}, {outcome['seconds']:.0f} s"


def _tell(line: str, log: Any) -> None:
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def _write(path: Path, record: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
