"""MPOE models in training: the balance term, the gradient mask, folding once per step."""

import pytest
import torch

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import get_task
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from moebert_kernels.nn import MPOWeight
from tests.distill.test_text_to_text import rows
from tests.distill.tiny import weights
from tests.distill.tiny_run import assert_same_tensors, interrupt, log, run, saved_weights
from tests.distill.tiny_text import story, tiny_gpt2, tiny_mpoe, tiny_t5, word_tokenizer


def train(folder, model, probability=0.0, split=None, **settings):
    mask = {"gradient_mask": {"probability": probability, "seed": 5}} if probability else {}
    settings = {"learning_rate": 1e-2, "logging_steps": 1} | mask | settings
    return run(folder, model, train=split or story(), settings=settings, evaluate=None)


@pytest.mark.parametrize("experts", ["mpo", "copy"])
def test_the_balance_loss_is_a_term_of_the_loss(tmp_path, experts):
    train(tmp_path, tiny_mpoe(load_balance=0.5, experts=experts), num_train_epochs=1)
    for line in log(tmp_path, "balance"):
        assert line["balance"] > 0.5  # of each layer at least 1 where experts get as much as they are wanted
        assert line["loss"] == pytest.approx(line["task"] + 0.5 * line["balance"], rel=1e-5)


def test_text_to_text_has_a_balance_term_too(tmp_path):
    model = convert_to_moe(tiny_t5(), MoEConfig.mpoe(num_experts=2, load_balance=0.5), num_sites=3)
    split = TokenizedSplit(rows(8), get_task("rte"), word_tokenizer(), max_length=128, text_to_text=True)
    train(tmp_path, model, split=split, num_train_epochs=1)
    for line in log(tmp_path, "balance"):
        assert line["loss"] == pytest.approx(line["task"] + 0.5 * line["balance"], rel=1e-5)


def central(model):
    return {name for name, _ in model.named_parameters() if name.endswith(".central")}


def test_masked_steps_leave_the_central_tensors_as_they_are(tmp_path):
    model = tiny_mpoe()
    before = weights(model)
    train(tmp_path / "always", model, 1.0, weight_decay=0.1)
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert len(central(model)) == 4 and not moved & central(model)
    assert {name for name in before if ".experts.w" in name} - central(model) <= moved

    masked, free = tiny_mpoe(), tiny_mpoe()
    train(tmp_path / "masked", masked, 0.5)
    train(tmp_path / "free", free)
    assert any(not torch.equal(weights(masked)[name], weights(free)[name]) for name in central(free))


def test_a_step_folds_once_with_a_balance_term_too(tmp_path, monkeypatch):
    """Also in the pass that counts for it."""
    folds, fold = [], MPOWeight._fold
    monkeypatch.setattr(MPOWeight, "_fold", lambda self, *args: folds.append(self) or fold(self, *args))
    model = tiny_mpoe(load_balance=0.5)
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "gradient_accumulation_steps": 3}
    train(tmp_path, model, split=story(8), shared_fold=True, **settings)
    assert sorted(map(id, folds)) == sorted(id(m) for m in model.modules() if isinstance(m, MPOWeight))


def test_an_interrupted_masked_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    def model():
        return tiny_mpoe(0, dropout=0.2, load_balance=0.1)

    settings = {"gradient_accumulation_steps": 2, "shared_fold": True, "per_device_train_batch_size": 3}
    train(tmp_path / "whole", model(), 0.5, **settings)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, 3)
        train(tmp_path / "stopped", model(), 0.5, **settings)
    with pytest.raises(UserError, match=r"gradient_mask.probability \(it was 0.5 and is 0.75 now\)"):
        train(tmp_path / "stopped", model(), 0.75, **settings)
    train(tmp_path / "stopped", model(), 0.5, **settings)
    assert_same_tensors(saved_weights(tmp_path / "whole/final"), saved_weights(tmp_path / "stopped/final"))


def test_what_does_not_fit_the_model(tmp_path):
    for model in (tiny_gpt2(), tiny_mpoe(experts="copy")):
        message = f"shared_fold: expected False for a model that folds no weights, got a {type(model).__name__}"
        with pytest.raises(UserError, match=message):
            train(tmp_path, model, shared_fold=True)
