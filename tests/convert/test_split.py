"""The split into experts, against the original code's, and the share of the importance that it keeps."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from moebert_kernels.convert import convert_to_moe, default_split, expert_indices, importance_kept, load_importance
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers
from tests.golden_arrays import golden
from tests.helpers import shared_path

FILLED = ["base", "share0", "shareall", "two", "one", "eight"]


@pytest.mark.parametrize("case", [*FILLED, "ragged"])
def test_indices_equal_the_original(case):
    arrays = golden("a_split", f"{case}.")
    _, E, F, S, _ = arrays["params"].tolist()
    assert torch.equal(expert_indices(arrays["scores"], E, F, S), arrays["expert_idx"])


@pytest.mark.parametrize("case", FILLED)
def test_weights_equal_the_original(case):
    """Those of a layer of BERT with the original's dense weights."""
    arrays = golden("a_split", f"{case}.")
    D, E, F, S, H = arrays["params"].tolist()
    sizes = {"hidden_size": H, "intermediate_size": D, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertModel(BertConfig(vocab_size=9, **sizes))
    layer = model.encoder.layer[0]
    for name, theirs in (("intermediate.dense", "1"), ("output.dense", "2"), ("output.LayerNorm", "")):
        module = layer.get_submodule(name)
        names = (f"w{theirs}", f"b{theirs}") if theirs else ("ln_w", "ln_b")
        module.load_state_dict({kind: arrays[f"dense.{n}"] for kind, n in zip(("weight", "bias"), names, strict=True)})
    config = MoEConfig(num_experts=E, expert_size=F, num_shared_neurons=S)
    moe = convert_to_moe(model, config, importance=arrays["scores"][None])
    for name, got in moe_layers(moe)[0].experts.named_parameters():
        theirs = name.replace("norm_weight", "ln_w").replace("norm_bias", "ln_b")
        assert torch.equal(got, arrays[f"expert.{theirs}"])


def test_an_expert_that_cannot_be_filled_says_what_could_be():
    arrays = golden("a_split", "short.")
    D, E, F, S, _ = arrays["params"].tolist()
    with pytest.raises(
        UserError,
        match=rf"expert_size: expected at most 36 .* the dense layer's {D} neurons .*_neurons >= 22\), got {F}",
    ):
        expert_indices(arrays["scores"], E, F, S)
    assert torch.equal(expert_indices(arrays["scores"], E, 36, S), arrays["expert_idx"])
    assert expert_indices(arrays["scores"], E, F, 22).shape == (E, F)


def test_authors_mnli_split():
    path = shared_path("golden/moebert/a_authors_mnli.npz")
    with np.load(path) as arrays:
        rank, wanted = arrays["rank"].astype(np.int64), arrays["expert_idx"].astype(np.int64)
    scores, _ = load_importance(path)
    assert np.array_equal(scores.argsort(descending=True, stable=True).numpy(), rank)
    assert np.array_equal(expert_indices(scores, 4, 768, 512).numpy(), wanted)


def test_layers_are_split_one_by_one():
    scores = torch.rand(3, 50)
    together = expert_indices(scores, 4, 12, 7)
    assert torch.equal(together, torch.stack([expert_indices(row, 4, 12, 7) for row in scores]))


@pytest.mark.parametrize("D,wanted", [(3072, (768, 512)), (1536, (384, 256)), (256, (64, 42)), (4, (1, 0))])
def test_default_split_can_be_filled_by_four_experts(D, wanted):
    assert default_split(D) == wanted
    assert expert_indices(torch.rand(D), 4, *wanted).shape == (4, wanted[0])


def test_experts_share_the_top_and_nothing_else():
    scores = torch.rand(50)
    experts = expert_indices(scores, 4, 12, 7)
    rank = scores.argsort(descending=True)
    assert all(torch.equal(expert[:7], rank[:7]) for expert in experts)
    own = experts[:, 7:].flatten()
    assert sorted(own.tolist()) == sorted(rank[7 : 7 + 20].tolist())


def test_equal_scores_go_by_neuron_number():
    assert expert_indices(torch.zeros(6), 2, 3, 1).tolist() == [[0, 1, 3], [0, 2, 4]]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((torch.rand(2, 3, 4), 1, 1, 0), r"scores: expected shape \(D,\) or \(L, D\), got \(2, 3, 4\)"),
        ((torch.tensor([1.0, float("nan")]), 1, 1, 0), "scores: expected finite numbers"),
        ((torch.rand(8), 0, 4, 0), "num_experts: expected at least 1, got 0"),
        ((torch.rand(8), 2, 9, 0), "expert_size: expected 1 to the dense layer's 8 neurons, got 9"),
        ((torch.rand(8), 2, 4, 5), "num_shared_neurons: expected 0 to expert_size=4, got 5"),
        ((torch.rand(8), 2, 4, -1), "num_shared_neurons: expected 0 to expert_size=4, got -1"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(UserError, match=message):
        expert_indices(*arguments)


def test_importance_kept_is_the_mean_over_the_experts_of_a_layer():
    scores = torch.rand(3, 24)
    kept = importance_kept(scores, 4, 6, 3)
    experts = expert_indices(scores, 4, 6, 3)
    shares = [
        [float(row[neurons].sum() / row.sum()) for neurons in layer] for row, layer in zip(scores, experts, strict=True)
    ]
    by_layer = [sum(layer) / len(layer) for layer in shares]
    assert kept.mean == pytest.approx(sum(by_layer) / 3, rel=1e-6)
    assert kept.least == pytest.approx(min(by_layer), rel=1e-6)
    assert kept.layer == by_layer.index(min(by_layer)) + 1


def test_importance_kept_of_known_scores():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert importance_kept(scores, 1, 2, 2) == (pytest.approx((0.7 + 0.5) / 2), 0.5, 2)
    assert importance_kept(scores, 2, 2, 1) == (pytest.approx((0.65 + 0.5) / 2), 0.5, 2)
    assert str(importance_kept(scores, 1, 2, 2)) == "60.0 % on average, 50.0 % in layer 2, which keeps least"


def test_a_layer_without_importance_is_refused():
    with pytest.raises(UserError, match="importance: expected a sum above 0 in each layer, got one without"):
        importance_kept(torch.zeros(1, 4), 1, 2, 2)
