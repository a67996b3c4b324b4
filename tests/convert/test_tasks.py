"""Dense -> task-routed MoE: what it computes before training, its heads, and what is refused."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from moebert_kernels import models
from moebert_kernels.convert import convert_to_moe, convert_to_task_moe, expert_indices
from moebert_kernels.errors import UserError
from tests.convert.models import D, L, dense_model, inputs
from tests.helpers import assert_same_model

LABELS = {"mood": ["sad", "happy"], "score": [], "logic": ["yes", "no", "perhaps"]}


def real_states(model, batch, **options):
    with torch.no_grad():
        return model.base_model(**batch, **options).last_hidden_state[batch["attention_mask"] != 0]


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 3, "num_experts": 5}, {"norm": "expert"}])
@pytest.mark.parametrize("experts", ["copy", "mpo"])
@pytest.mark.parametrize("name", ["bert", "bert-cls", "roberta-mlm"])
def test_copies_compute_what_the_dense_model_does(name, options, experts):
    dense = dense_model(name).double()
    moe = convert_to_task_moe(dense, ["a", "b"], experts=experts, router_noise=0.0, **options)
    batch = inputs(pad_token_id=dense.config.pad_token_id)
    assert type(moe).__name__.replace("MoEBert", "") == type(dense).__name__.replace("Roberta", "").replace("Bert", "")
    for task in range(2):
        torch.testing.assert_close(
            real_states(moe, batch, task_ids=task), real_states(dense, batch), rtol=0, atol=1e-11
        )


def test_mpo_experts_share_their_central_tensors(tmp_path):
    dense = dense_model("bert")
    moe = convert_to_task_moe(
        dense, ["a"], experts="mpo", num_experts=8, w1_factors=[[6, 8], [4, 4]], w2_factors=[[4, 4], [6, 8]]
    )
    experts = moe.encoder.layer[0].experts
    assert experts.w1.central.shape == (1, 6, 4, 24) and experts.w1.aux[0].shape == (8, 24, 8, 4, 1)
    moe.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    batch = inputs()
    assert_same_model(again, moe, lambda model: real_states(model, batch))
    with pytest.raises(UserError, match=r"aux.0: expected shape \(8, 24, 6, 4, 1\), got \(8, 24, 8, 4, 1\) in "):
        AutoModel.from_pretrained(tmp_path, w1_factors=[[8, 6], [4, 4]])


@pytest.mark.parametrize("shared", [0, 8])
def test_split_experts_compute_what_their_neurons_do(shared):
    """With equal probabilities the MoE is the dense model without the neurons of the experts that were not chosen."""
    dense, importance = dense_model("bert").double(), torch.rand(L, D)
    moe = convert_to_task_moe(dense, ["a"], importance=importance, expert_size=12, shared=shared, router_noise=0.0)
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
        moe = convert_to_task_moe(dense, ["a"])
    assert (moe.config.expert_size, moe.config.top_k, moe.config.norm) == (D // 4, 2, "layer")
    for old, new in zip(dense.bert.encoder.layer, moe.moebert.encoder.layer, strict=True):
        rows = new.experts.w1.flatten(0, 1).sort(dim=0).values
        assert torch.equal(rows, old.intermediate.dense.weight.sort(dim=0).values)
        assert torch.equal(new.experts.norm_weight, old.output.LayerNorm.weight)


@pytest.mark.parametrize("name", ["bert", "bert-cls", "bert-mlm", "roberta", "roberta-cls"])
def test_a_head_for_each_task(name, tmp_path):
    dense = dense_model(name)
    moe = convert_to_task_moe(dense, LABELS, experts="copy", seed=3)
    assert type(moe) is models.MoEBertForMultiTaskClassification and moe.config.tasks == list(LABELS)
    batch = inputs(pad_token_id=dense.config.pad_token_id)
    shapes = [tuple(moe(**batch, task_ids=task).logits.shape) for task in range(3)]
    assert shapes == [(4, 2), (4, 1), (4, 3)]
    if name == "roberta-cls":
        assert torch.equal(moe.classifier.dense.weight, dense.classifier.dense.weight)
    if name in ("bert", "bert-cls"):
        assert torch.equal(moe.moebert.pooler.dense.weight, dense.base_model.pooler.dense.weight)
    moe.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_model(again, moe, lambda model: model(**batch, task_ids=2).logits)


def test_what_is_random_depends_on_the_seed_alone():
    dense = dense_model("bert")
    state = torch.get_rng_state()
    one, two, three = (convert_to_task_moe(dense, LABELS, experts="copy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for name in ("classifier.weight", "moebert.encoder.layer.0.router.logits"):
        assert not torch.equal(one.state_dict()[name], three.state_dict()[name])
    logits = one.moebert.encoder.layer[0].router.logits
    assert 0 < logits.abs().max() < 0.1


def test_the_dense_model_is_not_changed():
    dense = dense_model("bert-cls")
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    moe = convert_to_task_moe(dense, LABELS, experts="copy")
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "clone"}, "experts: expected one of importance, copy, mpo, got 'clone'"),
        (
            {"experts": "copy", "expert_size": 12},
            "expert_size: expected none, or the dense layer's 48 neurons, with experts='copy', got 12",
        ),
        ({"experts": "mpo", "max_bond": 1}, "max_bond: expected caps at which building the weight pays, got bonds 1,"),
        ({"experts": "mpo", "w1_factors": [[2, 12], [4, 4]]}, "row_factors: expected a product of 48, got 2 x 12"),
        ({"experts": "copy", "max_bond": 5}, "max_bond: expected none with experts='copy', got 5"),
        ({"experts": "copy", "num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"experts": "copy", "top_k": 5}, "top_k: expected at most 4 with num_experts=4 and norm='layer', got 5"),
        ({"experts": "copy", "norm": "expert", "top_k": 2}, "top_k: expected at most 1 with num_experts=4 and"),
        ({"importance": torch.rand(L + 1, D)}, "importance: expected"),
        ({"expert_size": 13, "importance": torch.rand(L, D)}, "expert_size: expected at most 12 for 4 experts"),
        ({"experts": "copy", "router_noise": -1.0}, "router_noise: expected a number of at least 0, got -1.0"),
        ({"experts": "copy", "expert_sizes": 3}, "expert_sizes: expected an option of convert_to_moe or a field"),
    ],
)  # fmt: skip
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        convert_to_task_moe(dense_model("bert"), LABELS, **options)


def test_refuses_no_tasks_and_what_is_a_moe_already():
    with pytest.raises(UserError, match=r"tasks: expected different names with router='task', got \[\]"):
        convert_to_task_moe(dense_model("bert"), [], experts="copy")
    moe = convert_to_task_moe(dense_model("bert"), ["a"], experts="copy")
    with pytest.raises(UserError, match="model: expected a dense encoder, got MoEBertModel, which is a MoE already"):
        convert_to_task_moe(moe, ["a"])
    with pytest.raises(
        UserError, match="router: expected one by tokens or gates, got 'task', which convert_to_task_moe makes"
    ):
        convert_to_moe(dense_model("bert"), torch.rand(L, D), router="task", expert_size=12, shared=8)
