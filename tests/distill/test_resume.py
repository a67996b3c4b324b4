"""Interrupted, killed and damaged runs, and folders that hold something else."""

import os
import signal
import subprocess
import sys

import pytest

from moebert_kernels.distill import FitConfig, LayerwiseObjective
from moebert_kernels.distill.checkpoint import recover_folder, write_folder
from moebert_kernels.errors import OtherRun, UserError
from tests.distill.tiny import CONFIG, Interrupting, TinyBatches, assert_same_weights, run, tiny_bert, weights
from tests.helpers import ROOT, misaligned

RESULTS = ("final/model.safetensors", "best/model.safetensors", "log.jsonl", "state/finished.json")


def assert_same_run(one, other):
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_killed_runs_end_where_an_undisturbed_one_does(tmp_path):
    """SIGKILL at random moments, dropout on, accumulation, an epoch's short last window, saves every other step."""
    command = [sys.executable, str(ROOT / "tests/distill/killed_run.py"), str(tmp_path), "7"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4, "too few kills met a living run"
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


class InterruptedBatches(Interrupting, TinyBatches):
    def __init__(self, at, times=1, **options):
        super().__init__(**options)
        self.at, self.times = at, times


def test_interrupt_is_resumed(tmp_path, capsys):
    run(tmp_path / "whole")
    student = tiny_bert(0, dropout=0.1)
    for at in (9, 15):  # batches drawn: up to step 9, then again from the start of epoch 1, of which 3 are skipped
        with pytest.raises(KeyboardInterrupt, match="step"):
            run(tmp_path / "stopped", InterruptedBatches(at), student=student)
    assert "stopped at step 9 of 24; the same call goes on from there" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(tmp_path / "stopped", student=student)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_interrupt_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, InterruptedBatches(7, times=2))
    assert not (tmp_path / "final").exists()
    run(tmp_path)


def interrupted(folder):
    with pytest.raises(KeyboardInterrupt):
        run(folder, InterruptedBatches(11))
    return sorted((folder / "state").glob("step-*"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest"])
def test_falls_back_to_the_previous_checkpoint(tmp_path, damage):
    run(tmp_path / "whole")
    older, newer = interrupted(tmp_path / "damaged")
    file = newer / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        content[-5] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[:-20])
    with pytest.warns(UserWarning, match=rf"{newer.name}: corrupt checkpoint: .*: going on from {older.name}"):
        run(tmp_path / "damaged")
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


def test_no_whole_checkpoint_is_an_error_that_loses_nothing(tmp_path):
    for path in interrupted(tmp_path):
        (path / "state.json").write_text("{}")
    best = (tmp_path / "best/model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"corrupt checkpoint: state.json: .*; no other checkpoint is whole"):
        run(tmp_path)
    assert (tmp_path / "best/model.safetensors").read_bytes() == best
    run(tmp_path, resume=False)


class Judge:
    """A judge that says what data it judges on, as evaluators do."""

    def __init__(self, fingerprint="one"):
        self.fingerprint = fingerprint

    def __call__(self, model):
        return {"accuracy": 1.0}


def test_a_judge_of_the_same_data_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, InterruptedBatches(11), evaluate=Judge())
    with pytest.raises(OtherRun, match="an unfinished run of other validation data"):
        run(tmp_path, evaluate=Judge("another"))
    result = run(tmp_path, evaluate=Judge())
    with pytest.raises(OtherRun, match="a finished run of other validation data"):
        run(tmp_path, evaluate=Judge("another"))
    assert run(tmp_path, evaluate=Judge()) == result


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "finished")
    interrupted(folder / "stopped")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": FitConfig(epochs=5, learning_rate=3e-3)}, r"epochs \(it was 4 and is 5 now\)"),
        (
            {"config": FitConfig(epochs=4, learning_rate=3e-3, weights={"task": 2.0})},
            r"weights.task \(it was not given and is 2.0 now\)",
        ),
        ({"data": TinyBatches(seed=1)}, "training data"),
        ({"data": TinyBatches(examples=26), "identity": {"training rows": "x"}}, "training rows"),
        ({"evaluate": Judge("another")}, "validation data"),
        (
            {"student": tiny_bert(dropout=0.1, hidden=32)},
            r"model.hidden_size \(it was 16 and is 32 now\), .*weight shapes",
        ),
        ({"identity": {"task": "rte"}}, r"task \(it was not given and is rte now\)"),
        (
            {"objective": LayerwiseObjective("classification"), "teacher": tiny_bert(1)},
            r"objective \(it was not given and is LayerwiseObjective now\), .*, teacher weights",
        ),
    ],
)
@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_another_run_in_the_folder(two_runs, state, change, message):
    kind = {"stopped": "an unfinished", "finished": "a finished"}[state]
    begin = f"output_dir: expected a new folder or one of the same run, got .*{state} with {kind} run of other "
    with pytest.raises(OtherRun, match=begin + message + r" \(resume=False replaces it, another output_dir keeps it\)"):
        run(two_runs / state, **change)


def test_how_often_it_saves_may_change(tmp_path):
    interrupted(tmp_path)
    run(tmp_path, config=FitConfig(epochs=4, learning_rate=3e-3, save_steps=100, log_steps=1))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, again = tiny_bert(0, dropout=0.1), tiny_bert(0, dropout=0.1)
    result = run(tmp_path, student=first)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert run(tmp_path, InterruptedBatches(1), student=again) == result
    assert_same_weights(again, weights(first))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(tmp_path / "state")) == ["finished.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path, previous = tmp_path / "best", tmp_path / "best.previous"
    write_folder(path, lambda folder: (folder / "a").write_text("1"))

    def fail(folder):
        (folder / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(path, fail)
    assert (path / "a").read_text() == "1"
    path.rename(previous)  # interrupted between the two renames
    recover_folder(path)
    assert (path / "a").read_text() == "1"
    write_folder(path, lambda folder: (folder / "b").write_text("2"))
    assert [file.name for file in path.iterdir()] == ["b"] and not previous.exists()


def test_a_run_does_not_depend_on_where_its_models_lie(tmp_path):
    """Loaded tensors begin where their file has them, and matrix products of some CPUs sum in another order there."""
    options = {"objective": LayerwiseObjective("classification"), "config": CONFIG}
    for name, place in (("new", lambda model: model), ("loaded", misaligned)):
        student, teacher = place(tiny_bert(0, dropout=0.1)), place(tiny_bert(1).eval())
        run(tmp_path / name, student=student, teacher=teacher, **options)
    assert_same_run(tmp_path / "new", tmp_path / "loaded")


def test_a_saved_model_has_a_card_with_its_score(tmp_path):
    result = run(tmp_path)
    best = tmp_path / "best" / "README.md"
    assert f"| accuracy on validation data | {result.best_metrics['accuracy']:.4f} |" in best.read_text()
    best.write_text("# What I think of it\n")
    (tmp_path / "state/finished.json").unlink()
    run(tmp_path)
    assert best.read_text() == "# What I think of it\n"
    assert "BertForSequenceClassification" in (tmp_path / "final" / "README.md").read_text()
