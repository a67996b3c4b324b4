"""The study of a base encoder: all stages with a tiny model, and what its report makes of made-up runs."""

import importlib
import json
import shutil

import pytest
from filelock import FileLock

from tests.cli.tiny import BAD, GOOD, write_base
from tests.helpers import ROOT

RATE = 0.01


@pytest.fixture
def modules(monkeypatch):
    """The study's files, which import each other by their names alone."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    names = ("arms", "study", "latency", "report")
    return {name: importlib.import_module(name) for name in ("base_encoder", *(f"encoder_{n}" for n in names))}


def write_tasks(folder, rows=48):
    """RTE, CoLA, STS-B and TREC in their own files' forms: an adjective decides."""
    heads = {"RTE": "index\tsentence1\tsentence2\tlabel", "STS-B": "index\tsentence1\tsentence2\tscore"}
    for name, test in (("RTE", "dev"), ("CoLA", "dev"), ("STS-B", "dev"), ("TREC", "test")):
        (folder / name).mkdir(parents=True)
        for number, file in enumerate(("train", test)):
            lines = [heads[name]] if name in heads else []
            for row in range(rows):
                label = (row * 7 + number) % 3 % 2
                text = f"{('the film', 'a play')[row % 2]} was {(BAD, GOOD)[label][row // 2 % 4]}"
                lines.append({
                    "RTE": f"{row}\t{text}\tthe book\t{('not_entailment', 'entailment')[label]}",
                    "CoLA": f"x\t{label}\t*\t{text}", "STS-B": f"{row}\t{text}\tthe book\t{4 * label + 0.01 * row}",
                    "TREC": f"{('ENTY:a', 'ENTY:b', 'HUM:a', 'HUM:b')[2 * label + row % 2]}\t{text}",
                }[name])  # fmt: skip
            (folder / name / f"{file}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def study(modules, tmp_path, monkeypatch, capsys):
    """Runs a stage with a tiny model, and gives what it printed."""
    base, data = write_base(tmp_path / "base"), write_tasks(tmp_path / "data")
    places = ("--model", base, "--name", "tiny", "--data", data, "--work", tmp_path / "work")
    sizes = ("--teacher-epochs", 2, "--epochs", 1, "--batch", 12, "--length", 16, "--choosing", 300, "--rate", RATE)
    monkeypatch.setattr(modules["encoder_latency"], "SHAPES", ((1, 8), (2, 8)))
    monkeypatch.setattr(modules["encoder_latency"], "ROUNDS", {(1, 8): 2, (2, 8): 2})
    monkeypatch.setattr(modules["encoder_report"], "SHAPE", "2x8")
    monkeypatch.setattr(modules["encoder_study"], "REDRAWN", 5)
    monkeypatch.setattr(modules["encoder_study"], "DTYPES", ("float32", "int8"))

    def run(stage, *more):
        options = () if stage == "report" else (*places, *sizes)
        words = ("base_encoder.py", stage, *options, "--output", tmp_path / "out", *more)
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        modules["base_encoder"].main()
        return capsys.readouterr().out

    run.folder = tmp_path
    return run


@pytest.mark.filterwarnings("ignore:batches. .* tokens are few")
def test_teacher_student_report(study):
    """Nothing is made twice, and what is missing is named."""
    tasks, out = ("--task", "cola"), study.folder / "out"
    study("teacher", *tasks)
    study("student", *tasks, "--arm", "moe", "half-depth")
    runs = {file.name: file.stat().st_mtime_ns for file in (out / "runs/tiny").iterdir()}
    assert len(runs) == 1 + 3
    record = json.loads((out / f"runs/tiny/cola-1-moe-{RATE}.json").read_text())
    assert set(record["scores"]) == {"float32", "int8"}
    assert record["metric"] == "matthews" and record["steps"] == 4 and record["error"] >= 0
    assert -1 <= record["agreement"] <= 1
    assert record["active_parameters"] < record["total_parameters"]
    assert not list((study.folder / "work").rglob("checkpoint-*"))

    study("student", *tasks, "--arm", "moe", "half-depth")
    assert all((out / "runs/tiny" / name).stat().st_mtime_ns == time for name, time in runs.items() if "-" in name)
    text = study("report")
    assert (out / "table.md").read_text() in text
    assert "| mean of cola |" in text and "- MPOE: everything" in text
    assert "Number of learning rates that every student of a task tried: 1." in text and "Converted alone" not in text

    study("student", *tasks, "--arm", "moe", "--rate", 0)
    record = json.loads((out / "runs/tiny/cola-1-moe-0.0.json").read_text())
    assert record["steps"] == 0 and set(record["scores"]) == {"float32", "int8"}
    text = study("report")
    assert "Number of learning rates that every student of a task tried: 1." in text and "Converted alone" in text

    (study.folder / "data/CoLA/train.tsv").unlink()
    with pytest.raises(SystemExit) as stopped:
        study("teacher", *tasks, "--seed", 2)
    assert stopped.value.code == 2


@pytest.mark.filterwarnings("ignore:batches. .* tokens are few")
def test_students_follow_their_teacher_on_rows_without_labels(study, modules, monkeypatch):
    """27 of 30 rows train a teacher in batches of 12, and 18 more rows and copies of all 45 its student."""
    options = ("--task", "cola", "--rows", 30, "--unlabelled", 100, "--corrupted", 1)
    trainer, seen = modules["encoder_study"].MoETrainer, []

    def watched(*args, train_dataset, **kept):
        seen.append(train_dataset)
        return trainer(*args, train_dataset=train_dataset, **kept)

    monkeypatch.setattr(modules["encoder_study"], "MoETrainer", watched)
    study("teacher", *options)
    study("student", *options, "--arm", "moe")
    runs = [json.loads(file.read_text()) for file in (study.folder / "out/runs/tiny").glob("cola-*")]
    assert {run["arm"]: run["steps"] for run in runs} == {"teacher": 2 * 3, "moe": 8}
    assert "labelled" not in seen[0].column_names and seen[-1]["labelled"][:] == [True] * 27 + [False] * 63


@pytest.mark.filterwarnings("ignore:batches. .* tokens are few")
def test_other_settings_are_refused(study, capsys):
    with pytest.raises(SystemExit):
        study("student", "--task", "stsb")
    assert "teacher: expected one of stsb, seed 1, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study("teacher", "--model", study.folder)
    assert "model: expected a folder with an encoder's config.json" in capsys.readouterr().err
    study("teacher", "--task", "stsb")
    with pytest.raises(SystemExit):
        study("teacher", "--task", "stsb", "--length", 12)
    assert "expected runs of the same settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study("teacher", "--task", "stsb", "--dtype", "bf16")
    assert "autocast (float32, now bfloat16)" in capsys.readouterr().err
    shutil.rmtree(study.folder / "work/tiny/stsb-1")  # as on another machine, where the results are
    with pytest.raises(SystemExit):
        study("teacher", "--task", "stsb")
    assert "work: expected the weights of the teachers that" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_arm(study, modules, monkeypatch):
    """In bf16 autocast, with scores for a task, then latency; TREC's classes are before the colon."""
    monkeypatch.setattr(modules["encoder_study"], "DTYPES", modules["encoder_arms"].DTYPES)
    study("teacher", "--task", "stsb", "trec", "--dtype", "bf16")
    study("student", "--task", "stsb", "--dtype", "bf16")
    study("student", "--task", "trec", "--dtype", "bf16", "--arm", "paper")
    found = {file.name for file in (study.folder / "out/runs/tiny").glob("stsb-*")}
    assert len(found) == 1 + len(modules["encoder_arms"].ARMS)
    record = json.loads((study.folder / f"out/runs/tiny/stsb-1-moe-{RATE}.json").read_text())
    assert set(record["scores"]) == {*modules["encoder_arms"].DTYPES}
    study("latency", "--task", "stsb", "--dtype", "bf16")
    report = study("report")
    assert "trec accuracy" in report and "| MPOE | bfloat16 |" in report and "| MPOE | int8 |" not in report
    assert (study.folder / "out/chart-tiny-cpu.png").stat().st_size > 1000


def test_what_another_process_is_at_is_left_to_it(modules, tmp_path, capsys):
    study = modules["encoder_study"]
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32}')
    place = study.Place("tiny", tmp_path, tmp_path, tmp_path / "work", tmp_path / "out", study.Settings())
    made = []
    cell = study.Cell(place, "rte", 1)
    cell._distilled = lambda name, arm, rate: made.append(name) or {"held_out": 0.5, "scores": {}, "seconds": 1}
    with FileLock(tmp_path / "work/tiny/locks/rte-1-moe-0.1"):
        study.run_students([cell], ["moe", "dense"], [0.1])
    assert made == ["dense-0.1"]
    assert "rte-1-moe-0.1: another process is at it" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "form", "texts"), [
    ("int8", "int8", None), ("int8-calibrated", "int8", ["text"]), ("int8-token", "int8-token", None),
])  # fmt: skip
def test_training_text_calibrates(modules, monkeypatch, dtype, form, texts):
    study = modules["encoder_study"]
    monkeypatch.setattr(study, "prepare", lambda model, dtype, batches: (model, dtype, batches))
    monkeypatch.setattr(study.Cell, "texts", lambda self: ["text"])
    assert study.Cell.prepared(object.__new__(study.Cell), "model", dtype) == ("model", form, texts)


def made_up(arm, task, seed, score, rate=0.1, held_out=0.5):
    return {
        "arm": arm, "task": task, "seed": seed, "rate": rate, "held_out": held_out, "metric": "accuracy",
        "teacher": 0.8, "scores": {"float32": score, "int8": score - 0.01}, "error": 0.03, "total_parameters": 10**6,
        "active_parameters": 10**6,
    }  # fmt: skip


def test_tries_are_the_same_for_all_students(modules):
    runs = [
        made_up("moe", "rte", 1, 0.7, rate=0.1, held_out=0.6),
        made_up("moe", "rte", 1, 0.9, rate=0.2, held_out=0.9),  # a try that dense did not have
        made_up("dense", "rte", 1, 0.6, rate=0.1),
    ]
    cells, rates = modules["encoder_report"].best_tries(runs)
    assert cells["moe", "rte", 1]["scores"]["float32"] == 0.7 and rates == {("rte", 1): [0.1]}
    cells, _ = modules["encoder_report"].best_tries([*runs, made_up("dense", "rte", 1, 0.5, rate=0.2, held_out=0.6)])
    assert [cells[arm, "rte", 1]["scores"]["float32"] for arm in ("moe", "dense")] == [0.9, 0.5]


def test_summary(modules, tmp_path):
    report = modules["encoder_report"]
    runs = [made_up("teacher", task, seed, 0.8) for task in ("rte", "cola") for seed in (1, 2)]
    runs += [made_up("moe", task, seed, 0.78) for task in ("rte", "cola") for seed in (1, 2)]
    runs += [made_up("dense", "rte", 1, 0.76), made_up("dense", "rte", 2, 0.72), made_up("dense", "cola", 1, 0.74)]
    runs += [made_up("balanced", "rte", 1, 0.7), made_up("moe-eighth", "rte", 1, 0.7)]
    runs += [made_up("dense-eighth", "rte", seed, 0.69) for seed in (1, 2)]
    summary = report.Summary(runs, ("rte", "cola"), (1, 2))
    assert summary.common == ["rte", "cola"]
    assert summary.mean("moe") == (pytest.approx(78.0), pytest.approx(3 / 2**0.5))
    assert summary.kept("moe") == pytest.approx(97.5)
    mean, p, pairs = summary.difference("dense", lambda run: run["scores"]["float32"])
    assert mean == pytest.approx(4.0) and pairs == 3 and p == pytest.approx(0.0742, abs=1e-4)
    of_an_eighth = summary.difference("dense-eighth", lambda run: run["scores"]["float32"])
    assert of_an_eighth == (pytest.approx(1.0), None, 1)  # over experts of an eighth
    assert summary.mean("balanced") is None
    missing = summary.missing()
    assert "- dense of the same FLOPs, 1/4: cola (seed 2)" in missing
    assert "- MoEBERT's experts, balanced tables: rte (seed 2), cola" in missing
    assert "- MPOE: everything" in missing
    assert "missing" in report.cell_text(summary, "balanced", "cola")
    assert report.cell_text(summary, "dense", "cola") == "74.0 (1 of 2)"
    speed = {"q1": 1.5, "median": 2.0, "q3": 2.5}
    shapes = {report.SHAPE: {arm: {"speed": speed} for arm in ("teacher", "moe", report.PLAIN)}}
    latency = {"int8": {"shapes": shapes}}
    text = "\n".join(report.dtype_table(summary, latency, "cpu"))
    assert (
        "| -1.00 | missing | missing | missing | missing | missing | 2.00 [1.50, 2.50] | missing | missing | missing |"
        in text
    )
    assert summary.change("moe", "int8") == (pytest.approx(-1.0), 2) and summary.change("moe", "bfloat16") is None
    assert report.change_text((-1.0, 1), 2) == "-1.00 (1 of 2 tasks)"
    assert report.latency_table(latency)[2:] == [
        "| teacher, dense | int8 | 2.00 [1.50, 2.50] |", f"| {report.LABELS['moe']} | int8 | 2.00 [1.50, 2.50] |"
    ]  # fmt: skip
    assert report.draw(summary, latency, tmp_path / "chart.png", "made up")
    assert (tmp_path / "chart.png").stat().st_size > 1000
    assert not report.draw(summary, {}, tmp_path / "none.png", "made up")
