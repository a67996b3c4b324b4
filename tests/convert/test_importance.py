"""Importance scores: against the original code's, against one backward per sample, and what they leave untouched."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertConfig, BertForSequenceClassification

from moebert_kernels.convert import choose_experts, importance_scores
from moebert_kernels.convert.sample_loss import sample_loss
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from tests.convert.families import make, make_inputs
from tests.convert.models import dense_model, inputs, labels
from tests.golden_arrays import assert_golden, golden

HEADS = ["bert-cls", "bert-qa", "bert-mlm", "bert-tokens", "roberta-cls", "roberta-mlm", "camembert-cls"]


def golden_case(kind):
    arrays = golden(f"d_importance_{kind}")
    weights = {key.removeprefix("param."): array for key, array in arrays.items() if key.startswith("param.")}
    num_labels = weights["classifier.weight"].shape[0]
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=60, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=20, num_labels=num_labels,
        )
    )  # fmt: skip
    model.load_state_dict(weights)
    names = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "type_ids", "labels": "labels"}
    batches = [{name: arrays[f"batch{n}.{key}"] for name, key in names.items()} for n in range(2)]
    return model, batches, arrays


@pytest.mark.parametrize("kind", ["cls3", "reg"])
def test_equals_the_original(kind):
    model, batches, arrays = golden_case(kind)
    for n, batch in enumerate(batches):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        assert_golden(sample_loss(model.eval()(**inputs), batch, model.config), arrays[f"batch{n}.loss"])
    assert_golden(importance_scores(model, batches[:1]), arrays["importance_after_batch0"])
    scores = importance_scores(model, batches)
    assert_golden(scores, arrays["importance_after_batch1"])


@pytest.mark.parametrize("kind", ["cls3", "reg"])
def test_order_of_neurons_equals_the_originals_merge(kind):
    """As if two ranks had scored: their totals after one batch and after two, summed and sorted."""
    model, batches, arrays = golden_case(kind)
    scores = importance_scores(model, batches[:1]) + importance_scores(model, batches)
    ordered, rank = scores.sort(dim=1, descending=True)
    assert_golden(ordered, arrays["merged.importance_sorted"])
    assert torch.equal(rank, arrays["merged.rank"])


def one_backward_per_sample(model, batch):
    """The definition: per-sample weight gradients, batch size 1."""
    ffns = [(*site.first_modules, site.second_module) for site in find_sites(model)]
    totals = torch.zeros(len(ffns), ffns[0][0].out_features, dtype=torch.float64)
    for sample in range(len(batch["input_ids"])):
        one = {name: tensor[sample : sample + 1] for name, tensor in batch.items()}
        outputs = model(one["input_ids"], attention_mask=one["attention_mask"])
        model.zero_grad()
        sample_loss(outputs, one, model.config).sum().backward()
        for layer, (first, second) in enumerate(ffns):
            products = (first.weight * first.weight.grad).sum(1) + (second.weight * second.weight.grad).sum(0)
            totals[layer] += products.detach().abs()
    return totals


@pytest.mark.parametrize("name", HEADS)
def test_equals_one_backward_per_sample(name):
    model = dense_model(name)
    batch = inputs()
    batch |= labels(name, batch)
    got = importance_scores(model.double(), [batch])
    assert_golden(got, one_backward_per_sample(model, batch), 1e-6)


@pytest.mark.parametrize(
    "options", [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"chunk_size_feed_forward": 7}]
)
def test_other_activations_and_chunked_layers(options):
    model = dense_model("bert-cls", **options).double()
    batch = inputs()
    batch |= labels("bert-cls", batch)
    assert_golden(importance_scores(model, [batch]), one_backward_per_sample(model, batch), 1e-6)


@pytest.mark.parametrize("name", ["bert-cls", "bert-qa", "bert-mlm"])
def test_does_not_depend_on_batching(name):
    model = dense_model(name)
    batch = inputs()
    batch |= labels(name, batch)
    single = [{key: tensor[n : n + 1] for key, tensor in batch.items()} for n in range(4)]
    assert_golden(importance_scores(model, single), importance_scores(model, [batch]), 1e-5)


def test_does_not_depend_on_padding():
    model, batch = dense_model("bert-qa"), inputs()
    batch |= labels("bert-qa", batch)
    last = int(batch["attention_mask"][0].sum()) - 1
    batch |= {"start_positions": torch.tensor([1, 1, 1, 1]), "end_positions": torch.tensor([last, 2, 1, 2])}
    wider = {name: torch.nn.functional.pad(t, (0, 4)) if t.ndim == 2 else t for name, t in batch.items()}
    assert_golden(importance_scores(model, [wider]), importance_scores(model, [batch]), 1e-5)


def test_a_causal_model_predicts_the_next_token():
    model = make("gpt2", AutoModelForCausalLM).double()
    batch = {name: tensor[:1] for name, tensor in make_inputs("gpt2").items()}
    labels = batch["input_ids"].clone()
    labels[0, :2] = -100
    with torch.no_grad():
        loss = sample_loss(model(**batch), batch | {"labels": labels}, model.config, causal=True)
        assert torch.allclose(loss, model(**batch, labels=labels).loss.float())
    scores = importance_scores(model, [batch | {"labels": labels}])
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    first, second = (part.weight for part in (model.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_proj))
    products = (first * first.grad).sum(0) + (second * second.grad).sum(1)
    assert_golden(scores[0], products.abs(), 1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoder_reads_the_labels(family):
    """Batches as collators make them: without decoder_input_ids."""
    model = make(family, AutoModelForSeq2SeqLM)
    model.config.decoder_start_token_id = 0
    batch = make_inputs(family)
    batch["labels"] = batch.pop("decoder_input_ids")
    assert importance_scores(model, [batch]).min(1).values.max() > 0
    made = choose_experts(model, [batch] * 12, MoEConfig.chosen(num_experts=2, expert_size=8))
    assert len(made) == len(find_sites(model))


def test_half_precision_models():
    batch = inputs()
    batch |= labels("bert-cls", batch)
    exact = importance_scores(dense_model("bert-cls"), [batch])
    half = importance_scores(dense_model("bert-cls").to(torch.bfloat16), [batch])
    assert_golden(half, exact, 0.1)


def test_multi_label_and_problem_type():
    model = dense_model("bert-cls").double()
    batch = inputs()
    several = batch | {"labels": torch.rand(4, 3).round()}
    assert_golden(importance_scores(model, [several]), one_backward_per_sample(model, several), 1e-6)
    model.config.problem_type = "regression"
    values = batch | {"labels": torch.randn(4, 3)}
    assert_golden(importance_scores(model, [values]), one_backward_per_sample(model, values), 1e-6)


def test_answers_outside_the_sequence_count_nothing():
    model = dense_model("bert-qa")
    batch = inputs()
    outside = torch.full((4,), 99)
    assert importance_scores(model, [batch | {"start_positions": outside, "end_positions": outside}]).sum() == 0


@pytest.mark.parametrize("position", [-1, -100, 0, 2])
def test_a_position_counts_as_transformers_counts_it(position):
    """Its own loss takes a negative one for the first token."""
    model = dense_model("bert-qa").eval()
    batch = {"input_ids": inputs()["input_ids"][:1]}
    batch |= {"start_positions": torch.tensor([position]), "end_positions": torch.tensor([3])}
    with torch.no_grad():
        outputs = model(**batch)
    torch.testing.assert_close(sample_loss(outputs, batch), outputs.loss[None])
    assert importance_scores(model, [batch]).sum() > 0


def test_the_model_is_as_before():
    model = dense_model("bert-cls").train()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = inputs()
    batch |= labels("bert-cls", batch)
    with torch.no_grad():
        importance_scores(model, [batch])
    with pytest.raises(UserError):
        importance_scores(model, [inputs()])
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_interrupted_run_continues():
    model, batches, _ = golden_case("cls3")
    seen = []
    importance_scores(model, batches[:1], on_batch=lambda samples, totals: seen.append((samples, totals.clone())))
    assert seen[0][0] == 4
    assert seen[0][1].dtype == torch.float64
    assert torch.equal(importance_scores(model, batches[1:], start=seen[0][1]), importance_scores(model, batches))


def test_ignores_entries_the_model_does_not_take():
    model, batches, _ = golden_case("cls3")
    more = [batch | {"example_id": torch.arange(4), "text": ["a"] * 4} for batch in batches]
    assert torch.equal(importance_scores(model, more), importance_scores(model, batches))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels: expected integers from 0 to 2, got 0 to 3"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels: expected shape \(B=4,\), got \(3,\)"),
        ({"labels": torch.zeros(4)}, "labels: expected integers from 0 to 2, got torch.float32"),
        ({}, "batches: expected 'labels' in every batch, got attention_mask, input_ids"),
    ],
)
def test_rejects_labels(change, message):
    with pytest.raises(UserError, match=message):
        importance_scores(dense_model("bert-cls"), [inputs() | change])


def test_rejects_models_and_batches():
    with pytest.raises(UserError, match="batches: expected at least one, got none; an iterator"):
        importance_scores(dense_model("bert-cls"), [])
    with pytest.raises(UserError, match="model: expected a task head"):
        importance_scores(dense_model("bert"), [inputs() | {"labels": torch.zeros(4)}])
    with pytest.raises(UserError, match=r"model: expected feed-forward layers of a known shape, found none in Linear"):
        importance_scores(torch.nn.Linear(2, 2), [])
    with pytest.raises(UserError, match=r"start: expected shape \(L=2, D=48\), got \(1, 48\)"):
        importance_scores(dense_model("bert-cls"), [], start=torch.zeros(1, 48))
    broken = dense_model("bert-cls")
    with torch.no_grad():
        broken.classifier.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="model: expected finite gradients, got nan or inf in batch 0"):
        importance_scores(broken, [inputs() | {"labels": torch.zeros(4, dtype=torch.long)}])
