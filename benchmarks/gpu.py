"""`make gpu`: all that needs a GPU, most valuable first, in calls that may be cut anywhere; see benchmarks/README.md.

python -m benchmarks.gpu                     # goes on where the call before was cut, and ends itself in time
python -m benchmarks.gpu unpack ARCHIVE      # results that travelled: into benchmarks/results/<device> and build/gpu
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import sysconfig
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_plan, identity
from benchmarks.gpu_machine import MARK, Machine, Outcome, end_leftovers, gpu_of_this_machine, look, unpack_wheels
from benchmarks.gpu_plan import AT_ONCE, BUILD, PREDICTED_BY, PREDICTED_US, Step
from benchmarks.gpu_worker import PARTIAL, write

FOLDER, EXTRAS = identity.ROOT / "build" / "gpu", identity.ROOT / "build" / "extras"
ARCHIVE, RECORD, SUMMARY = "gpu-results.tar.gz", "gpu-record.json", "gpu-summary.txt"
SECONDS, RESERVE_S, LEAST_DISK_GIB = 540.0, 12.0, 5
CUDA, OURS, COLUMNS = "moebert_kernels_cuda", "moebert_kernels", (8, 9, 9, 9, 9, 9, 7, 7)
SUITES = ("ffn", "ffn_backward", "ffn_add_norm", "tiny")
REHEARSAL = "rehearsal without a GPU"
Have = Mapping[str, str | None]


class Record:
    """What was done of this code on this GPU: a JSON file, written after every step, and the archive with it.

    Args:
        folder: for all results; it is kept between calls.
        who: commit, sources, gpu, torch.
        results: where one file, the archive, goes to travel; never the only copy.
    """

    def __init__(self, folder: Path, who: Mapping[str, str | None], results: Path | None = None) -> None:
        self.folder, self.results = folder, results
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECORD
        self.data: dict[str, Any] = {"identity": dict(who), "calls": [], "steps": {}}
        if path.exists():
            self.data = json.loads(path.read_text())
        self.steps: dict[str, Outcome] = self.data["steps"]

    def done(self, step: Step, have: Have) -> bool:
        """Whether it came to an end, good or bad, and nothing that it uses has come or changed since."""
        was = self.steps.get(step.name, {})
        ended = was.get("status") in ("ok", "failed")
        return ended and all(have.get(name) in (None, was["with"].get(name)) for name in step.uses)

    def put(self, step: Step, outcome: Outcome, seconds: float, have: Have) -> None:
        cuts = self.steps.get(step.name, {}).get("cuts", 0) + (outcome["status"] == "cut")
        self.steps[step.name] = outcome | {
            "seconds": round(seconds, 1), "with": {name: have.get(name) for name in step.uses},
        } | ({"cuts": cuts} if cuts else {})  # fmt: skip
        self.save()

    def save(self) -> None:
        write(self.folder / RECORD, json.dumps(self.data, indent=1) + "\n")
        if self.results is None:
            return
        self.results.mkdir(parents=True, exist_ok=True)
        partial = self.results / (ARCHIVE + PARTIAL)
        with tarfile.open(partial, "w:gz", compresslevel=3) as archive:
            archive.add(self.folder, self.folder.name, filter=lambda m: None if m.name.endswith(PARTIAL) else m)
        partial.replace(self.results / ARCHIVE)


def go_on(
    record: Record, machine: Machine, here: Callable[[], Have], *, end: float, steps: Sequence[Step],
    build: Step | None = BUILD, say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Do what is left until all is done or `end`, on the machine's clock, is near.

    The build goes on beside the rest. Steps of the worker come one after the other, then commands several at a time;
    of each kind in order, those that were cut before last. A step that would not end in time waits for another call.
    """
    have, begun = here(), machine.now()
    tried: set[str] = set()  # each once in a call
    running: dict[Step, tuple[Any, float, bool]] = {}  # command, start, whether the call's end is its limit

    for outcome in record.steps.values():  # also of steps that this call does not do
        if outcome.get("status") == "failed" and "guards" in outcome:
            machine.withhold(outcome["guards"])

    def settle(step: Step, outcome: Outcome, start: float, by_call: bool) -> None:
        if outcome["status"] == "cut" and not by_call:  # it hangs, and would do so again
            outcome = outcome | {"status": "failed"}
        if outcome["status"] == "failed" and step.guards:
            machine.withhold(step.guards)
            note = f"{outcome['note']}; what follows runs with {step.guards}=0"
            outcome = outcome | {"note": note, "guards": step.guards}
        seconds = machine.now() - start
        record.put(step, outcome, seconds, have)
        say(f"{machine.now() - begun:4.0f} s  {step.name}: {outcome['status']}, {seconds:.0f} s: {outcome['note']}")
        for line in outcome.get("missed", ()):
            say(f"      {line}")

    def limit(step: Step) -> tuple[float, bool]:
        times = 6 if step.guards else 3  # a slow compiler is no reason to leave kernels out
        patience, left = times * step.seconds + 30, end - machine.now()
        return min(patience, left), left <= patience

    def start(step: Step) -> None:
        tried.add(step.name)
        if missing := [name for name in step.needs if have.get(name) is None]:
            record.steps.setdefault(step.name, {"with": {}}).update(
                status="skipped", note=f"missing: {', '.join(missing)}"
            )
        elif step.task:
            begin, (seconds, by_call) = machine.now(), limit(step)
            settle(step, machine.work(step.task, seconds), begin, by_call)
        else:
            if step is not build:
                machine.close()  # whose worker holds memory of the GPU
            seconds, by_call = limit(step)
            running[step] = (machine.start(step, seconds), machine.now(), by_call)

    if build is not None and not record.done(build, have):
        start(build)
    while machine.now() < end or running:
        for step, (command, begin, by_call) in list(running.items()):
            if (outcome := command.outcome()) is not None:
                del running[step]
                settle(step, outcome, begin, by_call)
                have = here() if step is build else have
        left, building = end - machine.now(), build in running
        ready = [s for s in steps if s.name not in tried and not (building and s.after_build) and s.seconds <= left
                 and not record.done(s, have)]  # fmt: skip
        ready.sort(key=lambda s: (bool(s.command), record.steps.get(s.name, {}).get("cuts", 0)))
        commands = len(running) - building
        if ready and (commands < AT_ONCE if ready[0].command else commands == 0):
            start(ready[0])
        elif running:
            machine.pause()
        else:
            break
    machine.close()
    record.save()


def preflight(have: Have, steps: Sequence[Step], gpu: str, refused: Mapping[str, str]) -> list[str]:
    """Lines that name what is here, what is missing, and what is left out for it."""
    free = shutil.disk_usage(identity.ROOT).free / 2**30
    lines = [
        f"{gpu}, {os.cpu_count()} cores, {free:.0f} GiB of disk free" + (": too few" if free < LEAST_DISK_GIB else "")
    ]
    lines.append("here: " + ", ".join(f"{name} {found}" for name, found in have.items() if found))
    lines += [f"wheel {name} is left out: {reason}" for name, reason in refused.items()]
    for name in [name for name, found in have.items() if found is None]:
        for_it = Counter(step.name.split("/")[0] for step in steps if name in step.needs)
        parts = ", ".join(f"{count} of {part}" for part, count in for_it.items())
        if name != gpu_plan.NATIVE:
            lines.append(f"{name} is missing: " + (f"skipped: {parts}" if parts else "the rest goes without"))
    return lines


def summary(record: Record, steps: Sequence[Step], have: Have) -> str:
    """What a reader wants first: the numbers beside the predictions, and what is wrong, skipped or left."""
    who, of = record.data["identity"], record.steps
    lines = [f"{who['gpu']}, commit {who['commit']}, torch {who['torch']}"]
    lines += ["tiny shapes: no number means anything"] if who["gpu"] == REHEARSAL else table(record.folder)
    for step in (BUILD, *steps):
        was = of.get(step.name, {})
        if was.get("status") == "failed":
            lines.append(f"FAILED: {step.name}: {was['note']}")
        lines += [f"NOT AS REQUIRED: {step.name}: {line}" for line in was.get("missed", ())]
    skipped = Counter(was["note"] for was in of.values() if was.get("status") in ("skipped", "missing"))
    lines += [f"skipped: {count} steps: {note}" for note, count in skipped.items()]
    left = [s for s in steps if not record.done(s, have) and of.get(s.name, {}).get("status") != "skipped"]
    lines.append(
        f"left for another call: {len(left)} of {len(steps)} steps" + "".join(f"\n  {s.name}" for s in left[:8])
    )
    return "\n".join(lines)


def table(folder: Path) -> list[str]:
    """The numbers that matter, as far as they are measured, in microseconds; predicted ones are of Triton's kernels."""
    results = [json.loads(path.read_text()) for what in SUITES if (path := folder / f"{what}.json").exists()]
    cases: dict[str, dict[str, Any]] = {case["name"]: case for result in results for case in result["cases"]}
    if not cases:
        return ["nothing of the headline is measured yet"]
    roof = results[0]["roof"]
    head = ("T", "Triton", "predicted", "CUDA", "dense", "ideal", "x dense", "of roof")
    lines = [f"roof: {roof['tflops']:.0f} TFLOP/s, {roof['gbytes_per_s']:.0f} GB/s; predicted: {PREDICTED_BY}"]
    for (op, direction), predicted in PREDICTED_US.items():
        lines += [f"{op}, {direction}, us", _line(head)]
        for T in sorted({*predicted, 128, 256, 1024, 4096, 16384, 65536}):
            providers = cases.get(name := f"{op}-{direction}-T{T}", {}).get("providers", {})
            beside = cases.get(f"{name}-cuda", {}).get("providers", {})
            ours, speed = providers.get(OURS, {}), providers.get(OURS, {}).get("speed_over_baseline", {}).get("median")
            lines.append(_line((
                T, _us(ours), predicted.get(T, ""), _us(providers.get(CUDA) or beside.get(CUDA, {})),
                _us(providers.get("dense", {})), _us(providers.get("ideal", {})), f"{speed:.2f}" if speed else "",
                f"{ours['share_of_roof']:.0%}" if "share_of_roof" in ours else "",
            )))  # fmt: skip
    return lines


def _us(entry: dict[str, Any]) -> str:
    return f"{1e3 * entry['median_ms']:.4g}" if "median_ms" in entry else "-"


def _line(cells: tuple[object, ...]) -> str:
    return " ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, COLUMNS, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """0 if all is done and good; 1 if something failed, is missed, skipped or left; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("command", nargs="?", choices=("run", "unpack"), default="run")
    parser.add_argument("archive", nargs="?", type=Path, help="of `unpack`")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"end by then (default: {SECONDS:.0f})")
    parser.add_argument("--results", type=Path, help=f"a folder for {ARCHIVE}, written after every step")
    parser.add_argument("--extras", type=Path, help="a folder of wheels to use besides")
    parser.add_argument("--only", action="append", help="steps whose names begin so; may be repeated")
    parser.add_argument("--again", action="store_true", help="what failed once more; with --only, whatever came of it")
    parser.add_argument("--carried", action="store_true", help="use the _C that lies in this tree, build none")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, with tiny shapes: tries the code")
    options = parser.parse_args(arguments)
    if options.command == "unpack":
        if options.archive is None or not options.archive.is_file():
            parser.error(f"unpack: expected the path of {ARCHIVE}, got {options.archive}")
        print(f"written: {unpack(options.archive)}")
        return 0
    if options.extras and not options.extras.is_dir():
        parser.error(f"--extras: expected a folder of wheels, got {options.extras}")
    begun = time.monotonic()
    gpu = REHEARSAL if options.rehearse else gpu_of_this_machine()
    if gpu is None:
        print("expected a GPU, but nvidia-smi names none; --rehearse tries the steps without one", file=sys.stderr)
        return 2
    results = options.results.resolve() if options.results else None
    refused = unpack_wheels(options.extras, EXTRAS) if options.extras else {}
    set_up(options.rehearse)
    steps = gpu_plan.steps()
    if options.only:
        steps = [step for step in steps if step.name.startswith(tuple(options.only))]
    names = list(dict.fromkeys(name for step in (BUILD, *steps) for name in (*step.needs, *step.uses)))

    who = {"commit": identity.commit(), "sources": identity.sources(), "gpu": gpu} | look(("torch",))
    folder = FOLDER / identity.device_slug("-".join(map(str, who.values())))
    record = Record(folder, who, results)

    def here() -> Have:
        found = look(names)
        if options.rehearse:
            return found | dict.fromkeys(("nvcc", "pybind11", gpu_plan.SANITIZER, gpu_plan.NATIVE), "pretended")
        built = options.carried or record.steps.get(BUILD.name, {}).get("status") == "ok"
        return found if built else found | {gpu_plan.NATIVE: None}  # that of another commit may lie there

    have = here()
    if options.carried and have.get(gpu_plan.NATIVE, "") is None:
        wanted = f"moebert_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        print(f"--carried: expected {wanted}, built for this Python, beside its _C.json, got none", file=sys.stderr)
        return 2
    if have.get(gpu_plan.NATIVE, "") is None and record.steps.get(BUILD.name, {}).get("status") == "ok":
        del record.steps[BUILD.name]  # it was built on another machine
    os.environ[MARK] = str(folder)
    if ended := end_leftovers(folder):
        print(f"ended {ended} processes that a killed call had left")
    if options.again:
        for step in (BUILD, *steps):
            if options.only or record.steps.get(step.name, {}).get("status") == "failed":
                record.steps.pop(step.name, None)
    print(
        "\n".join([f"commit {who['commit']}; results: {folder}", *preflight(have, (BUILD, *steps), gpu, refused)]),
        flush=True,
    )
    record.data["calls"].append({"date": time.strftime("%Y-%m-%d %H:%M:%S"), "here": have, "wheels_refused": refused})
    record.save()
    try:
        asked = any(step.after_build for step in steps) or BUILD.name in (options.only or ())
        wants_build = asked and not options.carried
        go_on(record, Machine(folder, options.rehearse), here, end=begun + options.seconds - RESERVE_S, steps=steps,
              build=BUILD if wants_build else None, say=lambda line: print(line, flush=True))  # fmt: skip
    finally:
        end_leftovers(folder)
    have, record.data["calls"][-1]["seconds"] = here(), round(time.monotonic() - begun, 1)
    text = summary(record, steps, have)
    write(folder / SUMMARY, text + "\n")
    record.save()
    print(f"\n{text}\n{time.monotonic() - begun:.0f} s", flush=True)
    ended = [record.steps.get(step.name, {}) if record.done(step, have) else {} for step in steps]
    good = all(was.get("status") == "ok" and "missed" not in was for was in ended)
    return int(not good or record.steps.get(BUILD.name, {}).get("status") == "failed")


def set_up(rehearse: bool) -> None:
    """Where this process and all that it starts look for packages and tools."""
    os.environ["PATH"] += os.pathsep + os.pathsep.join((str(EXTRAS / "bin"), "/usr/local/cuda/bin"))
    paths = [str(identity.ROOT), str(EXTRAS), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "MOEBERT_KERNELS_CUDA_ARCHS": "native", "MOEBERT_KERNELS_BUILD_CUDA": "1",
                   "PIP_NO_INDEX": "1"}  # fmt: skip
    if rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "MOEBERT_KERNELS_BUILD_CUDA": "0"}
    if str(EXTRAS) not in sys.path:
        sys.path.append(str(EXTRAS))


def unpack(archive: Path, kept: Path = FOLDER, results: Path = identity.RESULTS) -> Path:
    """Put all that an archive holds back to where a call goes on, and what is to be committed beside other results."""
    with tarfile.open(archive) as packed:
        packed.extractall(kept, filter="data")
        folder = kept / packed.getnames()[0].split("/")[0]
    record = json.loads((folder / RECORD).read_text())
    target = results / identity.device_slug(record["identity"]["gpu"])
    target.mkdir(parents=True, exist_ok=True)
    for file in (*folder.glob("*.json"), *folder.glob(SUMMARY)):
        shutil.copy(file, target)
    return target


if __name__ == "__main__":
    sys.exit(main())
