"""Classifiers of every family that distillation can serve: their states, predictions and relations are followed."""

import copy

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill import LayerwiseObjective
from moebert_kernels.distill.embedding import EmbeddingObjective
from moebert_kernels.distill.microbert import MicroBertObjective
from moebert_kernels.distill.objectives import task_loss
from moebert_kernels.distill.relations import Recorder
from moebert_kernels.distill.teacher import LiveTeacher
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, balance_losses, moe_layers
from tests.convert.families import FAMILIES, IMAGES, TWO_STACKS, make
from tests.distill.tiny import TinyBatches, assert_same_weights, weights
from tests.distill.tiny_trainer import trainer

TEXTS = [family for family in FAMILIES if family not in (*IMAGES, *TWO_STACKS)]
OF_BIASES = "deberta"  # adds biases behind its projection
UNEQUAL = ("phi3", "gpt_neox")  # one projection, in which queries, keys and values are not one behind the other


def classifier(family, **changes):
    options = {"num_labels": 3, "pad_token_id": 0, "initializer_range": 0.3}
    return make(family, AutoModelForSequenceClassification, **options | changes)


def inputs_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def student_of(teacher, router="gate-token"):
    torch.manual_seed(0)
    config = MoEConfig.moebert(router=router, num_experts=2, expert_size=16, num_shared_neurons=8)
    return convert_to_moe(copy.deepcopy(teacher), config, importance=torch.rand(2, 48))


@pytest.mark.parametrize("family", TEXTS)
def test_states_and_predictions_are_followed(family):
    teacher, batch = classifier(family), next(TinyBatches()(0))
    student, guide = student_of(teacher), LiveTeacher(teacher, torch.device("cpu"))
    objective = LayerwiseObjective("classification")
    objective.check(student, guide.info)
    with balance_losses() as losses:
        outputs = student(**inputs_of(batch), output_hidden_states=True)
    assert len(losses) == 2 and len(outputs.hidden_states) == guide.info.num_layers + 1 == 3
    terms = objective(outputs, guide(batch), batch)
    assert all(term.item() > 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all(layer.experts.w1.grad.abs().sum() > 0 for layer in moe_layers(student))
    itself = objective(teacher(**inputs_of(batch), output_hidden_states=True), guide(batch), batch)
    assert all(term.item() < 1e-10 for term in itself.values())


@pytest.mark.parametrize("family", TEXTS)
def test_scores_are_followed(family):
    """DeBERTa's are (B,) with labels, and (B, 1) without them, as a teacher gets its batches."""
    teacher, batch = classifier(family, num_labels=1), next(TinyBatches()(0))
    batch["labels"] = torch.linspace(-1, 1, len(batch["input_ids"]))
    guide = LiveTeacher(teacher, torch.device("cpu"))
    outputs = teacher(**inputs_of(batch), labels=batch["labels"], output_hidden_states=True)
    assert LayerwiseObjective("regression")(outputs, guide(batch), batch)["prediction"].item() < 1e-10
    batch["labelled"] = torch.arange(len(batch["labels"])) > 0
    scores = teacher(**inputs_of(batch)).logits[1:, 0]
    wanted = (scores - batch["labels"][1:]).square().sum() / len(batch["labels"])
    torch.testing.assert_close(task_loss(outputs, batch), wanted)


@pytest.mark.parametrize("family", [family for family in TEXTS if family not in (OF_BIASES, *UNEQUAL)])
def test_relations_are_followed(family):
    teacher, batch = classifier(family), next(TinyBatches()(0))
    student, guide = student_of(teacher, "hash-random"), LiveTeacher(teacher, torch.device("cpu"))
    objective = MicroBertObjective("classification", ("relation",), relation_heads=2)
    objective.check(student, guide.info)
    objective.build(student, guide.info, seed=0)
    guide.record(objective.relation_layer)
    with objective.recording():
        outputs = student(**inputs_of(batch), output_hidden_states=True)
    theirs = guide(batch)
    assert {vectors.shape[:2] for vectors in theirs.relation} == {batch["input_ids"].shape}
    assert objective(outputs, theirs, batch)["relation"].item() > 0
    with objective.recording():
        outputs = teacher(**inputs_of(batch), output_hidden_states=True)
    with pytest.raises(UserError, match="relation: expected queries, keys and values of a forward pass, got none"):
        objective(outputs, theirs, batch)  # of the student, which did not run


@pytest.mark.parametrize("family", [OF_BIASES, *UNEQUAL])
def test_a_family_without_known_projections_is_refused(family):
    with pytest.raises(UserError, match="relation: expected a model with projections to queries, keys and values"):
        Recorder(classifier(family), 1)


def test_relations_of_shared_projections_are_those_of_the_tokens():
    """DeBERTa-v3's project relative positions too, later in the same forward."""
    model = classifier("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True)
    batch = next(TinyBatches()(0))
    with Recorder(model, 1) as recorder, torch.no_grad():
        outputs = model(**inputs_of(batch), output_hidden_states=True)
        queries = recorder.take()[0]
    projection = model.deberta.encoder.layer[0].attention.self.query_proj
    torch.testing.assert_close(queries, projection(outputs.hidden_states[0]))


TWO = "model: expected an encoder or a decoder, whose states can follow others, got both in a BartFor"
NONE = r"teacher: expected hidden states \[0, 1, 2\], got only \[\]"
IMAGE = "teacher: expected a model of texts, got a ViTFor.*, which has no vocabulary"


@pytest.mark.parametrize(
    ("objective", "ours", "theirs", "message"),
    [
        (LayerwiseObjective("classification"), "bart", "bart", TWO),
        (LayerwiseObjective("classification"), "bart", "bert", TWO),
        (LayerwiseObjective("classification"), "bert", "bart", NONE),
        (MicroBertObjective("classification", ("soft",)), "bart", "bart", TWO),
        (EmbeddingObjective(layer_map={}), "bart", "bart", TWO),
        (EmbeddingObjective(), "vit", "vit", IMAGE),
        (EmbeddingObjective(), "vit", "bert", "vocab_size: expected the teacher's 100, got None"),
    ],
)
def test_what_no_objective_can_follow_is_refused_before_training(objective, ours, theirs, message, tmp_path):
    auto = {"vit": AutoModelForImageClassification}
    student, teacher = (make(name, auto.get(name, AutoModelForSequenceClassification)) for name in (ours, theirs))
    for kept in (None, str(tmp_path / "kept")):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, student, teacher=teacher, objective=objective, teacher_outputs=kept)


@pytest.mark.parametrize("family", ["distilbert", "modernbert"])
def test_a_student_is_trained(family, tmp_path):
    teacher = classifier(family)
    student = student_of(teacher)
    settings = {"num_train_epochs": 4, "logging_steps": 6, "loss_weights": {"task": 0.0}}
    run = trainer(tmp_path, student, teacher=teacher, objective=LayerwiseObjective("classification"), **settings)
    run.train()
    first, *_, last = (entry for entry in run.state.log_history if "loss" in entry)
    assert last["hidden"] < first["hidden"] and last["balance"] >= 1
    run.save_model(tmp_path / "out")
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), weights(student))
