"""The discriminator: its losses, its own training beside the student's, and what of it is kept where."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from moebert_kernels.distill.discriminator import Adversary, AdversaryConfig, discriminator_losses, generator_loss
from moebert_kernels.distill.microbert import TERMS, MicroBertObjective
from moebert_kernels.errors import UserError
from tests.distill.tiny import assert_same_weights, tiny_bert, weights
from tests.distill.tiny_run import interrupt
from tests.distill.tiny_trainer import tiny_data, trainer


def distil(folder, config=None, student=None, teacher=None, terms=TERMS, data=None, **settings):
    student = tiny_bert(0) if student is None else student
    teacher = tiny_bert(1, layers=3, hidden=32) if teacher is None else teacher
    objective = MicroBertObjective("classification", terms, adversary=AdversaryConfig(**settings))
    config = {"num_train_epochs": 4, "learning_rate": 1e-3, "logging_steps": 3} | (config or {})
    run = trainer(folder, student, data, teacher, objective, **config)
    run.train(resume_from_checkpoint=True)
    return run, student, objective


def lines_of(run):
    return [entry for entry in run.state.log_history if "loss" in entry]


def test_losses():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.0])
    D = torch.sigmoid
    smoothed = -(0.9 * D(real).log() + 0.1 * (1 - D(real)).log())
    torch.testing.assert_close(discriminator_losses(real, fake, 0.9), 0.5 * (smoothed - (1 - D(fake)).log()))
    torch.testing.assert_close(generator_loss(fake), -D(fake).log().mean())
    assert math.isfinite(generator_loss(torch.tensor([-200.0])).item())
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(generator_loss, (logits,))


@pytest.mark.parametrize("seen", ["logits", "both"])
def test_accumulation_equals_the_large_batch(tmp_path, seen):
    """A short last window, the discriminator's dropout on, all terms."""
    ends = []
    for name, size, accumulation in (("large", 32, 1), ("small", 8, 4)):
        config = {
            "num_train_epochs": 5, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation,
            "logging_steps": 2, "adam_epsilon": 1e-4,
        }  # fmt: skip
        run, student, objective = distil(tmp_path / name, config, data=tiny_data(43), input=seen)
        ends.append((student, objective, lines_of(run)))
    (large, large_objective, large_log), (small, small_objective, small_log) = ends
    assert_same_weights(large, weights(small), tolerance=1e-5)
    assert_same_weights(large_objective.maps, weights(small_objective.maps), tolerance=1e-5)
    networks = [objective.adversary.network for objective in (large_objective, small_objective)]
    assert_same_weights(networks[0], weights(networks[1]), tolerance=1e-5)
    for one, other in zip(large_log, small_log, strict=True):
        for key in ("loss", *TERMS, "discriminator_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6)


def test_resume_is_exact_and_includes_the_discriminator(tmp_path, monkeypatch):
    options = {"terms": ("alignment", "adversarial"), "stop_steps": 5, "warmup": 0.3}
    config = {"save_strategy": "steps", "save_steps": 4}
    _, student, objective = distil(tmp_path / "whole", config, student=tiny_bert(0, dropout=0.1), **options)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, 9)
        distil(tmp_path / "stopped", config, student=tiny_bert(0, dropout=0.1), **options)
    _, again, resumed = distil(tmp_path / "stopped", config, student=tiny_bert(0, dropout=0.1), **options)
    assert_same_weights(again, weights(student))
    assert_same_weights(resumed.maps, weights(objective.maps))
    assert_same_weights(resumed.adversary.network, weights(objective.adversary.network))
    with pytest.raises(UserError, match=r"objective\.discriminator_warmup \(it was 0\.3 and is 0\.2 now\)"):
        distil(tmp_path / "whole", config, student=tiny_bert(0, dropout=0.1), **(options | {"warmup": 0.2}))


def test_is_apart_from_the_student(tmp_path):
    """Frozen in the student's pass, no part of what is saved, and trained by its own optimizer."""
    teacher, before = tiny_bert(1, layers=3, hidden=32), weights(tiny_bert(1, layers=3, hidden=32))
    run, student, objective = distil(tmp_path, teacher=teacher)
    run.save_model(tmp_path / "best")
    network = objective.adversary.network
    assert not network.training and not any(p.requires_grad or p.grad is not None for p in network.parameters())
    fresh = MicroBertObjective("classification", adversary=AdversaryConfig())
    fresh.build(tiny_bert(0), _info(teacher), run.args.seed)
    assert all(
        not torch.equal(one, other)
        for one, other in zip(network.parameters(), fresh.adversary.network.parameters(), strict=True)
    )
    assert_same_weights(teacher, before)
    names = set(load_file(tmp_path / "best/model.safetensors"))
    assert names == set(tiny_bert(0).state_dict())
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "best"), weights(student))
    config = objective.adversary.optimizer.param_groups[0]
    assert (config["lr"], config["betas"]) == (1e-4, (0.5, 0.999))


def _info(teacher):
    from moebert_kernels.distill.teacher import teacher_info

    return teacher_info(teacher)


def test_warms_up_and_is_logged(tmp_path):
    """Until the share of steps is reached it learns, and the student's loss is without the term."""
    config = {"logging_steps": 1, "loss_weights": {"task": 0.0, "adversarial": 0.5}}
    run, _, _ = distil(tmp_path, config, terms=("soft", "adversarial"), warmup=0.5)
    lines = lines_of(run)
    assert len(lines) == 24
    for step, line in enumerate(lines):
        counted = 0.5 * line["adversarial"] if step >= 12 else 0.0
        assert line["loss"] == pytest.approx(line["soft"] + counted, rel=1e-5)
        assert 0 < line["discriminator_fake"] < 1 and 0 < line["discriminator_real"] < 1
        assert 0 <= line["discriminator_accuracy"] <= 1 and line["discriminator_loss"] > 0


def test_an_evaluation_is_not_trained_on(tmp_path):
    """Of text without labels, whose loss is the objective's."""
    texts = tiny_data(9, labels=False)
    objective = MicroBertObjective("classification", TERMS)
    run = trainer(tmp_path, tiny_bert(0), texts, tiny_bert(1), objective, judged_on=texts, eval_strategy="epoch")
    assert run.train().global_step == 6 and not objective.adversary._window


def test_ends_where_it_wins_for_long(tmp_path):
    """Outputs that anybody can tell apart: after the warm-up, `stop_steps` right ones end the term."""
    teacher = tiny_bert(1)
    torch.nn.init.constant_(teacher.classifier.bias[:1], 50.0)
    config = {"num_train_epochs": 6, "learning_rate": 1e-5, "logging_steps": 1, "loss_weights": {"adversarial": 0.5}}
    settings = {"input": "logits", "stop_steps": 8, "warmup": 0.25, "learning_rate": 1e-2}
    run, _, objective = distil(
        tmp_path, config=config, teacher=teacher, terms=("soft", "adversarial"), **settings
    )  # fmt: skip
    assert objective.adversary.stopped
    lines = lines_of(run)
    counted = [line["loss"] - line["task"] - line["soft"] > 1e-4 for line in lines]
    assert counted == [9 <= step < 17 for step in range(36)]  # a quarter of 36 steps, then eight
    assert [line.get("adversarial_stopped", False) for line in lines] == [step == 16 for step in range(36)]
    assert ["discriminator_real" in line for line in lines] == [step < 17 for step in range(36)]
    patient = distil(tmp_path / "never", config=config, teacher=teacher, terms=("soft", "adversarial"), input="logits")
    assert not patient[2].adversary.stopped


def test_a_step_of_several_processes_is_one_of_all_their_sequences():
    """Two that see half of a window each, and a dummy that does not count, step as one that sees all of it."""
    torch.manual_seed(0)
    ours, theirs = torch.randn(6, 5), torch.randn(6, 5)
    config = AdversaryConfig(dropout=0.0)
    whole, one, two = (Adversary(config, 5, seed=2) for _ in range(3))
    whole(ours, theirs)
    whole.step([6], 6, share=0.5)
    gradients = []
    one(ours[:4], theirs[:4])
    one.step([4], 6, 0.5, lambda grad: gradients.append(grad.clone()) or grad)
    two(ours[4:], theirs[4:]), two(ours[:2], theirs[:2])
    others = iter(gradients)
    two.step([2, 0], 6, 0.5, lambda grad: grad + next(others))
    assert_same_weights(whole.network, weights(two.network), tolerance=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    ({"input": "hidden"}, "discriminator_input: expected one of auto, logits, pooled, both, got 'hidden'"),
    ({"dropout": 1.0}, "discriminator_dropout: expected at least 0 and less than 1, got 1.0"),
    ({"warmup": -0.1}, "discriminator_warmup: expected at least 0"),
    ({"real_label": 0.5}, "discriminator_real_label: expected more than 0.5 and at most 1, got 0.5"),
    ({"learning_rate": 0.0}, "discriminator_learning_rate: expected a number above 0"),
    ({"stop_steps": 0}, "discriminator_stop_steps: expected at least 1 or None, got 0"),
])  # fmt: skip
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        AdversaryConfig(**options)


def test_a_loss_that_is_not_finite_is_named():
    adversary = Adversary(AdversaryConfig(), 2)
    adversary(torch.full((1, 2), float("inf")), torch.zeros(1, 2))
    adversary.step([1], 1, share=0.5)
    with pytest.raises(UserError, match=r"discriminator_loss: expected a finite loss, got nan at .* step 7"):
        adversary.means(7)
    assert AdversaryConfig().input_for("regression") == "pooled"


class Interrupted(TrainerCallback):
    """Ends the first training within a window of several micro-batches."""

    done = False

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == 3 and not self.done:
            self.done = True
            raise KeyboardInterrupt


def test_a_window_that_was_interrupted_is_forgotten(tmp_path):
    """As are the sums of an earlier training, when the same trainer trains anew."""
    objective = MicroBertObjective("classification", ("soft", "adversarial"), adversary=AdversaryConfig(warmup=0.0))
    run = trainer(
        tmp_path, teacher=tiny_bert(1), objective=objective, callbacks=[Interrupted()], gradient_accumulation_steps=2,
        logging_steps=2, learning_rate=0.0,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    first, *_ = lines_of(run)
    alone = trainer(
        tmp_path, teacher=tiny_bert(1), objective=objective, gradient_accumulation_steps=2, logging_steps=2,
        learning_rate=0.0,
    )  # fmt: skip
    alone.train()
    assert first["soft"] == pytest.approx(lines_of(alone)[0]["soft"], rel=1e-6)
