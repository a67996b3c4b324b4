"""`make gpu` without a GPU: its order and its time on a fake clock, cuts, kills, missing packages, a lost device."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_machine, gpu_plan, gpu_worker, identity, suites
from benchmarks.gpu_machine import Command, Machine
from benchmarks.gpu_plan import BUILD, CUTLASS, NATIVE, PEERS
from benchmarks.measuring import Target
from tests.benchmarks import gpu_fakes
from tests.benchmarks.gpu_fakes import FakeMachine, Killed
from tests.helpers import ROOT

STEPS = gpu_plan.steps()
NAMES = {name for step in (BUILD, *STEPS) for name in (*step.needs, *step.uses)}
ALL = dict.fromkeys(NAMES - set(PEERS), "1.0")  # as on a machine with all that is needed
WHO = {"commit": "abc", "sources": "123", "gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"}


def call(folder, have=ALL, seconds=540, **how):
    """One call on a machine of its own; the names of what it did, and its record."""
    machine = FakeMachine((BUILD, *STEPS), **how)
    with contextlib.suppress(Killed):
        gpu.go_on(gpu.Record(folder, WHO), machine, lambda: have, end=seconds - 30, steps=STEPS, say=lambda line: None)
    assert machine.time <= seconds
    return machine.done, gpu.Record(folder, WHO)


def part(name):
    return name.partition("/")[0]


def test_both_calls_fit_into_thirteen_minutes_and_do_nothing_twice(tmp_path):
    assert sum(gpu_plan.estimate().values()) < 13 * 60
    first, record = call(tmp_path)
    second, record = call(tmp_path, seconds=240)
    assert sorted(first + second) == sorted(step.name for step in (BUILD, *STEPS))
    assert all(record.done(step, ALL) for step in STEPS)
    headline = first.index("ffn/fused_moe_ffn-forward-T16384")
    assert {part(name) for name in first[:headline]} == {"check"}  # which come first
    built = first.index("build")
    assert built > headline and not any("cuda" in name or part(name) == "tiny" for name in first[:built])
    assert {part(name) for name in second} <= {"encoder", "distill", "mpo", "tune", "sanitize", "test"}


def test_a_slow_machine_costs_the_least_valuable_steps(tmp_path):
    done = [name for seconds in (540, 240) for name in call(tmp_path, seconds=seconds, pace=1.4)[0]]
    assert len(set(done)) == len(done)
    left = {part(step.name) for step in STEPS} - {part(name) for name in done}
    assert left <= {"sanitize", "test", "tune"}


def test_a_call_that_was_killed_anywhere_is_gone_on_with(tmp_path):
    rng = random.Random(0)
    for seed in range(8):
        done, folder = [], tmp_path / str(seed)
        for killed_at in (rng.uniform(0, 540), rng.uniform(0, 540), *[float("inf")] * 3):
            done += call(folder, killed_at=killed_at)[0]
        assert len(set(done)) == len(STEPS) + 1
        assert len(done) - len(set(done)) <= 2 * (gpu_plan.AT_ONCE + 1)  # only what ended as the call was killed


@pytest.mark.parametrize("name", sorted(NAMES - {*PEERS, CUTLASS}))
def test_what_is_missing_skips_its_own_steps_until_it_is_there(name, tmp_path):
    have = {**ALL, name: None}
    done = [call(tmp_path, have)[0] for _ in range(3)]
    without = {step.name for step in (BUILD, *STEPS) if name in step.needs}
    assert without and not without & {other for names in done for other in names}
    record = gpu.Record(tmp_path, WHO)
    assert all(record.steps[one]["status"] == "skipped" and name in record.steps[one]["note"] for one in without)
    assert any(line.startswith(f"{name} is missing: skipped:") for line in gpu.preflight(have, (BUILD, *STEPS), "", {})
               ) or name == NATIVE  # fmt: skip
    after = [one for _ in range(4) for one in call(tmp_path)[0]]
    assert without <= set(after)
    assert set(after) - without <= {step.name for step in STEPS if name in step.uses}  # measured with it, too


def test_a_peer_that_was_carried_along_is_compared_with_and_kept(tmp_path):
    for _ in range(3):
        call(tmp_path)
    compared = {step.name for step in STEPS if "sonicmoe" in step.uses}
    assert set(call(tmp_path, ALL | {"sonicmoe": "1"})[0]) == compared
    assert call(tmp_path)[0] == [] and call(tmp_path, ALL | {"sonicmoe": "1"})[0] == []
    assert set(call(tmp_path, ALL | {"sonicmoe": "2"})[0]) == compared


def test_what_fails_or_hangs_is_on_record_and_costs_no_other(tmp_path):
    first, second = (f"ffn/fused_moe_ffn-forward-T{T}" for T in (16384, 4096))
    outcomes = {first: {"status": "failed", "note": "no", "last_lines": ["x"]}, second: {"status": "missing"}}
    _, record = call(tmp_path, outcomes=outcomes)
    assert record.steps[first]["note"] == "no" and first not in call(tmp_path)[0]
    assert not record.done(next(step for step in STEPS if step.name == second), ALL)
    text = gpu.summary(record, STEPS, ALL)
    assert f"FAILED: {first}: no" in text and "left for another call" in text
    slow = replace(STEPS[0], seconds=1e-3)
    machine = FakeMachine([slow], pace=1e9)
    record = gpu.Record(tmp_path / "hang", WHO)
    gpu.go_on(record, machine, lambda: ALL, end=500, steps=[slow], build=None, say=print)
    assert record.steps[slow.name]["status"] == "failed" and machine.time < 70


def test_what_was_cut_comes_after_what_was_not(tmp_path):
    record = gpu.Record(tmp_path, WHO)
    steps = [replace(STEPS[0], name=name, seconds=100, task=(name,)) for name in ("a", "b")]
    for pace, end, wanted in ((1.5, 120, []), (1, 300, ["b", "a"])):
        machine = FakeMachine(steps, pace=pace)
        gpu.go_on(record, machine, lambda: ALL, end=end, steps=steps, build=None, say=print)
        assert machine.done == wanted
    assert record.steps["a"]["cuts"] == 1


def test_one_archive_holds_everything_and_is_unpacked_where_it_belongs(tmp_path):
    out, there = tmp_path / "out", tmp_path / "there" / "of-this-commit"
    record = gpu.Record(there, WHO, out)
    for number in range(2):
        (there / "ffn.json").write_text(f'{{"number": {number}}}')
        record.put(STEPS[0], {"status": "ok", "note": ""}, 1.0, ALL)
        assert [path.name for path in out.iterdir()] == [gpu.ARCHIVE]
        shutil.move(out, tmp_path / "travelled")  # the folder is empty for the next call
        target = gpu.unpack(tmp_path / "travelled" / gpu.ARCHIVE, tmp_path / "kept", tmp_path / "results")
        shutil.rmtree(tmp_path / "travelled")
        assert target == tmp_path / "results" / "nvidia-h100-80gb-hbm3"
        assert json.loads((target / "ffn.json").read_text()) == {"number": number}
    assert gpu.Record(tmp_path / "kept" / there.name, WHO).done(STEPS[0], ALL)  # where a fresh machine goes on


def test_plan_names_real_cases_files_and_what_the_readme_says():
    assert len({step.name for step in STEPS}) == len(STEPS)
    hopper = Target(torch.device("cuda"), torch.bfloat16)
    for what in {step.task[1] for step in STEPS if step.task[:1] == ("suite",)}:
        names = {case.name for case in suites.cases(what, hopper)}
        assert what in suites.ALL and set(gpu_plan.cases_of(what)) == names
    tested = {name for step in STEPS for name in step.command if name.startswith("tests/")}
    assert all((ROOT / name).is_file() for name in tested)
    of_gpus = {path for path in (ROOT / "tests" / "ops").glob("test_*.py") if "cpu" not in path.name}
    assert {f"tests/ops/{path.name}" for path in of_gpus} <= tested


def test_predictions_are_those_of_the_readme():
    readme = (ROOT / "benchmarks" / "README.md").read_text().partition("## Predicted")[2].partition("\n- ")[0]
    columns = {op: {} for op in gpu_plan.PREDICTED_US}
    for line in readme.splitlines():
        if re.match(r"\| [\d,]+ \|", line):
            cells = [cell.strip().replace(",", "") for cell in line.split("|")[1:-1]]
            tokens, _, forward, _, with_norm, both, _ = cells
            for op, cell in zip(columns, (forward, with_norm, both), strict=True):
                columns[op][int(tokens)] = float(cell)
    assert columns == gpu_plan.PREDICTED_US


def test_a_worker_that_dies_hangs_or_loses_the_device_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_machine.gpu_worker, "main", gpu_fakes.worker)
    machine = Machine(tmp_path)
    try:
        pids = [machine.work(("say",), 60)["note"] for _ in range(2)]
        assert machine.work(("die",), 60) == {"status": "failed", "note": "its process ended with -9"}
        pids.append(machine.work(("say",), 60)["note"])
        assert machine.work(("lose",), 60)["note"].endswith("the device was lost, the next step gets a new process")
        pids.append(machine.work(("say",), 60)["note"])
        assert machine.work(("sleep",), 0.2) == {"status": "cut", "note": "after 0 s"}
        pids.append(machine.work(("say",), 60)["note"])
    finally:
        machine.close()
    assert pids[0] == pids[1] and len(set(pids)) == 4


def test_worker_says_what_is_missing_failed_or_lost(tmp_path, monkeypatch):
    def act(target, folder, what):
        if what == "missing":
            __import__("no_such_package")
        if what == "wrong":
            raise ValueError("x: expected 1, got 2\nmore")
        return {"status": "ok", "note": ""}

    monkeypatch.setitem(gpu_worker.TASKS, "act", act)
    answers = {what: gpu_worker.answer(("act", what), tmp_path, True) for what in ("missing", "wrong", "good")}
    assert answers["missing"] == {"status": "missing", "note": "no_such_package is missing"}
    assert answers["wrong"] == {"status": "failed", "note": "ValueError: x: expected 1, got 2"}
    assert answers["good"] == {"status": "ok", "note": ""}
    monkeypatch.setattr("benchmarks.clocks.device_lost", lambda: True)
    assert gpu_worker.answer(("act", "wrong"), tmp_path, True)["lost"]


def test_worker_writes_results_under_the_names_of_a_gpu(tmp_path):
    first, second = gpu_plan.cases_of("routing")[:2]
    for name in (first, second, first):
        assert gpu_worker.answer(("suite", "routing", name), tmp_path, True)["status"] == "ok"
    result = json.loads((tmp_path / "routing.json").read_text())
    assert result["smoke"] and {case["name"] for case in result["cases"]} == {first, second}
    assert set(result["not_run"]) == set(gpu_plan.cases_of("routing")) - {first, second}
    assert gpu_worker.answer(("check", "triton"), tmp_path, True)["note"] == "8 of 8 right"
    assert gpu_worker.answer(("check", "cuda"), tmp_path, True)["note"] == "0 of 0 right"
    assert set(json.loads((tmp_path / "gpu-checks.json").read_text())) == {"triton", "cuda"}


def test_a_wrong_form_of_ours_fails_its_step(tmp_path, monkeypatch):
    providers = {"moebert_kernels": {"median_ms": 1.0}, "moebert_kernels_cuda": {"refused": "output 0"}}
    case = {"name": "a", "baseline": "dense", "requirements": [], "providers": providers}
    monkeypatch.setattr("benchmarks.results.run_suite", lambda *_, **__: {"cases": [case], "broken": {}})
    answer = gpu_worker.answer(("suite", "tiny", "a"), tmp_path, True)
    assert answer == {"status": "failed", "note": "refused: {'moebert_kernels_cuda': 'output 0'}"}


def test_a_wrong_op_fails_its_check(tmp_path, monkeypatch):
    wrong = {"expert_gemm": {"ok": False, "message": "output is not finite"}, "hash_route": {"ok": True, "message": ""}}
    monkeypatch.setattr("moebert_kernels.doctor.self_test", lambda: wrong)
    answer = gpu_worker.answer(("check", "triton"), tmp_path, True)
    assert answer == {"status": "failed", "note": "1 of 2 right; expert_gemm: output is not finite"}


def test_commands_end_in_time_and_name_a_package_that_they_miss(tmp_path):
    def command(code):
        return Command((sys.executable, "-c", code), tmp_path / "log.txt", 60.0)

    def outcome(code):
        running = command(code)
        while (ended := running.outcome()) is None:
            time.sleep(0.02)
        return ended

    assert outcome("print('2 passed')") == {"status": "ok", "note": "2 passed"}
    assert outcome("import no_such_package") == {"status": "missing", "note": "no_such_package is missing"}
    assert outcome("print('x'); raise SystemExit(3)") == {"status": "failed", "note": "status 3", "last_lines": ["x"]}
    sleeps = command("import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])")
    while sleeps.log.read_text() != "begun\n":
        assert sleeps.outcome() is None
        time.sleep(0.02)
    sleeps.end = time.monotonic() - 1  # however long Python took to start
    assert sleeps.outcome() == {"status": "cut", "note": "after 60 s", "last_lines": ["begun"]}


def test_leftovers_of_a_killed_call_are_ended(tmp_path):
    variables = os.environ | {gpu_machine.MARK: str(tmp_path)}
    left = subprocess.Popen(["sleep", "60"], env=variables, start_new_session=True)
    other = subprocess.Popen(["sleep", "60"], env=variables | {gpu_machine.MARK: "elsewhere"})
    try:
        environment = Path(f"/proc/{left.pid}/environ")
        while str(tmp_path).encode() not in environment.read_bytes():  # there a moment after the program has started
            time.sleep(0.01)
        assert gpu_machine.end_leftovers(tmp_path) == 1
        assert left.wait(10) == -9 and other.poll() is None
    finally:
        other.kill()


def wheel(folder, name, tag="py3-none-any"):
    path = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "VALUE = 7\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.slow
def test_wheels_are_installed_aside_and_what_does_not_fit_is_named(tmp_path, monkeypatch):
    bad = wheel(tmp_path, "otherpeer", "cp27-cp27m-win32").name
    wheel(tmp_path, "goodpeer")
    for _ in range(2):  # the second call finds all as the first left it
        refused = gpu_machine.unpack_wheels(tmp_path, tmp_path / "aside")
        assert set(refused) == {bad} and "not a supported wheel" in refused[bad]
    monkeypatch.syspath_prepend(tmp_path / "aside")
    assert gpu_machine.look(["goodpeer", "otherpeer"]) == {"goodpeer": "1.0", "otherpeer": None}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of its own with one commit."""
    monkeypatch.delenv(identity.COMMIT_VARIABLE, raising=False)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "moebert_kernels").mkdir()
    for path in ("benchmarks/one.py", "benchmarks/results/one.json"):
        (tmp_path / path).write_text("1")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        subprocess.run([*git, *words], check=True)
    return tmp_path


def test_equal_names_of_commits_are_equal_code(tree, monkeypatch):
    def named(text):
        (tree / "benchmarks" / "one.py").write_text(text)
        return identity.commit(tree), identity.sources(tree)

    with_git = [named(text)[0] for text in "1231"]
    assert len(with_git[0]) == 12 and all(name.startswith(f"{with_git[0]}+") for name in with_git[1:3])
    assert with_git[0] == with_git[3] and len(set(with_git)) == 3
    before = identity.commit(tree), identity.sources(tree)
    for path in ("benchmarks/results/one.json", "moebert_kernels/_C.json"):  # what runs and builds write
        (tree / path).write_text("2")
    assert (identity.commit(tree), identity.sources(tree)) == before
    (tree / ".git").rename(tree / "gone")
    without = [named(text)[0] for text in "121"]
    assert without[0] == without[2] != without[1] and without[0] == f"files-{before[1]}"
    (tree / "build").mkdir()
    (tree / "build" / "commit").write_text("0123456789abcdef\n")
    assert named("2")[0] == "0123456789ab"
    monkeypatch.setenv(identity.COMMIT_VARIABLE, "fedcba9876543210")
    assert named("1") == ("fedcba987654", before[1])


def test_without_a_gpu_there_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "gpu_of_this_machine", lambda: None)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("expected a GPU, but nvidia-smi names none")
    for words in (["unpack"], ["unpack", str(tmp_path)], ["--extras", str(tmp_path / "no")]):
        with pytest.raises(SystemExit):
            gpu.main(words)


@pytest.mark.parametrize("only,built", [("build", True), ("tiny", True), ("mpo", False)])
def test_a_call_does_what_it_is_asked_for_and_says_how_it_went(only, built, tmp_path, monkeypatch, capsys):
    machines = []

    def fake(folder, rehearse):
        machines.append(FakeMachine((BUILD, *STEPS), outcomes={"tiny/fused_moe_ffn_add_norm-forward-T8": {
            "missed": ["FAIL: too slow"]}}))  # fmt: skip
        return machines[-1]

    monkeypatch.setattr(gpu, "Machine", fake)
    monkeypatch.setattr(gpu, "FOLDER", tmp_path / "gpu")
    monkeypatch.setattr(gpu, "look", lambda names: {name: "1" for name in names})
    monkeypatch.setattr(gpu, "gpu_of_this_machine", lambda: WHO["gpu"])
    monkeypatch.setattr(gpu, "set_up", lambda rehearse: None)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    monkeypatch.setenv(gpu_machine.MARK, "")
    words = ["--only", only, "--results", str(tmp_path / "out")]
    assert gpu.main(words) == int(only == "tiny")
    assert ("build" in machines[0].done) is built and {part(name) for name in machines[0].done} <= {"build", part(only)}
    assert ("NOT AS REQUIRED: tiny/fused_moe_ffn_add_norm-forward-T8: FAIL" in capsys.readouterr().out) is (
        only == "tiny"
    )
    gpu.main(words)
    assert machines[1].done == []
    gpu.main([*words, "--again"])
    assert sorted(machines[2].done) == sorted(machines[0].done)
    monkeypatch.setattr(gpu, "look", lambda names: {name: None if name == NATIVE else "1" for name in names})
    gpu.main(words)  # on a fresh machine with these results
    assert machines[3].done == (["build"] if only == "tiny" else [])
    (summary,) = (tmp_path / "gpu").glob(f"*/{gpu.SUMMARY}")
    assert "left for another call: 0 of" in summary.read_text()


@pytest.mark.slow
def test_rehearsal_in_a_copy_without_git_survives_a_kill(tmp_path):
    copy, out = tmp_path / "copy", tmp_path / "out"
    # without folders that begin with a dot: other tests write into caches there in the meantime
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "results", "docs", "experiments", "_C*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / "build").mkdir()
    (copy / "build" / "commit").write_text("0123456789abcdef")
    only = ("check/triton", "routing", "tiny", "tune/half-rows", "test/ops/test_hash")
    words = (
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--rehearse",
        "--results",
        str(out),
        *(w for o in only for w in ("--only", o)),
    )
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", gpu_machine.MARK)}

    def recorded():
        (file,) = list((copy / "build" / "gpu").glob(f"*/{gpu.RECORD}")) or [None]
        return json.loads(file.read_text())["steps"] if file else {}

    first = subprocess.Popen(words, cwd=copy, env=variables, stdout=subprocess.DEVNULL)
    while len(recorded()) < 3:  # then it is in the middle, on a machine of any speed
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    before = recorded()
    with tarfile.open(out / gpu.ARCHIVE) as archive:  # whole, whenever it was
        assert any(name.endswith(gpu.RECORD) for name in archive.getnames())
    second = subprocess.run(words, cwd=copy, env=variables, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "commit 0123456789ab" in second.stdout
    (kept,) = (copy / "build" / "gpu").iterdir()
    after = recorded()
    assert {name: after[name] for name in before} == before  # nothing is done twice
    assert len(after) == 11 and {was["status"] for was in after.values()} == {"ok"}
    assert gpu_machine.end_leftovers(kept) == 0
