"""A run of `MoETrainer` that was stopped or killed, and went on, ends as one that nobody disturbed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill.objectives import LayerwiseObjective
from moebert_kernels.distill.run_state import FILE, last_whole_checkpoint
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from tests.distill.killed_trainer import KINDS
from tests.distill.tiny import assert_same_weights, tiny_bert, weights
from tests.distill.tiny_trainer import mostly_slow, terms_of, tiny_data, trainer
from tests.helpers import ROOT


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


CASES = [(kind, step) for kind in KINDS for step in (5, 8)]  # at the end of the first epoch, and within the second


@pytest.mark.parametrize("case", mostly_slow(CASES, {("student", 8), ("language-model", 8)}), ids=str)
def test_a_stopped_run_goes_on_bitwise(case, tmp_path):
    """With a teacher, dropout, the discriminator, groups of lengths, the gradient mask and the balance of windows."""
    kind, step = case
    options = {"save_strategy": "no", "num_train_epochs": 2}
    whole = KINDS[kind](tmp_path / "whole", **options)
    whole.train()
    KINDS[kind](tmp_path / "stopped", **options, callbacks=[StopAt(step)]).train()
    resumed = KINDS[kind](tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 10
    assert_same_weights(resumed.model, weights(whole.model))
    assert terms_of(resumed, "task") == terms_of(whole, "task")
    if kind == "student":
        assert_same_weights(resumed.objective.maps, weights(whole.objective.maps))
        adversary = resumed.objective.adversary
        assert_same_weights(adversary.network, weights(whole.objective.adversary.network))
        assert terms_of(resumed, "discriminator_loss") == terms_of(whole, "discriminator_loss")


@pytest.mark.slow
def test_a_killed_run_goes_on_bitwise(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/distill/killed_trainer.py"), str(tmp_path), "5", "7"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + "".join(
        file.read_text()[-2000:] for file in tmp_path.rglob("*.txt")
    )
    for kind in KINDS:
        whole, went_on = (load_file(tmp_path / kind / name / "end.safetensors") for name in ("whole", "killed"))
        assert whole.keys() == went_on.keys()
        for name, tensor in whole.items():
            assert torch.equal(went_on[name], tensor), name


def stopping_early(folder, callbacks=None, patience=2):
    """A run of 6 epochs of 6 steps, whose metric is known."""
    metrics = {6: 0.5, 12: 0.4, 18: 0.3, 24: 0.6, 30: 0.5, 36: 0.4}
    run = trainer(
        folder, num_train_epochs=6, eval_strategy="epoch", save_strategy="epoch", metric_for_best_model="known",
        greater_is_better=True, load_best_model_at_end=True, early_stopping_patience=patience, judged_on=tiny_data(8),
        callbacks=callbacks,
    )  # fmt: skip
    run.compute_metrics = lambda _: {"known": metrics[run.state.global_step]}
    return run


def test_early_stopping_counts_on_where_a_run_goes_on(tmp_path):
    """And a call of a run that stopped early trains no more, unless the patience has grown."""
    whole = stopping_early(tmp_path / "whole")
    whole.train(resume_from_checkpoint=True)
    stopping_early(tmp_path / "killed", [StopAt(12)]).train()
    for folder in ("killed", "killed", "whole"):
        run = stopping_early(tmp_path / folder)
        run.train(resume_from_checkpoint=True)
        assert (run.state.global_step, run.state.best_global_step) == (18, 6)
        assert_same_weights(run.model, weights(whole.model))
    patient = stopping_early(tmp_path / "killed", patience=3)
    patient.train(resume_from_checkpoint=True)
    assert (patient.state.global_step, patient.state.best_global_step) == (36, 24)
    whole.train()  # anew
    assert whole.state.global_step == 18


def checkpoints(folder, **options):
    run = trainer(folder, save_strategy="steps", save_steps=4, **options)
    run.train()
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def test_half_written_checkpoints_are_passed_over(tmp_path):
    first, second, third = checkpoints(tmp_path)
    assert last_whole_checkpoint(tmp_path) == str(third)
    (third / "trainer_state.json").write_text((third / "trainer_state.json").read_text()[:-20])
    assert last_whole_checkpoint(tmp_path) == str(second)
    (second / FILE).unlink()
    assert last_whole_checkpoint(tmp_path) == str(first)
    (first / "rng_state.pth").unlink()
    assert last_whole_checkpoint(tmp_path) is None and last_whole_checkpoint(tmp_path / "none") is None
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=True)  # begins
    assert run.state.global_step == 12


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    options = {"teacher": tiny_bert(1), "objective": LayerwiseObjective("classification", layer_map={2: 2})}
    checkpoints(tmp_path, **options)
    with pytest.raises(
        UserError, match=r"with other objective.layer_map \(it was \[\[2, 2\]\] and is \[\[1, 2\]\] now\)"
    ):
        other = {**options, "objective": LayerwiseObjective("classification", layer_map={1: 2})}
        trainer(tmp_path, **other).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match=r"with other teacher weights$"):
        trainer(tmp_path, **{**options, "teacher": tiny_bert(2)}).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="with other experts"):
        moe = convert_to_moe(tiny_bert(0), MoEConfig.switch(num_experts=2, load_balance=0.0))
        trainer(tmp_path, moe, **options).train(resume_from_checkpoint=True)
    for other, message in (
        ({"seed": 4}, r"seed \(it was 3 and is 4 now\)"),
        ({"gradient_accumulation_steps": 2}, r"sequences_per_step \(it was 4 and is 8 now\)"),
        ({"loss_weights": {"hidden": 2.0}}, r"loss_weights.hidden \(it was not given and is 2.0 now\)"),
        ({"teacher_dropout": True}, r"teacher_dropout \(it was not given and is True now\)"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, **options, **other).train(resume_from_checkpoint=True)
    trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-12" / FILE).unlink()
    with pytest.raises(UserError, match=f"expected a checkpoint of MoETrainer, got .* without {FILE}"):
        trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))


def test_the_state_is_read_without_running_code(tmp_path):
    checkpoints(tmp_path)
    state = torch.load(tmp_path / "checkpoint-4" / FILE, weights_only=True)
    assert json.loads(json.dumps(state["identity"])) == {"seed": 3, "sequences_per_step": 4} and state["meter"][
        "names"
    ] == ["task"]
