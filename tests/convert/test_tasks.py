"""Dense -> task-routed MoE: what it computes before training, its heads, and what is refused."""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from moebert_kernels.convert import convert_to_moe, expert_indices, merge
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers
from tests.convert.families import make, make_inputs
from tests.convert.models import CLASSES, D, L, dense_model, inputs
from tests.helpers import assert_same_model

LABELS = {"mood": ["sad", "happy"], "score": [], "logic": ["yes", "no", "perhaps"]}


def task_moe(dense, tasks, importance=None, seed=0, spread=None, **fields):
    """A converted copy.

    Args:
        spread: of the routers' logits: 0 for equal probabilities; None: as converted.
    """
    options = {"importance": importance, "seed": seed}
    moe = convert_to_moe(copy.deepcopy(dense), MoEConfig.task(tasks, **fields), **options)
    for layer in moe_layers(moe) if spread is not None else ():
        torch.nn.init.normal_(layer.router.logits, std=spread)
    return moe


def real_states(model, batch, **options):
    with torch.no_grad():
        return model.base_model(**batch, **options).last_hidden_state[batch["attention_mask"] != 0]


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 3, "num_experts": 5}, {"norm": "expert"}])
@pytest.mark.parametrize("experts", ["copy", "mpo"])
@pytest.mark.parametrize("name", ["bert", "bert-cls", "roberta-mlm"])
def test_copies_compute_what_the_dense_model_does(name, options, experts):
    if experts == "mpo" and options.get("norm") == "expert":
        with pytest.raises(UserError, match="norm: 'expert' needs experts of their own weights"):
            task_moe(dense_model(name), ["a", "b"], experts=experts, **options)
        return
    dense = dense_model(name).double()
    moe = task_moe(dense, ["a", "b"], experts=experts, spread=0.0, **options)
    batch = inputs(pad_token_id=dense.config.pad_token_id)
    assert isinstance(moe, type(dense))
    for task in range(2):
        torch.testing.assert_close(
            real_states(moe, batch, task_ids=task), real_states(dense, batch), rtol=0, atol=1e-11
        )


def test_mpo_experts_share_their_central_tensors(tmp_path):
    moe = task_moe(
        dense_model("bert"), ["a"], experts="mpo", num_experts=8, w1_factors=[[6, 8], [4, 4]],
        w2_factors=[[4, 4], [6, 8]],
    )  # fmt: skip
    experts = moe_layers(moe)[0].experts
    assert experts.w1.central.shape == (1, 6, 4, 24) and experts.w1.aux[0].shape == (8, 24, 8, 4, 1)
    moe.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    batch = inputs()
    assert_same_model(again, moe, lambda model: real_states(model, batch))


@pytest.mark.parametrize("shared", [0, 8])
def test_split_experts_compute_what_their_neurons_do(shared):
    """With equal probabilities the MoE is the dense model without the neurons of the experts that were not chosen."""
    dense, importance = dense_model("bert").double(), torch.rand(L, D)
    moe = task_moe(dense, ["a"], importance, spread=0.0, expert_size=12, num_shared_neurons=shared)
    indices = expert_indices(importance, 4, 12, shared)
    with torch.no_grad():
        for layer, kept in zip(dense.encoder.layer, indices[:, :2], strict=True):  # equal logits: experts 0 and 1
            lost = torch.ones(D, dtype=torch.bool)
            lost[kept.flatten()] = False
            layer.output.dense.weight[:, lost] = 0
    batch = inputs()
    torch.testing.assert_close(real_states(moe, batch), real_states(dense, batch), rtol=0, atol=1e-11)


def test_by_default_no_neuron_is_lost():
    dense = dense_model("bert-cls")
    with pytest.warns(UserWarning, match="no importance scores given"):
        moe = task_moe(dense, ["a"])
    config = moe.config.quantization_config
    assert (config.expert_size, config.num_shared_neurons, config.top_k, config.norm) == (D // 4, 0, 2, "layer")
    for old, new in zip(dense.bert.encoder.layer, moe_layers(moe), strict=True):
        rows = new.experts.w1.flatten(0, 1).sort(dim=0).values
        assert torch.equal(rows, old.intermediate.dense.weight.sort(dim=0).values)
        assert torch.equal(new.norm.weight, old.output.LayerNorm.weight)


@pytest.mark.parametrize("name", ["bert-cls", "roberta-cls", "camembert-cls"])
def test_a_head_for_each_task(name, tmp_path):
    dense = dense_model(name)
    moe = task_moe(dense, LABELS, experts="copy", seed=3)
    assert isinstance(moe, CLASSES[name][1]) and moe.config.quantization_config.tasks == list(LABELS)
    assert moe.config.id2label == {
        0: "mood: sad", 1: "mood: happy", 2: "score", 3: "logic: yes", 4: "logic: no", 5: "logic: perhaps",
    }  # fmt: skip
    batch = inputs(pad_token_id=dense.config.pad_token_id)
    shapes = [tuple(moe(**batch, task_ids=task).logits.shape) for task in range(3)]
    assert shapes == [(4, 2), (4, 1), (4, 3)]
    if name == "bert-cls":
        assert torch.equal(moe.bert.pooler.dense.weight, dense.bert.pooler.dense.weight)
    else:
        assert torch.equal(moe.classifier.dense.weight, dense.classifier.dense.weight)
    moe.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.quantization_config.task_labels == LABELS and again.config.num_labels == 6
    assert_same_model(again, moe, lambda model: model(**batch, task_ids=2).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_head_without_a_bias_stays_so(family, tmp_path):
    dense = make(family, AutoModelForSequenceClassification, num_labels=2, pad_token_id=0)
    moe, batch = task_moe(dense, LABELS, experts="copy"), make_inputs(family)
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]  # the last one that is not padding counts
    assert moe.score.bias is None
    wanted = moe(**batch, task_ids=2).logits
    assert torch.allclose(merge(moe, "logic")(**batch).logits, wanted, atol=1e-5)
    moe.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.allclose(again(**batch, task_ids=2).logits, wanted, atol=1e-6)
    assert torch.allclose(merge(again, "logic")(**batch).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "bert-qa", "roberta-tokens"])
def test_heads_for_tasks_need_a_classifier_of_sequences(name):
    with pytest.raises(UserError, match="model: expected one for sequence classification, got a "):
        task_moe(dense_model(name), LABELS, experts="copy")


def test_what_is_random_depends_on_the_seed_alone():
    dense = dense_model("bert-cls")
    state = torch.get_rng_state()
    one, two, three = (task_moe(dense, LABELS, experts="copy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for name in ("classifier.weight", "bert.encoder.layer.0.output.router.logits"):
        assert not torch.equal(one.state_dict()[name], three.state_dict()[name])
    assert 0 < moe_layers(one)[0].router.logits.abs().max() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "clone"}, "experts: expected one of split, clustered, copy, mpo, got 'clone'"),
        ({"experts": "copy", "expert_size": 12}, "expert_size: expected none with experts='copy', got 12"),
        ({"experts": "mpo", "max_bond": 1}, "max_bond: expected caps at which building the weight pays, got bonds 1,"),
        ({"experts": "mpo", "w1_factors": [[2, 12], [4, 4]]}, r"w1_factors: expected products \(48, 16\), got \(24, "),
        ({"experts": "copy", "max_bond": 5}, "max_bond: expected none with experts='copy', got 5"),
        ({"experts": "copy", "num_experts": 0}, "num_experts: expected an integer of at least 1, got 0"),
        ({"experts": "copy", "top_k": 5}, "top_k: expected an integer of at most 4, got 5"),
        ({"experts": "copy", "top_k": 0}, "top_k: expected an integer of at least 1, got 0"),
        ({"experts": "copy", "norm": "expert", "top_k": 2}, "top_k: expected an integer of at most 1, got 2"),
        ({"importance": torch.rand(L + 1, D)}, "importance: expected"),
        ({"expert_size": 13, "importance": torch.rand(L, D)}, "expert_size: expected at most 12 for 4 experts"),
    ],
)  # fmt: skip
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        task_moe(dense_model("bert-cls"), LABELS, **options)


def test_refuses_no_tasks_and_what_is_a_moe_already():
    with pytest.raises(UserError, match=r"tasks: expected different names with router='task', got \[\]"):
        task_moe(dense_model("bert"), [], experts="copy")
    moe = task_moe(dense_model("bert"), ["a"], experts="copy")
    with pytest.raises(UserError, match="model: expected a dense model, got BertModel with experts in it"):
        task_moe(moe, ["a"])
