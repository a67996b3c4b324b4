import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill import FitConfig, LayerwiseObjective, TeacherCache, fit
from moebert_kernels.distill.setup import parameter_groups
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers
from tests.distill.tiny import CONFIG, TinyBatches, assert_same_weights, log, run, tiny_bert, weights
from tests.helpers import ROOT


def tiny_moe(router="hash-random", **options):
    config = MoEConfig.moebert(router=router, expert_size=8, **{"load_balance": 0.0} | options)
    return convert_to_moe(tiny_bert(3), config, importance=torch.rand(2, 32), seed=3)


@pytest.mark.parametrize("kind", ["classification", "regression", "qa"])
def test_accumulation_equals_the_large_batch(tmp_path, kind):
    """Micro-batches of uneven sizes, and an epoch that ends in a short window of uneven batches."""
    ends = []
    for name, sizes, accumulation in (("large", [32, 11], 1), ("small", [8, 8, 8, 8, 8, 3], 4)):
        data = TinyBatches(kind=kind, sizes=sizes, examples=43)
        qa, labels = kind == "qa", 1 if kind == "regression" else 3
        student, teacher = (tiny_bert(seed, num_labels=labels, qa=qa) for seed in (0, 1))
        config = FitConfig(epochs=4, learning_rate=1e-3, accumulation=accumulation, weight_decay=0.1)
        fit(
            student,
            data,
            config=config,
            output_dir=tmp_path / name,
            objective=LayerwiseObjective(kind),
            teacher=teacher,
        )
        ends.append((student, log(tmp_path / name, "loss")))
    # a softmax over positions does not feel their common bias: its gradient is rounding noise, which Adam makes large
    assert_same_weights(ends[0][0], weights(ends[1][0]), tolerance=1e-6, but=["qa_outputs.bias"])
    for large, small in zip(ends[0][1], ends[1][1], strict=True):
        assert large == pytest.approx(small, rel=1e-5)


@pytest.mark.parametrize("router", ["gate-token", "gate-sentence"])
def test_accumulation_keeps_the_balance_loss_of_the_large_batch(tmp_path, router):
    """Also with recomputed activations, where the backward runs the routers again."""
    ends = []
    runs = (("large", [32, 11], 1), ("small", [8, 8, 8, 8, 8, 3], 4), ("again", [20, 12, 11], 2))
    for name, sizes, accumulation in runs:
        student = tiny_moe(router, load_balance=0.5)
        if name == "again":
            student.gradient_checkpointing_enable()
        config = FitConfig(epochs=4, learning_rate=1e-3, accumulation=accumulation, log_steps=1)
        fit(student, TinyBatches(sizes=sizes, examples=43), config=config, output_dir=tmp_path / name)
        ends.append((student, log(tmp_path / name, "balance")))
    large, lines = ends[0]
    for other, its_lines in ends[1:]:
        assert_same_weights(large, weights(other), tolerance=1e-6)
        for line, its_line in zip(lines, its_lines, strict=True):
            assert line == pytest.approx(its_line, rel=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Each takes every other micro-batch of a window; the last window has an odd number of them."""
    script = str(ROOT / "tests/distill/distributed_run.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    for name, command in (
        ("one", [script, str(tmp_path / "one"), "4"]),
        (
            "two",
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, str(tmp_path / "two"), "2"],
        ),
    ):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{name}: {done.stderr}"
    for part, other in ((".", "."), ("lm", "lm"), ("lm", "folded")):
        folders = [tmp_path / "one" / part, tmp_path / "two" / other]
        one, two = (load_file(folder / "final/model.safetensors") for folder in folders)
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-6, msg=f"{other} {name}")
        for ours, theirs in zip(*(log(folder, "loss") for folder in folders), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_keeps_the_best_the_later_of_equals_and_stops_early(tmp_path):
    scores, saved = iter([0.5, 0.7, 0.7, 0.6, 0.9]), []
    model = tiny_bert(0)

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        saved.append(weights(model))
        return {"f1": 0.0, "accuracy": next(scores)}

    config = FitConfig(epochs=9, learning_rate=1e-3, patience=2, best_metric="accuracy")
    folders = []
    result = run(tmp_path, config=config, student=model, evaluate=evaluate, also_save=folders.append)
    assert (result.step, result.best_step, result.stopped_early) == (4 * 6, 3 * 6, True)
    assert result.best_metrics == {"f1": 0.0, "accuracy": 0.7}
    assert [entry["metrics"]["accuracy"] for entry in result.history] == [0.5, 0.7, 0.7, 0.6]
    assert [entry["metrics"] for entry in log(tmp_path, "metrics")] == [entry["metrics"] for entry in result.history]
    assert result.model_dir == tmp_path / "best"
    assert_same_weights(model, saved[2])
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "best"), saved[2])
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "final"), saved[3])
    assert len(folders) == 4 and not any(folder.exists() for folder in folders)  # renamed when whole


def test_a_smaller_metric_can_be_better(tmp_path):
    scores = iter([float("nan"), 3.0, 2.0, 2.5])
    config = FitConfig(epochs=4, greater_is_better=False)
    result = run(tmp_path, config=config, evaluate=lambda _: {"perplexity": next(scores)})
    assert (result.best_step, result.best_metrics) == (18, {"perplexity": 2.0})


def test_evaluates_every_few_steps_and_at_the_end(tmp_path):
    result = run(tmp_path, config=FitConfig(epochs=2, eval_steps=5))
    assert [entry["step"] for entry in result.history] == [5, 10, 12]
    result = run(tmp_path / "short", config=FitConfig(epochs=2, max_steps=4), evaluate=None)
    assert (result.step, result.model_dir, result.history) == (4, tmp_path / "short/final", [])
    assert [line["learning_rate"] for line in log(tmp_path / "short", "loss")] == [0.0]


def test_metric_must_be_named(tmp_path):
    two = {"evaluate": lambda _: {"f1": 0.0, "accuracy": 0.0}}
    with pytest.raises(UserError, match="best_metric: expected one of f1, accuracy, got None"):
        run(tmp_path / "a", **two)
    with pytest.raises(UserError, match="best_metric: expected one of f1, accuracy, got 'mcc'"):
        run(tmp_path / "b", config=FitConfig(best_metric="mcc"), **two)


def distil(folder, student, teacher=None, config=CONFIG, preset="default", data=None):
    objective = LayerwiseObjective("classification", preset=preset)
    teacher = tiny_bert(1) if teacher is None else teacher
    return fit(student, data or TinyBatches(), config=config, output_dir=folder, objective=objective, teacher=teacher)


def test_teacher_is_frozen_apart_and_in_eval_mode(tmp_path):
    teacher, student, modes = tiny_bert(1, dropout=0.5).train(), tiny_bert(0), []
    before = weights(teacher)
    teacher.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    distil(tmp_path / "eval", student, teacher)
    assert set(modes) == {(False, False)}
    assert_same_weights(teacher, before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(AutoModelForSequenceClassification.from_pretrained(tmp_path / "eval/final").state_dict()) == set(before)

    modes.clear()
    distil(tmp_path / "train", tiny_bert(0), teacher, config=FitConfig(epochs=1, teacher_dropout=True))
    assert set(modes) == {(True, False)}
    assert not teacher.training


def test_weights_of_the_terms(tmp_path):
    config = FitConfig(epochs=1, weights={"task": 0.5, "hidden": 2.0, "prediction": 0.0}, log_steps=1)
    distil(tmp_path, tiny_bert(0), config=config)
    for line in log(tmp_path, "loss"):
        assert line["loss"] == pytest.approx(0.5 * line["task"] + 2.0 * line["hidden"], rel=1e-6)
        assert "prediction" in line


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_distils_a_moe_student(tmp_path, preset):
    student = tiny_moe("gate-token", load_balance=0.1, route_padding=preset == "paper")
    distil(tmp_path / "gate", student, preset=preset)
    lines = log(tmp_path / "gate", "loss")
    assert lines[-1]["hidden"] < lines[0]["hidden"]
    for line in lines:
        total = line["task"] + line["hidden"] + line["prediction"] + 0.1 * line["balance"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "gate/final")
    assert_same_weights(reloaded, weights(student))
    other = {"default": "paper", "paper": "default"}[preset]
    with pytest.raises(UserError, match="preset: expected padding to be"):
        distil(tmp_path / "mixed", tiny_moe(route_padding=preset == "paper"), preset=other)


def falling():
    """An evaluation that is worse each time."""
    values = iter(range(100, 0, -1))
    return lambda model: {"score": next(values)}


def test_a_term_that_contributes_nothing(tmp_path):
    for student in (tiny_bert(0), tiny_moe()):
        without = f"balance: expected the weight 0 for a {type(student).__name__} without gates, .*, got 0.1"
        with pytest.raises(UserError, match=without):
            run(tmp_path / "balance", student=student, config=FitConfig(weights={"balance": 0.1}))
    student = tiny_bert(0).requires_grad_(False)
    student.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError, match="task: expected a loss that depends on what is trained, got a constant"):
        run(tmp_path / "frozen", student=student)
    with pytest.raises(UserError, match="weights: expected names among hidden, prediction, task, got 'hiden'"):
        distil(tmp_path / "name", tiny_bert(0), config=FitConfig(weights={"hiden": 1.0}))
    nothing = {"task": 0.0, "hidden": 0.0, "prediction": 0.0}
    with pytest.raises(UserError, match="weights: expected a loss term with a weight above 0, got none"):
        distil(tmp_path / "none", tiny_bert(0), config=FitConfig(weights=nothing))
    # a copy of the teacher is a fair start, as long as something moves it
    config = FitConfig(epochs=8, log_steps=5)
    distil(tmp_path / "copy", tiny_bert(1), config=config)
    config = FitConfig(epochs=8, log_steps=5, weights={"task": 0.0})
    with pytest.raises(UserError, match="hidden: expected a loss that contributes, got exactly 0 in all of 20 steps"):
        distil(tmp_path / "still", tiny_bert(1), config=config)
    with pytest.raises(UserError, match="hidden: expected a loss that contributes, got exactly 0 in all of 2 steps"):
        distil(tmp_path / "short", tiny_bert(1), config=replace(config, max_steps=2))
    assert not (tmp_path / "short/final").exists()
    config = FitConfig(epochs=8, eval_steps=1, patience=2, weights={"task": 0.0})
    options = {"objective": LayerwiseObjective("classification"), "teacher": tiny_bert(1)}
    with pytest.raises(UserError, match="hidden: expected a loss that contributes, got exactly 0 in all of 3 steps"):
        run(tmp_path / "stopped", student=tiny_bert(1), config=config, evaluate=falling(), **options)


def test_a_term_that_is_not_finite(tmp_path):
    student = tiny_bert(0)
    torch.nn.init.constant_(student.bert.encoder.layer[1].output.LayerNorm.bias, float("inf"))
    with pytest.raises(UserError, match=r"\w+: expected a finite loss, got (nan|inf) at or shortly before step 3"):
        distil(tmp_path, student)
    assert not list((tmp_path / "state").glob("step-*"))


def test_rejects_what_does_not_fit(tmp_path):
    with pytest.raises(UserError, match="teacher: expected one together with an objective, got None"):
        run(tmp_path, objective=LayerwiseObjective("classification"))
    with pytest.raises(UserError, match="objective: expected one together with a teacher, got None"):
        run(tmp_path, teacher=tiny_bert(1))
    student = tiny_bert(0)
    with pytest.raises(UserError, match="teacher: expected weights of its own, got some that the student trains"):
        distil(tmp_path, student, student)
    with pytest.raises(UserError, match="teacher: expected positions for 9 tokens, as texts have at most, got 8"):
        distil(tmp_path, student, tiny_bert(1, positions=8))
    with pytest.raises(UserError, match="hidden_size: expected the teacher's 32, got 16"):
        distil(tmp_path, student, tiny_bert(1, hidden=32))
    cache = TeacherCache.build(tiny_bert(1), TinyBatches(), tmp_path / "cache")
    with pytest.raises(UserError, match="teacher_dropout: expected False with cached teacher outputs"):
        distil(tmp_path, student, cache, config=FitConfig(teacher_dropout=True))
    with pytest.raises(UserError, match="preset: expected 'default' with cached teacher outputs"):
        distil(tmp_path, student, cache, preset="paper")
    with pytest.raises(UserError, match="train: expected at least one batch, got none"):
        run(tmp_path, TinyBatches(examples=0))
    with pytest.raises(UserError, match="model: expected at least one parameter that requires a gradient, got none"):
        run(tmp_path, student=tiny_bert(0).requires_grad_(False))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"output_dir: expected a folder that can be written, got .*file"):
        run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


class Short(TinyBatches):
    def __len__(self):
        return super().__len__() + 1


def test_rejects_an_epoch_of_another_length(tmp_path):
    with pytest.raises(UserError, match="train: expected 7 batches in epoch 0, got 6"):
        run(tmp_path, Short())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
        ({"patience": 0}, "patience: expected a whole number of at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number of at least 0, got -1.0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio: expected a share between 0 and 1, got 1.5"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected a number above 0 or None, got 0.0"),
        ({"schedule": "foo"}, "schedule: expected one of linear, cosine, .*, constant, .*, got 'foo'"),
        ({"schedule": "reduce_lr_on_plateau"}, "schedule: expected one of linear, "),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected 'no', 'fp16' or 'bf16', got 'fp8'"),
        ({"weights": {"task": -1.0}}, r"weights\['task'\]: expected a number of at least 0, got -1.0"),
    ],
)
def test_config_rejects(settings, message):
    with pytest.raises(UserError, match=message):
        FitConfig(**settings)


def test_mixed_precision_leaves_the_model_as_it_was(tmp_path):
    student = tiny_bert(0)
    distil(tmp_path, student, config=FitConfig(epochs=2, mixed_precision="bf16"))
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    batch = next(TinyBatches()(0))
    assert student(batch["input_ids"]).logits.dtype == torch.float32
    assert "forward" not in vars(student) or not hasattr(student.forward, "__wrapped__")
    run(tmp_path / "after", config=FitConfig(epochs=1))  # another precision in the same process


def test_biases_and_norms_do_not_decay():
    model = tiny_moe("gate-token")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    kept = {names[id(parameter)].removeprefix("bert.encoder.layer.0.") for parameter in undecayed["params"]}
    shrunk = {names[id(parameter)].removeprefix("bert.encoder.layer.0.") for parameter in decayed["params"]}
    assert {f"output.experts.{name}" for name in ("b1", "b2", "norm_weight", "norm_bias")} | {"classifier.bias"} <= kept
    assert {"bert.embeddings.LayerNorm.weight", "attention.output.LayerNorm.weight"} <= kept
    assert {"output.experts.w1", "output.experts.w2", "output.router.gate.weight", "classifier.weight"} <= shrunk


def test_routers_may_have_a_learning_rate_of_their_own():
    model = tiny_moe("gate-token")
    *others, routing = parameter_groups(model, 0.1, router_learning_rate=1e-2)
    assert (routing["weight_decay"], routing["lr"]) == (0.0, 1e-2)
    assert [id(p) for p in routing["params"]] == [id(layer.router.gate.weight) for layer in moe_layers(model)]
    assert sum(len(group["params"]) for group in (*others, routing)) == len(list(model.parameters()))
    with pytest.raises(UserError, match="router_learning_rate: expected a model with trained routers, got one without"):
        parameter_groups(tiny_bert(0), 0.1, router_learning_rate=1e-2)
