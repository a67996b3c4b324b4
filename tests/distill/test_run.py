"""Runs in their folders: what is kept, what goes on, and what is refused."""

import json
import os
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill.run import RUN
from moebert_kernels.distill.task_trainer import TaskTrainer
from moebert_kernels.distill.trainer import MoETrainer
from moebert_kernels.errors import UserError
from moebert_kernels.files import recover_folder, write_folder
from moebert_kernels.layers import MoEConfig
from tests.distill.tiny import assert_same_weights, tiny_bert, weights
from tests.distill.tiny_run import (
    assert_same_tensors,
    constant,
    interrupt,
    log,
    one_stage,
    run,
    saved_weights,
    tiny_split,
)
from tests.distill.tiny_trainer import mostly_slow
from tests.helpers import misaligned

LAYERWISE, SHORT = {"objective": "layerwise"}, {"num_train_epochs": 1}


def test_the_best_is_kept_of_equals_the_later_and_stops_early(tmp_path):
    """The model that was given ends as the best one; its folder has tokenizer and card."""
    student, seen = tiny_bert(0), []
    values = iter([0.3, 0.5, 0.5, 0.4, 0.9])

    def judge(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(weights(model))
        return {"score": next(values), "other": 0.0}

    settings = {"num_train_epochs": 9, "early_stopping_patience": 2}
    result = run(tmp_path, student, settings=settings, evaluate=judge, best_metric="score")
    assert (result.step, result.best_step, result.stopped_early) == (4 * 6, 3 * 6, True)
    assert result.best_metrics == {"score": 0.5, "other": 0.0} and len(result.history) == 4
    assert_same_weights(student, seen[2])
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(result.model_dir), seen[2])
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "final"), seen[3])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "best")) == 60
    card = (tmp_path / "best/README.md").read_text()
    assert "| score on validation data | 0.5000 |" in card
    assert not list(tmp_path.glob("checkpoint-*")) and not list((tmp_path / "final").glob("*.pt"))


def test_a_smaller_metric_can_be_better_and_none_is_no_number(tmp_path):
    judge = constant([float("nan"), 2.0, 3.0], "loss")
    result = run(tmp_path, evaluate=judge, best_metric="loss", greater_is_better=False)
    assert (result.best_step, result.best_metrics) == (12, {"loss": 2.0})


def test_evaluates_every_few_steps_and_at_the_end(tmp_path):
    settings = {"eval_steps": 5, "num_train_epochs": 2}
    result = run(tmp_path, settings=settings, evaluate=constant([1, 2, 3]), best_metric="score")
    assert [entry["step"] for entry in result.history] == [5, 10, 12]


def test_what_is_evaluated_is_saved(tmp_path):
    """Else the best evaluation's weights would be lost, and its scores given for others."""
    judge = {"evaluate": constant([1, 3, 2, 0, 0]), "best_metric": "score"}
    result = run(tmp_path, settings={"eval_strategy": "steps", "logging_steps": 4, "num_train_epochs": 2}, **judge)
    assert (result.best_step, result.step) == (8, 12) and (tmp_path / "final").exists()
    with pytest.raises(UserError, match="save_steps: expected eval_steps' 5, since the weights of the best"):
        run(tmp_path / "other", settings={"eval_steps": 5, "save_steps": 10}, **judge)
    with pytest.raises(UserError, match=r"load_best_model_at_end: expected True, since the best .* is kept, got False"):
        run(tmp_path / "other", settings={"load_best_model_at_end": False}, **judge)
    with pytest.raises(UserError, match=r"eval_strategy: expected steps or epoch, as the best .* is kept, got no"):
        run(tmp_path / "other", settings={"eval_strategy": "no"}, **judge)
    with pytest.raises(UserError, match="best_metric: expected the name of a metric that evaluate gives, got None"):
        run(tmp_path / "other", evaluate=constant([1]), best_metric=None)


def test_how_often_it_reports_may_not_change_where_that_says_when_it_is_judged(tmp_path):
    run(tmp_path, settings={"eval_strategy": "steps", "logging_steps": 4} | SHORT)
    with pytest.raises(UserError, match=r"run of other logging_steps \(it was 4 and is 2 now\)"):
        run(tmp_path, settings={"eval_strategy": "steps", "logging_steps": 2} | SHORT)
    run(tmp_path / "own", settings={"eval_steps": 4, "logging_steps": 4} | SHORT)
    result = run(tmp_path / "own", settings={"eval_steps": 4, "logging_steps": 2} | SHORT)
    assert [entry["step"] for entry in result.history] == [4, 6]


def test_a_run_that_is_refused_drops_nothing(tmp_path):
    run(tmp_path, settings=SHORT)
    with pytest.raises(UserError, match="router_learning_rate: expected a model with trained routers"):
        run(tmp_path, settings=SHORT | {"router_learning_rate": 0.1}, resume=False)
    with pytest.raises(UserError, match="loss_weights: expected names among task, got 'hiden'"):
        run(tmp_path, settings=SHORT | {"loss_weights": {"hiden": 2.0}}, resume=False)
    assert (tmp_path / "best/model.safetensors").exists() and run(tmp_path, settings=SHORT).step == 6


def test_metrics_are_named(tmp_path):
    with pytest.raises(UserError, match="metric_for_best_model: expected one of score, got 'accuracy'"):
        run(tmp_path, evaluate=constant([1, 2, 3]))


@pytest.mark.parametrize("at", mostly_slow([6, 9], {6}))
def test_an_interrupted_run_ends_with_the_same_bits(at, tmp_path, monkeypatch, capsys):
    """In the middle of an epoch, and in its last step, whose checkpoint waits for the evaluation."""
    options = {"settings": LAYERWISE | {"gradient_accumulation_steps": 1}, "teacher": tiny_bert(1)}
    result = run(tmp_path / "whole", **options)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match=f"step {at} of 18"):
        interrupt(patched, at)
        run(tmp_path / "stopped", **options)
    assert f"stopped at step {at} of 18; the same call goes on from there" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "stopped/best").exists()
    again = run(tmp_path / "stopped", **options)
    assert (again.history, again.best_step) == (result.history, result.best_step)
    assert_same_tensors(saved_weights(tmp_path / "whole/best"), saved_weights(tmp_path / "stopped/best"))


def test_a_second_interrupt_does_not_wait(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, 3, times=2)
        run(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "best").exists()
    run(tmp_path, settings=SHORT)  # nothing is lost that another run could be confused with


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, again = tiny_bert(0, dropout=0.1), tiny_bert(0, dropout=0.1)
    result = run(tmp_path, first)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert run(tmp_path, again) == result
    assert_same_weights(again, weights(first))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "finished")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, 4)
        run(folder / "stopped")
    return folder


class Judge:
    fingerprint = "another"

    def __call__(self, model):
        return {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"num_train_epochs": 5}}, r"num_train_epochs \(it was 3 and is 5 now\)"),
        ({"settings": {"loss_weights": {"task": 2.0}}}, r"loss_weights.task \(it was not given and is 2.0 now\)"),
        ({"train": tiny_split(seed=1)}, "training data"),
        ({"evaluate": Judge()}, "validation data"),
        ({"student": tiny_bert(1, dropout=0.1)}, "model weights"),
        ({"identity": {"task": "rte"}}, r"task \(it was not given and is rte now\)"),
        ({"settings": LAYERWISE, "teacher": tiny_bert(1)}, r"objective .*LayerwiseObjective.*teacher weights"),
    ],
)
@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_another_run_in_the_folder(two_runs, state, change, message):
    kind = {"stopped": "an unfinished", "finished": "a finished"}[state]
    begin = f"output_dir: expected a new folder or one of the same run, got .*{state} with {kind} run of other "
    with pytest.raises(UserError, match=begin + f".*{message}"):
        run(two_runs / state, **change)


def test_how_often_it_reports_may_change(two_runs, tmp_path, monkeypatch):
    shutil.copytree(two_runs / "stopped", tmp_path / "stopped")
    original, steps = MoETrainer.training_step, []
    monkeypatch.setattr(MoETrainer, "training_step", lambda *args: steps.append(1) or original(*args))
    result = run(tmp_path / "stopped", settings={"logging_steps": 1, "save_total_limit": 3})
    assert (len(steps), result.step) == (18 - 4, 18)  # it was stopped in the fourth
    assert_same_tensors(saved_weights(tmp_path / "stopped/best"), saved_weights(two_runs / "finished/best"))


def test_a_run_can_begin_anew(tmp_path):
    run(tmp_path, settings=SHORT)
    result = run(tmp_path, settings={"max_steps": 2}, resume=False)
    assert result.step == 2 and json.loads((tmp_path / RUN).read_text())["result"]["step"] == 2


def test_a_run_does_not_depend_on_where_its_models_lie(tmp_path):
    """Loaded tensors begin where their file has them, and matrix products of some CPUs sum in another order there."""
    for name, place in (("new", lambda model: model), ("loaded", misaligned)):
        student, teacher = place(tiny_bert(0, dropout=0.1)), place(tiny_bert(1).eval())
        run(tmp_path / name, student, settings=LAYERWISE | SHORT, teacher=teacher)
    assert_same_tensors(saved_weights(tmp_path / "new/best"), saved_weights(tmp_path / "loaded/best"))


def test_mixed_precision_leaves_the_model_as_it_was(tmp_path):
    student = tiny_bert(0)
    run(tmp_path / "bf16", student, settings=LAYERWISE | SHORT | {"bf16": True}, teacher=tiny_bert(1))
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert student(torch.ones(1, 3, dtype=torch.int64)).logits.dtype == torch.float32
    run(tmp_path / "after", settings=SHORT)  # another precision in the same process


def test_the_teacher_is_frozen_apart_and_in_eval_mode(tmp_path):
    teacher, modes = tiny_bert(1, dropout=0.5).train(), []
    before = weights(teacher)
    teacher.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    run(tmp_path / "eval", settings=LAYERWISE | {"num_train_epochs": 1}, teacher=teacher)
    assert set(modes) == {(False, False)}
    assert_same_weights(teacher, before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(saved_weights(tmp_path / "eval/best")) == set(before)
    modes.clear()
    run(tmp_path / "train", settings=LAYERWISE | {"num_train_epochs": 1, "teacher_dropout": True}, teacher=teacher)
    assert set(modes) == {(True, False)} and not teacher.training


def test_a_student_with_gates_is_distilled_and_loads(tmp_path):
    config = MoEConfig.moebert(router="gate-token", expert_size=8, load_balance=0.1)
    student = convert_to_moe(tiny_bert(3), config, importance=torch.rand(2, 32), seed=3)
    run(tmp_path, student, settings=LAYERWISE | SHORT | {"logging_steps": 1}, teacher=tiny_bert(1))
    for line in log(tmp_path):
        total = line["task"] + line["hidden"] + line["prediction"] + 0.1 * line["balance"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "best"), weights(student))


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"output_dir: expected a folder that can be written, got .*file"):
        run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    for options, message in (
        ({"settings": LAYERWISE}, "teacher: expected one for one, got none"),
        (
            {"student": tiny_bert(0, positions=8)},
            "model: expected positions for 12 tokens, as texts have at m",
        ),
        (
            {"settings": {"eval_strategy": "steps", "save_strategy": "epoch"}},
            "settings: expected training argum",
        ),
        ({"settings": {"num_train_epochs": 0}}, "num_train_epochs: expected a number above 0, got 0"),
        ({"settings": {"learning_rate": -1.0}}, "learning_rate: expected a number of at least 0, got -1.0"),
        (
            {"student": tiny_bert(0).requires_grad_(False)},
            "model: expected at least one parameter that requires a gr",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", **options)
    assert not list((tmp_path / "out").glob("*"))


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


def test_processes_that_write_one_folder_do_not_mix_their_files(tmp_path):
    def write(folder):
        (folder / "a").write_text("first")
        write_folder(tmp_path / "best", lambda other: [(other / name).write_text("second") for name in "ab"])
        (folder / "b").write_text("first")

    write_folder(tmp_path / "best", write)
    assert {(tmp_path / "best" / name).read_text() for name in "ab"} == {"first"}
    left = tmp_path / ".best.of-a-killed-one.partial"
    left.mkdir()
    write_folder(tmp_path / "best", lambda folder: None)
    assert left.exists()  # it may be at work
    os.utime(left, (0, 0))
    write_folder(tmp_path / "best", lambda folder: None)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_trains(tmp_path):
    def judge(model):
        with pytest.raises(UserError, match="output_dir: expected a folder that no other process writes, got "):
            run(tmp_path, resume=False)
        return {"score": 1.0}

    result = run(tmp_path, settings=SHORT, evaluate=judge, best_metric="score")
    assert result.step == 6 and not (tmp_path / ".lock").exists()


def test_the_bar_shows_losses_and_standard_output_is_left_alone(tmp_path, capsys):
    recipe = one_stage(disable_tqdm=False, num_train_epochs=1)
    run(tmp_path, recipe=recipe)
    printed = capsys.readouterr()
    assert printed.out == "" and "loss=" in printed.err


def test_fsdp_is_refused_before_training(tmp_path, monkeypatch):
    made = TaskTrainer.create_accelerator_and_postprocess

    def sharded(self):
        made(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(TaskTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(UserError, match="fsdp: expected one process or DDP for a recipe, got FSDP"):
        run(tmp_path)
    assert not (tmp_path / "run.json").exists()
