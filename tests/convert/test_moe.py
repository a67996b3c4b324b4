"""Dense -> MoE: the mathematics, every head and family, what is carried over, and what is refused."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForPreTraining,
    DistilBertConfig,
    DistilBertModel,
)

from moebert_kernels import models
from moebert_kernels.convert import (
    balanced_hash_table,
    convert_to_moe,
    dense_student,
    expert_indices,
    random_hash_table,
)
from moebert_kernels.errors import UserError
from tests.convert.models import CLASSES, SIZES, D, H, L, V, dense_model, inputs
from tests.golden_arrays import assert_golden
from tests.helpers import assert_same_model

SMALL = {"num_experts": 4, "expert_size": 12, "shared": 8}
AUTO = {
    "cls": AutoModelForSequenceClassification,
    "qa": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
    "tokens": AutoModelForTokenClassification,
}


def outputs(model, batch):
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    names = ("logits", "start_logits", "end_logits", "pooler_output", "last_hidden_state")
    return {name: out[name] for name in names if out.get(name) is not None} | {
        f"hidden_states[{n}]": state for n, state in enumerate(out.hidden_states)
    }


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("name", list(CLASSES))
def test_experts_with_all_neurons_equal_the_dense_model(name, preset):
    dense = dense_model(name).double()
    moe = convert_to_moe(dense, torch.rand(L, D), 3, expert_size=D, shared=D, preset=preset)
    batch = inputs(pad_token_id=dense.config.pad_token_id)
    valid = batch["attention_mask"] != 0
    wanted, got = outputs(dense, batch), outputs(moe, batch)
    assert wanted.keys() == got.keys()
    for key, tensor in wanted.items():
        # skipped padding passes through the experts, so only real tokens are equal there
        real = valid if preset == "default" and tensor.shape[:2] == valid.shape else torch.ones(len(tensor)).bool()
        assert_golden(got[key][real], tensor[real], 1e-12, key)


@pytest.mark.parametrize("name", ["bert", "bert-cls", "roberta-mlm"])
def test_experts_are_the_dense_neurons(name):
    dense, importance = dense_model(name), torch.rand(L, D)
    moe = convert_to_moe(dense, importance, **SMALL)
    indices = expert_indices(importance, **SMALL)
    for layer, (old, new) in enumerate(zip(dense.base_model.encoder.layer, moe.base_model.encoder.layer, strict=True)):
        for e, neurons in enumerate(indices[layer]):
            assert torch.equal(new.experts.w1[e], old.intermediate.dense.weight[neurons])
            assert torch.equal(new.experts.b1[e], old.intermediate.dense.bias[neurons])
            assert torch.equal(new.experts.w2[e], old.output.dense.weight[:, neurons])
            assert torch.equal(new.experts.b2[e], old.output.dense.bias)
            assert torch.equal(new.experts.norm_weight[e], old.output.LayerNorm.weight)
            assert torch.equal(new.experts.norm_bias[e], old.output.LayerNorm.bias)
    old, new = dense.state_dict(), moe.state_dict()
    for key, tensor in new.items():
        if ".experts." not in key and ".router." not in key:
            assert torch.equal(tensor, old[key.replace("moebert.", dense.base_model_prefix + ".")]), key


@pytest.mark.parametrize("router", ["hash-random", "hash-balance", "gate-token", "gate-sentence"])
@pytest.mark.parametrize("name", ["bert-cls", "roberta-qa", "bert-mlm", "xlm-roberta-tokens", "bert"])
def test_saves_and_loads(name, router, tmp_path):
    dense = dense_model(name)
    moe = convert_to_moe(dense, torch.rand(L, D), router=router, token_counts=torch.arange(V), **SMALL)
    moe.save_pretrained(tmp_path)
    auto = AUTO.get(name.split("-")[-1], AutoModel)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(moe)
    batch = inputs(pad_token_id=dense.config.pad_token_id)
    assert_same_model(again, moe, lambda model: outputs(model, batch))


def test_nothing_is_shared_with_the_dense_model():
    dense = dense_model("bert-cls")
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    moe = convert_to_moe(dense, torch.rand(L, D), **SMALL)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())
    experts = moe.moebert.encoder.layer[0].experts
    assert experts.b2[0].data_ptr() != experts.b2[1].data_ptr()


def test_labels_and_settings_are_carried_over():
    names = {0: "bad", 1: "good"}
    dense = dense_model(
        "bert-cls", id2label=names, label2id={"bad": 0, "good": 1}, problem_type="single_label_classification",
        hidden_act="relu", layer_norm_eps=1e-5, hidden_dropout_prob=0.2, classifier_dropout=0.3, pad_token_id=1,
    )  # fmt: skip
    config = convert_to_moe(dense, torch.rand(L, D), **SMALL, load_balance=0.1, expert_dropout=0.4).config
    for name in (
        "id2label", "label2id", "problem_type", "hidden_act", "layer_norm_eps", "hidden_dropout_prob", "vocab_size",
        "classifier_dropout", "pad_token_id", "max_position_embeddings", "intermediate_size", "_attn_implementation",
    ):  # fmt: skip
        assert getattr(config, name) == getattr(dense.config, name), name
    assert (config.num_experts, config.expert_size, config.shared) == (4, 12, 8)
    assert (config.router, config.style) == ("hash-random", "bert")
    assert (config.load_balance, config.expert_dropout) == (0.1, 0.4)
    assert convert_to_moe(dense_model("camembert-cls"), torch.rand(L, D), **SMALL).config.style == "roberta"


def test_dtype_mode_and_missing_pooler_are_carried_over():
    dense = dense_model("bert-cls").to(torch.bfloat16).train()
    moe = convert_to_moe(dense, torch.rand(L, D), **SMALL)
    assert moe.dtype == torch.bfloat16
    assert moe.training
    assert not moe.moebert.encoder.layer[0].router.table.is_floating_point()
    bare = CLASSES["bert"][1](dense.config, add_pooling_layer=False)
    assert convert_to_moe(bare, torch.rand(L, D), **SMALL).pooler is None
    assert dense_student(bare, torch.rand(L, D), 8).pooler is None


def test_what_is_random_depends_on_the_seed_alone():
    dense, importance = dense_model("bert-cls"), torch.rand(L, D)

    def converted(seed, **options):
        torch.manual_seed(int(torch.randint(0, 1000, ())))
        state = torch.get_rng_state()
        model = convert_to_moe(dense, importance, seed=seed, **SMALL | options)
        assert torch.equal(torch.get_rng_state(), state)
        return [layer.router for layer in model.moebert.encoder.layer]

    first, again, other = converted(1), converted(1), converted(2)
    assert all(torch.equal(a.table, b.table) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].table, other[0].table)
    assert not torch.equal(first[0].table, first[1].table)
    assert torch.equal(first[0].table.long(), random_hash_table(V, 4, 1))
    assert torch.equal(first[0].table, converted(1, expert_size=10)[0].table)
    gates = converted(1, router="gate-token"), converted(1, router="gate-token")
    assert all(torch.equal(a.gate.weight, b.gate.weight) for a, b in zip(*gates, strict=True))
    assert gates[0][0].gate.weight.std().item() == pytest.approx(SIZES["initializer_range"], rel=0.3)


def test_without_importance_the_ranking_is_random_and_says_so():
    dense = dense_model("bert-cls")
    with pytest.warns(UserWarning, match="neurons are ranked at random"):
        first = convert_to_moe(dense, seed=3, **SMALL)
    with pytest.warns(UserWarning):
        again = convert_to_moe(dense, seed=3, **SMALL)
    w1, w1_again = (model.moebert.encoder.layer[1].experts.w1 for model in (first, again))
    assert torch.equal(w1, w1_again)


def test_tables_from_counts_and_given_ones():
    dense, importance = dense_model("bert-cls"), torch.rand(L, D)
    counts = torch.randint(0, 9, (V,))
    balanced = convert_to_moe(dense, importance, router="hash-balance", token_counts=counts, **SMALL)
    given = torch.randint(0, 4, (L, V))
    chosen = convert_to_moe(dense, importance, tables=given, **SMALL)
    for layer in range(L):
        assert torch.equal(balanced.moebert.encoder.layer[layer].router.table.long(), balanced_hash_table(counts, 4))
        assert torch.equal(chosen.moebert.encoder.layer[layer].router.table.long(), given[layer])


def test_dense_student_keeps_the_top_neurons():
    dense, importance = dense_model("bert-cls"), torch.rand(L, D)
    student = dense_student(dense, importance, 20)
    assert type(student) is type(dense)
    assert student.config.intermediate_size == 20
    assert student.config.id2label == dense.config.id2label
    assert dense.config.intermediate_size == D
    kept = importance[1].argsort(descending=True)[:20]
    old, new = dense.bert.encoder.layer[1], student.bert.encoder.layer[1]
    assert torch.equal(new.intermediate.dense.weight, old.intermediate.dense.weight[kept])
    assert torch.equal(new.intermediate.dense.bias, old.intermediate.dense.bias[kept])
    assert torch.equal(new.output.dense.weight, old.output.dense.weight[:, kept])
    whole = dense_student(dense, importance, D)
    batch = inputs()
    assert_golden(outputs(whole, batch)["logits"], outputs(dense, batch)["logits"], 1e-6)


def test_without_sizes_experts_are_a_quarter_and_share_two_thirds():
    """As MoEBERT's 768 and 512 of 3,072; a model of any width becomes smaller per token."""
    dense, importance = dense_model("bert-cls"), torch.rand(L, D)
    config = convert_to_moe(dense, importance).config
    assert (config.expert_size, config.shared) == (D // 4, D // 6)
    config = convert_to_moe(dense, importance, expert_size=6).config
    assert (config.expert_size, config.shared) == (6, 4)
    assert convert_to_moe(dense, importance, shared=2).config.expert_size == D // 4
    assert dense_student(dense, importance).config.intermediate_size == D // 4


def test_dense_student_equals_one_expert_with_those_neurons():
    dense, importance = dense_model("roberta-cls"), torch.rand(L, D)
    moe = convert_to_moe(dense, importance, 1, expert_size=20, shared=20)
    batch = inputs(pad_token_id=1)
    got = outputs(dense_student(dense, importance, 20), batch)["logits"]
    assert_golden(got, outputs(moe, batch)["logits"], 1e-6)


def test_rejects_models():
    dense = dense_model("bert-cls")
    moe = convert_to_moe(dense, torch.rand(L, D), **SMALL)
    with pytest.raises(UserError, match="got MoEBertForSequenceClassification, which is a MoE already"):
        convert_to_moe(moe, torch.rand(L, D), **SMALL)
    with pytest.raises(UserError, match=r"model: expected the bare model or one of .*, got BertForPreTraining"):
        convert_to_moe(BertForPreTraining(BertConfig(**SIZES)), torch.rand(L, D), **SMALL)
    other = DistilBertModel(DistilBertConfig(vocab_size=V, dim=H, hidden_dim=D, n_layers=L, n_heads=2))
    with pytest.raises(UserError, match=r"model: expected a BERT-style encoder .*, got DistilBertModel"):
        convert_to_moe(other, torch.rand(L, D), **SMALL)


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"importance": torch.rand(L, D + 1)},
            "importance: expected scores of the model's 2 layers x 48 neurons, got 2 x 49",
        ),
        (
            {"importance": torch.rand(D)},
            "importance: expected scores of the model's 2 layers x 48 neurons, got 48",
        ),
        ({"expert_size": 20}, r"expert_size: expected at most 18 .* got 20"),
        (
            {"router": "hash-balance"},
            r"token_counts: expected counts \(or tables\) with router='hash-balance', got none",
        ),
        (
            {"router": "hash-balance", "token_counts": torch.ones(5)},
            r"token_counts: expected shape \(V=60,\), got \(5,\)",
        ),
        ({"router": "hash"}, "router: expected one of .*, got 'hash'"),
        ({"tables": torch.zeros(7, dtype=torch.long)}, "tables: expected shape .* for a vocabulary of 60, got"),
        ({"router": "gate-token", "tables": [0] * V}, "tables: expected none with router='gate-token'"),
        ({"load_balanse": 0.1}, "load_balanse: expected an option of convert_to_moe or a field of MoEBertConfig"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(UserError, match=message):
        convert_to_moe(dense_model("bert-cls"), **{"importance": torch.rand(L, D), **SMALL} | options)


def test_rejects_width():
    with pytest.raises(UserError, match="width: expected 1 to the dense layer's 48 neurons, got 49"):
        dense_student(dense_model("bert-cls"), torch.rand(L, D), 49)


def test_returns_the_class_of_the_head():
    moe = convert_to_moe(dense_model("roberta-tokens"), torch.rand(L, D), **SMALL)
    assert type(moe) is models.MoEBertForTokenClassification
