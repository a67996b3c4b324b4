"""What the experiments make of their results, on made-up ones and on tiny ones."""

import argparse
import importlib.util
import json
import sys

import pytest
from filelock import FileLock

from tests.cli.tiny import BAD, GOOD, write_base
from tests.helpers import ROOT


def experiment(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for their types
    spec.loader.exec_module(module)
    return module


def test_tables_of_chosen_routing():
    routing = experiment("chosen_routing")
    report = experiment("chosen_report")

    def result(loss, score):
        return {"before": {"STS-B": 90.0}, "losses": [loss], "steps": 6, "after": {"STS-B": score, "loss": 2 * loss}}

    found = {"teacher": {"STS-B": 92.0}}
    for seed, shift in (("0", 0.0), ("1", 0.1)):
        found[seed] = {"dense": result(0.3, 91.0), "random": result(0.4, 90.5), "chosen": result(0.2 + shift, 91.5)}
    found["0"][routing.HALF] = result(0.25, 91.25)
    rows = report.distil_table("name", found).splitlines()
    assert rows[0] == "### name: 6 steps without labels, 2 seeds; teacher STS-B 92.0"
    assert rows[5] == (
        "| chosen | 90.0 | 0.2500 | -0.0500 +- 0.0707 | 0.5000 | -0.1000 +- 0.1414 | 91.5 | +0.50 +- 0.00 |"
    )
    assert rows[6] == f"| {routing.HALF} (1 of the seeds) | 90.0 | 0.2500 | -0.0500 | 0.5000 | -0.1000 | 91.2 | +0.25 |"
    speed = {"ratios": {"chosen / random": [0.98, 1.0, 1.02]}, "fullest expert": {"random": 1.2, "chosen": 1.1}}
    speed |= {"rounds": 5, "tokens": 2000}
    assert (
        report.speed_table("name", {"news": speed}).splitlines()[-1] == "| news | 1.000 (0.980, 1.020) | 1.10, 1.20 |"
    )


def test_results_of_other_settings_are_not_mixed(tmp_path):
    routing = experiment("chosen_routing")
    args = argparse.Namespace(steps=300, batch=16, rate=1e-4, tokens=24000)
    committed = json.loads((routing.HERE / "distil-minilm.json").read_text())
    routing.check_settings(tmp_path, committed, args)
    args.steps = 200
    with pytest.raises(SystemExit, match=r"seed 0, \w+: \{'steps': 300\}"):
        routing.check_settings(tmp_path, committed, args)
    found = {"0": {routing.HALF: routing.settings_of(args, routing.HALF)}}
    assert found["0"][routing.HALF]["steps"] == 100
    args.rate = 1e-3
    with pytest.raises(SystemExit, match=r"\{'rate': 0.0001\}"):
        routing.check_settings(tmp_path, found, args)


@pytest.fixture(scope="module")
def wikitext_mpoe():
    return experiment("wikitext_mpoe")


def test_wikitext_mpoe_at_tiny_size(wikitext_mpoe, tmp_path, monkeypatch, capsys):
    """Two processes' worth of work: the base model and one arm, then the rest, then only the report."""
    for name, lines in (("valid", 60), ("test", 20)):
        (tmp_path / f"{name}.txt").write_text(
            "".join(f"line {n} of a story about {n % 7} bears \n" for n in range(lines))
        )
    options = {
        "hidden-size": 16,
        "layers": 1,
        "heads": 2,
        "vocab-size": 270,
        "block": 32,
        "base-epochs": 1,
        "epochs": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def run(*more):
        command = ["wikitext_mpoe.py", "--data", tmp_path, "--work", tmp_path / "work", "--output", tmp_path / "out"]
        monkeypatch.setattr("sys.argv", [str(word) for word in (*command, "--seeds", 3, *words, *more)])
        wikitext_mpoe.main()
        return capsys.readouterr().out

    assert "no arm is complete yet" in run("--models", "mpoe-mask-0.5")
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out/runs").iterdir()}
    assert set(files) == {"base.json", "seed-3-mpoe-mask-0.5.json"}
    text = run()
    assert all((tmp_path / "out/runs" / name).stat().st_mtime_ns == time for name, time in files.items())
    assert (tmp_path / "out/table.md").read_text() in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + len(wikitext_mpoe.NAMES)
    assert (tmp_path / "out/chart.png").stat().st_size > 1000
    assert wikitext_mpoe.spread([1.0, 3.0], "+") == "+2.00 ± 1.41"
    with (tmp_path / "test.txt").open("a") as file:
        file.write("one more line \n")
    with pytest.raises(SystemExit, match=r"base.json of a run with other test text"):
        run()
    with pytest.raises(SystemExit, match=r"base.json of a run with other test text"):
        run("--report")


def test_wikitext_mpoe_divides_the_text(wikitext_mpoe, tmp_path):
    (tmp_path / "valid.txt").write_text("".join(f"{n}\n" for n in range(25)))
    (tmp_path / "test.txt").write_text("test\n")
    parts = wikitext_mpoe.read_parts(tmp_path)
    assert parts["train"].split() == [str(n) for n in range(22)] and parts["validation"].split() == ["22", "23", "24"]
    assert parts["train"] + parts["validation"] == (tmp_path / "valid.txt").read_text()
    (tmp_path / "train.txt").write_text("train\n")
    assert wikitext_mpoe.read_parts(tmp_path)["train"] == "train\n"
    (tmp_path / "test.txt").unlink()
    with pytest.raises(SystemExit, match="data: expected a test text in "):
        wikitext_mpoe.read_parts(tmp_path)


@pytest.fixture(scope="module")
def microbert():
    return experiment("microbert")


def write_glue(folder):
    """The four tasks in their own files' forms: an adjective decides, whatever the question."""
    header = {
        "SST-2": "sentence\tlabel",
        "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "CoLA": None,
        "STS-B": "index\tsentence1\tsentence2\tscore",
    }
    for task, first in header.items():
        (folder / task).mkdir(parents=True)
        for number, name in enumerate(("train", "dev", "test_labeled")[: 3 if task in ("SST-2", "MRPC") else 2]):
            lines = [first] if first else []
            for row in range(24):
                label = (row * 7 + number) % 3 % 2
                text = f"the {('film', 'play')[row % 2]} was {(BAD, GOOD)[label][row % 4]}"
                lines.append({
                    "SST-2": f"{text}\t{label}", "MRPC": f"{label}\t1\t2\t{text}\tthe book was {GOOD[0]}",
                    "CoLA": f"x\t{label}\t*\t{text}", "STS-B": f"{row}\t{text}\tthe book\t{5 * label + 0.01 * row}",
                }[task])  # fmt: skip
            (folder / task / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_microbert_leaves_to_another_process_what_that_is_at(microbert, tmp_path, monkeypatch):
    study = microbert.Study(tmp_path, tmp_path, tmp_path, microbert.Settings())
    other, made = FileLock(tmp_path / "locks/mrpc-full-0"), {}

    def student(_, task, arm, seed):
        made[task, arm, seed] = True
        if len(made) == len(microbert.RUNS) - 1:
            other.release()

    monkeypatch.setattr(microbert.Study, "outputs", lambda *_, **__: None)
    monkeypatch.setattr(microbert.Study, "student", student)
    other.acquire()
    study.train([0])
    assert list(made)[-1] == ("mrpc", "full", 0) and len(made) == len(microbert.RUNS)


@pytest.mark.slow
def test_microbert_at_tiny_size(microbert, tmp_path, monkeypatch, capsys):
    """One seed, then the report alone; nothing is trained twice."""
    monkeypatch.setattr("moebert_kernels.study.ablation.ROUNDS", 5)
    base, data = write_base(tmp_path / "bert", max_position_embeddings=32), write_glue(tmp_path / "data")
    epochs, batches = ("--epochs", 1, "--teacher-epochs", 1), ("--batch-size", 12, "--teacher-batch-size", 12)
    sizes = (*epochs, *batches, "--max-length", 16, "--mrpc", 20)
    places = ("--base", base, "--data", data, "--work", tmp_path / "work", "--output", tmp_path / "out")

    def run(*more):
        monkeypatch.setattr("sys.argv", [str(word) for word in ("microbert.py", *places, *sizes, "--seeds", 4, *more)])
        microbert.main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit):
        run("--report")
    text = run()
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert (tmp_path / "out/table.md").read_text() in text
    assert list(report["main"]["arms"]) == list(microbert.MAIN) and report["main"]["tasks"] == list(microbert.FOLDERS)
    assert list(report["ablation"]["arms"]) == list(microbert.ABLATION)
    assert report["main"]["examples"] == {"sst2": 24, "mrpc": 24, "cola": 12, "stsb": 12}
    assert set(report["speeds"]) == {
        "task-routed teacher", "teacher, merged", "dense teacher", "MoE student", "student"
    }  # fmt: skip
    assert report["cache"]["rows"] == 20 and report["cache"]["largest_difference"] < 1e-4
    for name in ("chart.png", "ablation.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    trained = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()}
    assert len(list((tmp_path / "work/results").glob("*-4.json"))) == 4 * 4 + 2 * 4
    monkeypatch.setattr(microbert, "speeds", lambda *_: report["speeds"])
    monkeypatch.setattr(microbert, "cache_speed", lambda *_: report["cache"])
    run("--report")
    assert {file: file.stat().st_mtime_ns for file in trained} == trained
    with pytest.raises(SystemExit, match=r"got .*work with results of other epochs \(it was 1 and is 2 now\)"):
        run("--epochs", 2)
    (data / "CoLA/dev.tsv").write_text((data / "CoLA/dev.tsv").read_text().replace("x\t1", "x\t0", 1))
    with pytest.raises(SystemExit, match=r"got .*work with results of other files of CoLA"):
        run("--report")
