"""`int8_forward`: what it computes is what the prepared model computes, and gradients pass through."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from moebert_kernels.distill.objectives import LayerwiseObjective
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_layers
from moebert_kernels.serve import Int8Callback, int8_forward, prepare
from moebert_kernels.serve.int8_training import rounded_activation, rounded_weight
from moebert_kernels.serve.packed import quantised
from tests.convert.families import make, make_inputs
from tests.distill.tiny_trainer import trainer
from tests.serve.problems import _rounded
from tests.serve.test_prepare import distance, made, run

DTYPES = ("int8", "int8-token", "int8-bfloat16")


@pytest.fixture(autouse=True)
def small_embeddings_too(monkeypatch):
    monkeypatch.setattr("moebert_kernels.serve.preparation.FEWEST_ROWS", 50)


@pytest.mark.parametrize("dtype", DTYPES)
def test_roundings_are_those_of_prepare(dtype):
    x = torch.randn(7, 33, requires_grad=True)
    expected, step = _rounded(x.detach().double(), dtype)
    got = rounded_activation(x, dtype)
    # a number that lies between two steps may fall on either
    assert ((got - expected).abs() <= 1.01 * torch.as_tensor(step)).all() and (got - expected).abs().mean() < 1e-4
    q, scale = quantised(x)
    assert torch.equal(rounded_weight(x), x + (q * scale[:, None] - x))
    for rounded in (got, rounded_weight(x)):
        (gradient,) = torch.autograd.grad(rounded.sin().sum(), x)
        assert torch.allclose(gradient, rounded.cos())
    assert rounded_activation(torch.zeros(0, 3), dtype).shape == (0, 3)
    assert torch.equal(rounded_activation(torch.zeros(2, 3), dtype), torch.zeros(2, 3))


@pytest.mark.parametrize("family, kind", [
    ("bert", "dense"), ("bert", "hash"), ("bert", "gate"), ("bert", "top2"), ("bert", "mpoe"), ("mpnet", "hash"),
    ("modernbert", "hash"), ("gpt2", "dense"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["int8", "int8-token"])
def test_the_forward_is_close_to_the_prepared_one(family, kind, dtype):
    """Closer than the model in floating point is: roundings differ in the scale of experts alone."""
    model, inputs = made(family, kind, wider=1), make_inputs(family)
    plain = run(model, inputs)
    wanted = run(prepare(copy.deepcopy(model), dtype), inputs)
    with int8_forward(model, dtype):
        inside = run(model, inputs)
    assert distance(inside, wanted) < 0.8 * distance(plain, wanted)
    assert torch.equal(run(model, inputs), plain)


def test_gradients_reach_everything_and_are_close():
    model = made("bert", "hash", AutoModelForSequenceClassification)
    inputs = {**make_inputs("bert"), "labels": torch.tensor([0, 1])}

    def gradients():
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, names = gradients(), list(model.state_dict())
    with int8_forward(model):
        inside = gradients()
        assert list(model.state_dict()) == names and type(pickle.loads(pickle.dumps(model))) is type(model)
    assert inside.keys() == plain.keys()
    for name, gradient in inside.items():
        if plain[name].norm() > 1e-6:
            assert nn.functional.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_callback(start, tmp_path):
    model = made("bert", "hash", AutoModelForSequenceClassification)
    data = [{**{k: v[0] for k, v in make_inputs("bert").items()}, "labels": i % 2} for i in range(4)]
    classes = {name: type(module) for name, module in model.named_modules()}
    seen = []

    def look(module, *_):
        seen.append(hasattr(module, "rounded_as"))

    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(look)
    settings = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=data, callbacks=[Int8Callback(start=start)]).train()
    assert seen == [step >= 4 * start for step in range(4)]
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_scores_before_the_roundings_are_not_the_best(tmp_path):
    """Else a score in float32 that int8 never has would choose the weights."""
    model = made("bert", "hash", AutoModelForSequenceClassification)
    data = [{**{k: v[0] for k, v in make_inputs("bert").items()}, "labels": i % 2} for i in range(4)]
    scores = iter([0.9, 0.8, 0.3, 0.2])
    settings = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score",
    )  # fmt: skip
    trainer = Trainer(
        model, settings, train_dataset=data, eval_dataset=data, callbacks=[Int8Callback(start=0.5)],
        compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.3, 3)


def test_a_row_that_no_expert_gets_decides_no_scale():
    model = made("bert", "hash")
    layer = moe_layers(model)[0]
    x, ids = torch.randn(6, 32), torch.tensor([0, 1, -1, 0, 1, 0])
    far = x.clone()
    far[2] *= 1000
    with int8_forward(model):
        one, other = (layer.experts(rows, ids)[ids >= 0] for rows in (x, far))
        none = layer.experts(x[:0], ids[:0])
    assert torch.equal(one, other) and none.shape == (0, 32)


def test_refusals():
    with pytest.raises(UserError, match="dtype: expected one of int8, int8-token, int8-bfloat16, got 'bfloat16'"):
        int8_forward(make("bert"), "bfloat16")
    with pytest.raises(UserError, match="model: expected one that is not prepared"):
        int8_forward(prepare(make("bert")))
    with pytest.raises(UserError, match="model: expected a model of transformers, got Linear"):
        int8_forward(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"start: expected a share of the training in \[0, 1\), got 1"):
        Int8Callback(start=1)
    model = make("gpt2", AutoModelForCausalLM)
    with int8_forward(model), pytest.raises(UserError, match="expected one whose forward is not in int8 yet"):
        int8_forward(model)
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    tiny = make("bert", **small, vocab_size=40, max_position_embeddings=40)
    with pytest.raises(UserError, match="model: expected linear layers or experts that int8 changes, found none"):
        int8_forward(tiny).__enter__()


def test_with_our_trainer_and_a_teacher(tmp_path):
    """The teacher stays in floating point."""
    seen = []
    teacher = make("bert", AutoModelForSequenceClassification, num_labels=3)
    student = made("bert", "hash", AutoModelForSequenceClassification, num_labels=3)
    for model in (teacher, student):
        model.bert.encoder.layer[0].attention.self.query.register_forward_hook(
            lambda module, *_: seen.append((module in set(teacher.modules()), hasattr(module, "rounded_as")))
        )
    objective = LayerwiseObjective("classification")
    trainer(tmp_path, student, teacher=teacher, objective=objective, callbacks=[Int8Callback()], max_steps=2).train()
    assert set(seen) == {(True, False), (False, True)}


def test_a_training_that_fails_gives_the_model_back(tmp_path):
    model = make("bert", AutoModelForSequenceClassification, num_labels=3)
    classes = {name: type(module) for name, module in model.named_modules()}

    class Fails(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    ours = trainer(tmp_path, model, callbacks=[Int8Callback(), Fails()], max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_a_module_in_two_places():
    model = make("t5")
    model.resize_token_embeddings(1100)
    assert model.encoder.embed_tokens is model.shared
    with int8_forward(model):
        assert hasattr(model.shared, "rounded_as")
    assert not any(hasattr(module, "rounded_as") for module in model.modules())
