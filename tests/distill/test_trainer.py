"""Training on transformers' Trainer: its terms, windows, teachers, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill import arguments
from moebert_kernels.distill.arguments import MoETrainingArguments
from moebert_kernels.distill.discriminator import AdversaryConfig
from moebert_kernels.distill.embedding import EmbeddingObjective
from moebert_kernels.distill.microbert import TERMS, MicroBertObjective
from moebert_kernels.distill.named_objectives import make_objective
from moebert_kernels.distill.objectives import LayerwiseObjective
from moebert_kernels.distill.trainer import MoETrainer
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from tests.distill.tiny import assert_same_weights, tiny_bert, weights
from tests.distill.tiny_text import tiny_gpt2, tiny_mpoe
from tests.distill.tiny_trainer import mostly_slow, settings, terms_of, text_data, tiny_data, tiny_tokenizer, trainer

GATED = MoEConfig.moebert(router="gate-token", load_balance=0.5)


def gated(seed=0):
    return convert_to_moe(tiny_bert(seed), GATED)


MICROBERT = MicroBertObjective("classification", TERMS, adversary=AdversaryConfig(dropout=0.0, warmup=0.0))
RUNS = {
    "labels": (lambda: tiny_bert(0), lambda: {}),
    "gates, whose balance is of the whole window": (gated, lambda: {}),
    "layerwise": (gated, lambda: {"teacher": tiny_bert(1), "objective": LayerwiseObjective("classification")}),
    "microbert": (
        lambda: tiny_bert(0),
        lambda: {"teacher": tiny_bert(1, hidden=32), "objective": copy.deepcopy(MICROBERT)},
    ),
    "language model, of labels by token": (lambda: tiny_gpt2(0), lambda: {"data": text_data(44)}),
    "folded once": (lambda: tiny_mpoe(load_balance=0.5), lambda: {"data": text_data(44), "shared_fold": True}),
    "masked": (
        lambda: tiny_mpoe(load_balance=0.5),
        lambda: {"data": text_data(44), "gradient_mask": {"probability": 0.5, "seed": 5}},
    ),
}


@pytest.mark.parametrize("name", mostly_slow(RUNS, {"gates, whose balance is of the whole window", "masked"}))
def test_accumulation_equals_the_large_batch(name, tmp_path):
    """4 x 8 sequences are 32 of them, also in the epoch's last window, of 8 and 4.

    With AdamW's usual epsilon a gradient that is zero but for rounding would be a step of the learning rate's size.
    """
    model, options = RUNS[name]
    ended = []
    for size, accumulation in ((32, 1), (8, 4)):
        run = trainer(
            tmp_path, model(), **{"data": tiny_data(44), **options()}, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, adam_epsilon=1e-4,
        )  # fmt: skip
        run.train()
        ended.append((weights(run.model), [entry["loss"] for entry in run.state.log_history if "loss" in entry]))
    (large, losses), (accumulated, others) = ended
    for key, tensor in large.items():
        torch.testing.assert_close(accumulated[key], tensor, rtol=0, atol=1e-6, msg=key)
    assert others == pytest.approx(losses, abs=1e-5)


def test_a_streams_last_window_is_whole_or_left_out(tmp_path):
    """3 batches are an epoch, and 2 a step: the third is in no step, neither of this epoch nor of the next."""

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            norms.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).item())

    norms: list[float] = []
    run = trainer(
        tmp_path, data=tiny_data(12).to_iterable_dataset(), gradient_accumulation_steps=2, max_steps=4,
        learning_rate=0.0, max_grad_norm=0.0, callbacks=[Norms()], logging_steps=1,
    )  # fmt: skip
    run.train()
    assert norms == [pytest.approx(norms[0])] * 4
    assert terms_of(run, "loss") == pytest.approx(terms_of(run, "task"))


def test_a_second_training_logs_its_own_terms(tmp_path):
    run = trainer(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0)
    logged = []
    for _ in range(2):
        run.train()
        logged.append(terms_of(run, "task"))
    assert logged[1] == pytest.approx(logged[0], rel=1e-6)


def test_terms_are_logged_by_name_and_unweighted(tmp_path):
    weighted = {"prediction": 3.0, "hidden": 0.5, "balance": 0.25}
    run = trainer(
        tmp_path, gated(), teacher=tiny_bert(1), objective=LayerwiseObjective("classification"), loss_weights=weighted,
        per_device_train_batch_size=22, num_train_epochs=1, logging_steps=1,
    )  # fmt: skip
    run.train()
    (loss,), values = terms_of(run, "loss"), {name: terms_of(run, name)[0] for name in ("task", *weighted)}
    assert loss == pytest.approx(values["task"] + sum(weight * values[name] for name, weight in weighted.items()))


def test_without_labels_the_teacher_alone_is_followed(tmp_path):
    run = trainer(
        tmp_path, teacher=tiny_bert(1), objective=LayerwiseObjective("classification"), data=tiny_data(labels=False),
        num_train_epochs=8,
    )  # fmt: skip
    run.train()
    assert not terms_of(run, "task") and terms_of(run, "hidden")[-1] < 0.6 * terms_of(run, "hidden")[0]
    judged = run.evaluate(tiny_data(8, seed=9, labels=False))
    assert judged["eval_loss"] < 1.5 * terms_of(run, "loss")[-1]


@pytest.mark.parametrize("dtype", mostly_slow([None, "float16"], {None}))
def test_kept_teacher_outputs_train_as_the_live_teacher(dtype, tmp_path):
    ended = []
    for options in ({}, {"teacher_outputs": str(tmp_path / "kept"), "teacher_outputs_dtype": dtype}):
        run = trainer(
            tmp_path, teacher=tiny_bert(1), objective=LayerwiseObjective("classification", layer_map={2: 2}),
            adam_epsilon=1e-4, **options,
        )  # fmt: skip
        run.train()
        ended.append(run)
    live, kept = ended
    assert terms_of(kept, "loss") == pytest.approx(terms_of(live, "loss"), rel=1e-6 if dtype is None else 1e-3)
    if dtype is None:
        assert_same_weights(kept.model, weights(live.model), tolerance=1e-6)


def test_outputs_are_kept_of_data_with_a_length(tmp_path):
    with pytest.raises(UserError, match=r"teacher_outputs: expected training data as datasets.Dataset, got IterableD"):
        trainer(
            tmp_path, data=tiny_data().to_iterable_dataset(), teacher=tiny_bert(1), max_steps=2,
            objective=LayerwiseObjective("classification"), teacher_outputs=str(tmp_path / "kept"),
        )  # fmt: skip


def test_predictions_are_in_the_order_of_the_rows(tmp_path):
    """transformers' own are in that of its sampler, where it groups by length."""
    data = tiny_data(17, seed=3)
    run = trainer(tmp_path, train_sampling_strategy="group_by_length", per_device_eval_batch_size=4)
    run.compute_metrics = lambda given: {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())}
    run.train()
    found = run.predict(data)
    assert found.label_ids.tolist() == data["labels"]
    with torch.no_grad():
        wanted = [run.model(torch.tensor([row])).logits[0] for row in data["input_ids"]]
    torch.testing.assert_close(torch.from_numpy(found.predictions), torch.stack(wanted))
    assert found.metrics["test_accuracy"] == run.evaluate(data)["eval_accuracy"]


@pytest.mark.parametrize("config", [MoEConfig.moebert(), GATED, MoEConfig.switch(num_experts=2)])
def test_transformers_own_trainer_evaluates_converted_models(config, tmp_path):
    """argmax over the predictions works: a converted model has no output that the dense one does not have."""
    data = tiny_data()
    run = Trainer(
        convert_to_moe(tiny_bert(0), config),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True),
        processing_class=tiny_tokenizer(),
        compute_metrics=lambda given: {"right": (given.predictions.argmax(-1) == given.label_ids).sum()},
    )
    assert isinstance(run.predict(data).predictions, np.ndarray)
    assert 0 <= run.evaluate(data)["eval_right"] <= 22


def test_routers_and_stacked_biases_have_groups_of_their_own(tmp_path):
    run = trainer(tmp_path, gated(), router_learning_rate=1e-4, weight_decay=0.1)
    optimizer = run.create_optimizer()
    named = {id(parameter): name for name, parameter in run.model.named_parameters()}
    groups = [({named[id(p)] for p in group["params"]}, group) for group in optimizer.param_groups]
    decayed = next(names for names, group in groups if group["weight_decay"])
    assert {name.rpartition(".")[2] for name in decayed} == {"weight", "w1", "w2"}
    routers = [(names, group) for names, group in groups if group["lr"] == 1e-4]
    assert routers and all(".router." in name for names, _ in routers for name in names)
    for names, group in routers:
        assert all(group["weight_decay"] == (0.1 if name.endswith(".weight") else 0.0) for name in names)
    assert routers[0][1]["weight_decay"] == 0.1
    assert sum(len(names) for names, _ in groups) == len(named)


def test_tensorboard_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    run = trainer(tmp_path / "run", report_to=["tensorboard"], max_steps=2)
    run.train()
    written = [file for file in tmp_path.rglob("events.out.tfevents.*") if file.stat().st_size]
    assert written
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "train/task" in EventAccumulator(str(written[0])).Reload().Tags()["scalars"]


class Broken(LayerwiseObjective):
    """Adds a term of any value."""

    def __init__(self, value):
        super().__init__("classification")
        self.value = value

    def __call__(self, student_outputs, teacher_outputs, batch):
        return {"broken": self.value * student_outputs.logits.sum()}


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (float("nan"), {}, "broken: expected a finite loss, got nan at or shortly before step 2"),
        (0.0, {}, "broken: expected a loss that contributes, got exactly 0 in all of 12 steps"),
        (float("nan"), {"logging_steps": 100, "save_strategy": "epoch"}, "broken: expected a finite loss, got nan"),
        (float("nan"), {"logging_steps": 100}, "broken: expected a finite loss, got nan"),
    ],
)
def test_a_term_that_breaks_stops_the_run_by_its_name(value, options, message, tmp_path):
    run = trainer(tmp_path, teacher=tiny_bert(1), objective=Broken(value), **options)
    with pytest.raises(UserError, match=message):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_dense_model_of_a_converted_ones_configuration_is_refused(tmp_path):
    """transformers makes one, whose folder could not be loaded."""
    convert_to_moe(tiny_bert(0), MoEConfig.moebert(), importance=torch.rand(2, 32)).save_pretrained(tmp_path / "moe")
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path / "moe"))
    with pytest.raises(UserError, match=r"model: expected experts, as its configuration says, got a dense BertForSeq"):
        trainer(tmp_path, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": LayerwiseObjective("classification")}, "teacher: expected one together with an objective"),
        ({"teacher": tiny_bert(1)}, "objective: expected one together with a teacher"),
        ({"shared_fold": True}, "shared_fold: expected False for a model that folds no weights"),
        ({"loss_weights": {"balance": 0.1}}, "balance: expected the weight 0 for a model without gates"),
        ({"loss_weights": {"task": -1}}, "loss_weights.task: expected a number of at least 0, got -1"),
        ({"gradient_mask": "half"}, "gradient_mask: expected names and values, got 'half'"),
        ({"gradient_mask": {"probability": 0.5}}, "model: expected experts with central tensors"),
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor: expected 0 for a model without labels by token",
        ),
        ({"early_stopping_patience": 2}, "early_stopping_patience: expected None without eval_strategy and metric"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **options)


def test_what_trainer_takes_and_this_one_does_not_is_refused(tmp_path):
    def made(model=None, args=None, **options):
        options |= {"train_dataset": tiny_data(), "processing_class": tiny_tokenizer()}
        return MoETrainer(model or tiny_bert(0), args or settings(tmp_path), **options)

    with pytest.raises(UserError, match="args: expected MoETrainingArguments, got TrainingArguments"):
        made(args=TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(UserError, match="compute_loss_func: expected None"):
        made(compute_loss_func=lambda *given: None)
    optimizer = torch.optim.SGD((model := tiny_bert(0)).parameters(), lr=0.1)
    made(model, optimizers=(optimizer, None)).train()
    with pytest.raises(UserError, match="optimizers: expected none with router_learning_rate"):
        made(args=settings(tmp_path, router_learning_rate=0.1), optimizers=(optimizer, None))
    with pytest.raises(UserError, match="optimizers: expected none with the objective's maps"):
        with_maps = settings(tmp_path, objective="microbert")
        made(args=with_maps, teacher=tiny_bert(1), optimizers=(optimizer, None))
    with pytest.raises(UserError, match="teacher_dropout: expected False with kept outputs"):
        options = {"objective": "layerwise", "teacher_dropout": True, "teacher_outputs": str(tmp_path / "kept")}
        made(args=settings(tmp_path, **options), teacher=tiny_bert(1))
    assert not (tmp_path / "kept").exists()


def test_relations_are_not_recomputed_without_gradients(tmp_path):
    objective = MicroBertObjective("classification", ("soft", "relation"))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(UserError, match="use_reentrant: expected False with the term 'relation'"):
        trainer(tmp_path, teacher=tiny_bert(1), objective=objective, **options)


def test_images_are_trained_on(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
                       patch_size=4, num_labels=3)  # fmt: skip
    with pytest.warns(UserWarning, match="ranked at random"):
        model = convert_to_moe(ViTForImageClassification(config), MoEConfig.moebert(router="gate-token"))
    rows = Dataset.from_dict({"pixel_values": torch.randn(12, 3, 8, 8).tolist(), "labels": [0, 1, 2] * 4})
    args = settings(tmp_path, gradient_accumulation_steps=2, remove_unused_columns=False)
    run = MoETrainer(model, args, train_dataset=rows.with_format("torch"))
    assert run.train().global_step == 4


def test_weights_are_of_terms_that_there_are(tmp_path):
    """Known before the first step, but for an objective that does not name its terms."""
    with pytest.raises(UserError, match="loss_weights: expected names among task, got 'hiden'"):
        trainer(tmp_path, loss_weights={"hiden": 1.0})
    with pytest.raises(UserError, match="loss_weights: expected a loss term with a weight above 0, got none"):
        trainer(tmp_path, loss_weights={"task": 0.0})
    for objective, names in (
        (LayerwiseObjective("classification"), r"hidden, prediction, task, got 'hiden' \(the nearest is 'hidden'\)"),
        (EmbeddingObjective(layer_map={}), "embedding, task, got 'hiden'"),
        (MicroBertObjective("classification", ["soft"]), "soft, task, got 'hiden'"),
    ):
        with pytest.raises(UserError, match=f"loss_weights: expected names among {names}"):
            trainer(tmp_path, loss_weights={"hiden": 1.0}, teacher=tiny_bert(1), objective=objective)
    unnamed = LayerwiseObjective("classification")
    unnamed.terms = None
    run = trainer(tmp_path, loss_weights={"hiden": 1.0}, teacher=tiny_bert(1), objective=unnamed)
    with pytest.raises(UserError, match="loss_weights: expected names among hidden, prediction, task, got 'hiden'"):
        run.train()
    with pytest.raises(UserError, match="router_learning_rate: expected a model with trained routers"):
        trainer(tmp_path, router_learning_rate=0.1).train()


def test_a_teacher_shares_no_weights_with_its_student(tmp_path):
    model = tiny_bert(0)
    with pytest.raises(UserError, match="teacher: expected weights of its own"):
        trainer(tmp_path, model, teacher=model, objective=LayerwiseObjective("classification"))


def test_objectives_by_name_take_what_is_open_from_the_model():
    padded = convert_to_moe(tiny_bert(0), MoEConfig.moebert(route_padding=True))
    made = make_objective("layerwise", {"layer_map": {"1": 2}}, padded)
    assert (made.kind, made.preset, made.layer_map) == ("classification", "paper", {1: 2})
    assert make_objective("layerwise", None, tiny_bert(0, qa=True)).kind == "qa"
    assert make_objective("layerwise", None, tiny_bert(0, num_labels=1)).kind == "regression"
    assert make_objective("tokens", None, tiny_gpt2()).causal
    several, scores = tiny_bert(0), tiny_bert(0)
    several.config.problem_type, scores.config.problem_type = "multi_label_classification", "regression"
    assert make_objective("layerwise", None, scores).kind == "regression"
    options = {"terms": ["soft", "adversarial"], "adversary": {"dropout": 0.2}}
    assert make_objective("microbert", options, tiny_bert(0)).adversary_config.dropout == 0.2
    for name, given, model, message in (
        (
            "layerwise",
            {"layer_mep": 2},
            tiny_bert(0),
            "objective_options: expected names among kind, preset, layer_map,"
            r" got 'layer_mep' \(the nearest is 'layer_map'\)",
        ),
        ("layerwise", {"layer_map": "1"}, tiny_bert(0), "layer_map: expected pairs of layers, got '1'"),
        ("layerwise", None, tiny_gpt2(), "objective: expected a model for sequence classification or question"),
        ("layerwise", None, several, "objective: expected a model with one class or with scores for each sequence"),
        ("distance", None, tiny_bert(0), "objective: expected layerwise, tokens, microbert or embedding"),
    ):
        with pytest.raises(UserError, match=message):
            make_objective(name, given, model)
    with pytest.raises(UserError, match="objective: expected one of layerwise, tokens"):
        MoETrainingArguments("folder", objective="distance")


def test_arguments_name_the_objective(tmp_path):
    run = MoETrainer(
        tiny_bert(0),
        settings(tmp_path, objective="layerwise", objective_options={"layer_map": {"2": 2}}),
        teacher=tiny_bert(1),
        train_dataset=tiny_data(),
        processing_class=tiny_tokenizer(),
    )
    assert run.objective.layer_map == {2: 2}
    assert run.train().global_step == 12


@pytest.mark.parametrize(
    ("device", "options", "pinned"),
    [(None, {}, False), ("cuda", {}, True), ("cuda", {"use_cpu": True}, False), ("mps", {}, False)],
)
def test_batches_are_pinned_where_they_go_to_an_accelerator(device, options, pinned, monkeypatch):
    """Elsewhere torch warns of it; a value that is given stays."""
    monkeypatch.setattr(arguments, "_accelerator", lambda: device)
    assert MoETrainingArguments("run", **options).dataloader_pin_memory is pinned
    assert MoETrainingArguments("run", dataloader_pin_memory=False, **options).dataloader_pin_memory is False


def test_bfloat16_trains_on_a_cpu(monkeypatch):
    """Which transformers refuses unless `use_cpu` is given."""
    monkeypatch.setattr(arguments, "_accelerator", lambda: None)
    assert MoETrainingArguments("run", bf16=True).use_cpu and not MoETrainingArguments("run").use_cpu


def test_weights_of_few_bits_are_warned_of(tmp_path):
    wanted = r"model: \d+ parameters, as bert.+, are trained in torch.bfloat16, which rounds"
    with pytest.warns(UserWarning, match=wanted) as caught:
        MoETrainer(tiny_bert(0).to(torch.bfloat16), settings(tmp_path))
    assert caught[0].filename == __file__
