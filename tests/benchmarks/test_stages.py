"""`make gpu` without a GPU: stages are recorded step by step, cut in time, gone on with; extras are installed aside."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from benchmarks import extras, gpu, gpu_tests, stages, suites
from benchmarks.environment import commit, environment
from benchmarks.measuring import Target
from benchmarks.stages import Step, run_stage

STAMP = {"commit": "abc", "gpu": "NVIDIA H200", "torch": "2.11"}


def python(code):
    return (sys.executable, "-c", code)


@pytest.fixture
def run(tmp_path):
    def run(*steps, budget_s=30.0, stamp=STAMP, **options):
        return run_stage("test", steps, tmp_path, budget_s=budget_s, stamp=stamp, environment={"GIVEN": "1"}, **options)

    return run


def test_steps_leave_one_json_and_one_log(run, tmp_path):
    step = Step("say", python("import os; print(os.environ['GIVEN'], os.environ['OWN'])"), {"OWN": "2"})
    record = run(step, Step("fail", python("raise SystemExit(3)")), Step("no", ("missing",), skipped="not installed"))
    assert record["finished"] and record["status"] == 1
    assert record["steps"]["say"]["last_lines"] == ["1 2"] and record["steps"]["say"]["status"] == 0
    assert record["steps"]["fail"]["status"] == 3
    assert record["steps"]["no"] == {"skipped": "not installed"}
    assert json.loads((tmp_path / "gpu-test.json").read_text()) == record
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-test.json", "gpu-test.log"}
    assert "1 2\n" in (tmp_path / "gpu-test.log").read_text()


def test_what_is_done_is_not_done_again_unless_asked(run, tmp_path):
    marks = tmp_path / "marks"
    step = Step("mark", python(f"open({str(marks)!r}, 'a').write('x')"))
    for options, wanted in (
        ({}, "x"),
        ({}, "x"),
        ({"again": True}, "xx"),
        ({"stamp": STAMP | {"commit": "def"}}, "xxx"),
    ):
        assert run(step, **options)["finished"]
        assert marks.read_text() == wanted


def test_a_stage_ends_in_time_keeps_what_it_has_and_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LEAST_SECONDS", 0.1)
    go = tmp_path / "go"
    sleep = f"subprocess.run(['sleep', '0' if os.path.exists({str(go)!r}) else '60'])"
    patient = f"import os, subprocess; print('begun', flush=True); {sleep}"
    steps = [Step("quick", python("print('done')")), Step("slow", python(patient)), Step("last", python(""))]
    record = run(*steps, budget_s=1.5)
    assert record["seconds"] < 10 and record["status"] == 1 and not record["finished"]
    assert record["steps"]["slow"]["cut"].startswith("after") and record["steps"]["slow"]["last_lines"] == ["begun"]
    assert record["steps"]["last"] == {"not_run": "no time left"}
    go.touch()
    after = run(*steps)
    assert after["finished"] and after["status"] == 0
    assert after["steps"]["quick"] == record["steps"]["quick"]


def test_what_was_cut_comes_last_and_starves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LEAST_SECONDS", 0.1)
    outcomes = []
    monkeypatch.setattr(stages, "_run", lambda *_: dict(outcomes.pop(0)))
    steps = [Step(name, ()) for name in ("long", "longer", "quick")]
    cut, done, none = {"cut": "after 1 s"}, {"status": 0, "seconds": 1.0}, {"not_run": "no time left"}
    for given, wanted in (
        ([cut, none, none], ["long", "longer", "quick"]),
        ([cut, none, none], ["longer", "quick", "long"]),
        ([done, cut, none], ["quick", "long", "longer"]),
        ([done, done], ["quick", "longer", "long"]),
    ):
        outcomes[:] = given
        assert list(run(*steps)["steps"]) == wanted
    record = json.loads((tmp_path / "gpu-test.json").read_text())
    assert record["finished"] and record["steps"]["long"]["cuts"] == 2


def test_a_command_that_left_something_undone_is_called_again(run, tmp_path):
    left = ["2 cases not run", ""]
    step = Step("suite", (*python("import sys; print(sys.argv[1])"), "{seconds}"), unfinished=lambda: left.pop(0))
    record = run(step)
    assert record["steps"]["suite"]["unfinished"] == "2 cases not run" and not record["finished"]
    assert record["steps"]["suite"]["last_lines"] == ["10"]  # of 30 seconds, less what ending takes
    assert run(step)["finished"] and left == []


def test_every_stage_names_real_files_and_commands(tmp_path, monkeypatch):
    assert list(gpu.STAGES) == list(gpu.BUDGETS_S) == ["build", "test", "bench", "e2e", "sanitize", "tune"]
    assert max(gpu.BUDGETS_S.values()) < 9 * 60 and sum(gpu.BUDGETS_S.values()) < 25 * 60
    monkeypatch.setattr(gpu.shutil, "which", lambda name, **_: f"/bin/{name}")
    made = {name: make(tmp_path) for name, make in gpu.STAGES.items()}
    for steps in made.values():
        assert steps and len({step.name for step in steps}) == len(steps)
        for step in steps:
            for word in step.words:
                assert not word.startswith("tests/") or (gpu.ROOT / word).exists()
    assert [step.name for step in made["bench"] + made["e2e"]] == list(suites.ALL)
    assert {step.name.partition("-")[0] for step in made["sanitize"]} == set(gpu_tests.SANITIZED)
    ops = {path.relative_to(gpu.ROOT).as_posix() for path in (gpu.ROOT / "tests" / "ops").glob("test_*.py")}
    assert ops <= set(gpu_tests.TESTS) and set(gpu_tests.NEEDS) <= set(gpu_tests.TESTS)
    assert made["bench"][0].unfinished() == "no result was written"
    (tmp_path / "ffn.json").write_text(json.dumps({"not_run": ["a", "b"]}))
    assert made["bench"][0].unfinished() == "2 cases not run: a, b"


def test_what_is_missing_is_skipped_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name, **_: None)
    assert {step.skipped for step in gpu.sanitize_steps(tmp_path)} == {"compute-sanitizer is not installed"}
    assert {step.skipped for step in gpu.test_steps(tmp_path)} == {""}
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    skipped = {step.name: step.skipped for step in gpu.test_steps(tmp_path) if step.skipped}
    assert skipped == {f"tests/{kind}/test_any_shape.py": "hypothesis is not installed" for kind in ("ops", "kernels")}


def test_driver_runs_a_stage_with_a_pretended_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda target: environment(Target.of("cpu")) | STAMP)

    def steps(results):
        return [Step("say", python("import os; print(os.environ['PYTHONPATH'])"))]

    monkeypatch.setattr(gpu, "STAGES", {"build": steps, "test": steps})
    monkeypatch.setattr(gpu, "BUDGETS_S", {"build": 60, "test": 60})
    (tmp_path / "extras" / "peer" / "src" / "peer").mkdir(parents=True)
    (tmp_path / "extras" / "peer" / "src" / "peer" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the driver adds to it
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the driver adds to it
    assert gpu.main(["--results", str(tmp_path / "out"), "--extras", str(tmp_path / "extras")]) == 0
    record = json.loads((tmp_path / "out" / "gpu-build.json").read_text())
    assert set(record["environment"]["extras"]) == {"peer"} and record["finished"]
    (path,) = record["steps"]["say"]["last_lines"]
    assert gpu._not_installed("peer") == "" and gpu._not_installed("nopeer") == "nopeer is not installed"
    assert path.split(os.pathsep)[:2] == [str(gpu.ROOT), str(tmp_path / "extras" / "peer" / "src")]
    assert "build: status 0" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2


def wheel(folder, name, tag="py3-none-any"):
    path = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "VALUE = 7\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_extras_are_installed_aside_and_what_does_not_fit_is_named(tmp_path):
    folder = tmp_path / "extras"
    (folder / "flat" / "flatpeer").mkdir(parents=True)
    (folder / "flat" / "flatpeer" / "__init__.py").touch()
    (folder / "headers").mkdir()
    wheel(folder, "goodpeer")
    wheel(folder, "otherpeer", "cp27-cp27m-win32")
    installed = tmp_path / "installed"
    for _ in range(2):  # the second call finds all as the first left it
        got = extras.prepare(folder, installed)
        assert got.paths == [installed.resolve(), (folder / "flat").resolve()]
        assert set(got.found) == {"flat", "goodpeer-1.0-py3-none-any.whl"}
        assert set(got.left_out) == {"headers", "otherpeer-1.0-cp27-cp27m-win32.whl"}
        assert got.left_out["headers"] == "no Python package in it"
        assert "not a supported wheel" in got.left_out["otherpeer-1.0-cp27-cp27m-win32.whl"]
    assert (installed / "goodpeer" / "__init__.py").exists()
    assert got.variables == {}
    with pytest.raises(ValueError, match="EXTRAS: expected a folder"):
        extras.prepare(tmp_path / "none", installed)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of its own with one commit."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr("benchmarks.environment.RESULTS", results)
    for path in (tmp_path / "benchmarks" / "one.py", results / "one.json"):
        path.write_text("1")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        subprocess.run([*git, *words], check=True)
    return tmp_path


def test_equal_names_of_commits_are_equal_code(tree):
    def named(text):
        (tree / "benchmarks" / "one.py").write_text(text)
        return commit()

    with_git = [named(text) for text in "1231"]
    assert len(with_git[0]) == 12 and all(name.startswith(f"{with_git[0]}+") for name in with_git[1:3])
    assert with_git[0] == with_git[3] and len(set(with_git)) == 3
    (tree / "benchmarks" / "results" / "one.json").write_text("2")  # what a run writes is no change
    assert commit() == with_git[0]
    (tree / ".git").rename(tree / "gone")
    without = [named(text) for text in "121"]
    assert without[0] == without[2] != without[1] and without[0].startswith("files-")
    (tree / "benchmarks" / "results" / "one.json").write_text("3")
    assert commit() == without[2]


def test_a_checkout_of_cutlass_gives_its_headers_to_the_build(tmp_path, monkeypatch):
    build_native = pytest.importorskip("build_native")  # which needs setuptools
    headers = tmp_path / "extras" / "cutlass" / "include"
    (headers / "cutlass").mkdir(parents=True)
    (headers / "cutlass" / "cutlass.h").touch()
    got = extras.prepare(tmp_path / "extras", tmp_path / "installed")
    assert (got.found, got.left_out, got.paths) == ({"cutlass": str(headers)}, {}, [])
    assert set(got.variables) == {build_native.CUTLASS_HEADERS}
    monkeypatch.setenv(build_native.CUTLASS_HEADERS, got.variables[build_native.CUTLASS_HEADERS])
    assert build_native.cutlass_include() == headers
    monkeypatch.setenv(build_native.CUTLASS_HEADERS, str(tmp_path))
    with pytest.raises(build_native.NotBuilt, match=r"expected a folder with cutlass/cutlass\.h, got"):
        build_native.cutlass_include()


def test_initcheck_runs_on_memory_that_nothing_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name, **_: f"/bin/{name}")
    unfilled = {step.name.partition("-")[0] for step in gpu.sanitize_steps(tmp_path)
                if set(gpu_tests.UNWRITTEN) <= set(step.environment)}  # fmt: skip
    assert unfilled == {"initcheck"}
