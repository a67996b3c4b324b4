"""Dense -> MoE: the mathematics for every head of BERT's family, what is random, and what is refused."""

import copy

import pytest
import torch

from moebert_kernels.convert import balanced_hash_table, convert_to_moe, expert_indices, random_hash_table
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers
from tests.convert.families import make
from tests.convert.models import CLASSES, D, H, L, V, dense_model, inputs, labels, moe_model
from tests.golden_arrays import assert_golden

SMALL = {"num_experts": 4, "expert_size": 12, "num_shared_neurons": 8}


def converted(dense, importance=None, seed=0, token_counts=None, tables=None, **fields):
    """A converted copy."""
    importance = torch.rand(L, D) if importance is None else importance
    options = {"importance": importance, "seed": seed, "token_counts": token_counts, "tables": tables}
    return convert_to_moe(copy.deepcopy(dense), MoEConfig(**SMALL | fields), **options)


def outputs(model, batch):
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    names = ("logits", "start_logits", "end_logits", "pooler_output", "last_hidden_state")
    return {name: out[name] for name in names if out.get(name) is not None} | {
        f"hidden_states[{n}]": state for n, state in enumerate(out.hidden_states)
    }


@pytest.mark.parametrize("route_padding", [False, True])
@pytest.mark.parametrize("name", list(CLASSES))
def test_experts_with_all_neurons_equal_the_dense_model(name, route_padding):
    dense = dense_model(name).double()
    moe = converted(dense, num_experts=3, expert_size=D, num_shared_neurons=D, route_padding=route_padding)
    batch = inputs(pad_token_id=dense.config.pad_token_id)
    valid = batch["attention_mask"] != 0
    wanted, got = outputs(dense, batch), outputs(moe, batch)
    assert wanted.keys() == got.keys()
    for key, tensor in wanted.items():
        # skipped padding passes through the experts, so only real tokens are equal there
        real = valid if not route_padding and tensor.shape[:2] == valid.shape else torch.ones(len(tensor)).bool()
        assert_golden(got[key][real], tensor[real], 1e-12, key)


@pytest.mark.parametrize("name", ["bert", "bert-cls", "roberta-mlm"])
def test_experts_are_the_dense_neurons(name):
    dense, importance = dense_model(name), torch.rand(L, D)
    moe = converted(dense, importance)
    indices = expert_indices(importance, *SMALL.values())
    for layer, (old, new) in enumerate(zip(dense.base_model.encoder.layer, moe_layers(moe), strict=True)):
        for e, neurons in enumerate(indices[layer]):
            assert torch.equal(new.experts.w1[e], old.intermediate.dense.weight[neurons])
            assert torch.equal(new.experts.b1[e], old.intermediate.dense.bias[neurons])
            assert torch.equal(new.experts.w2[e], old.output.dense.weight[:, neurons])
            assert torch.equal(new.experts.b2[e], old.output.dense.bias)
            assert torch.equal(new.experts.norm_weight[e], old.output.LayerNorm.weight)
            assert torch.equal(new.experts.norm_bias[e], old.output.LayerNorm.bias)
        assert new.experts.b2[0].data_ptr() != new.experts.b2[1].data_ptr()
    old, new = dense.state_dict(), moe.state_dict()
    for key, tensor in new.items():
        if ".experts." not in key and ".router." not in key:
            assert torch.equal(tensor, old[key]), key


def test_a_copy_of_the_dense_model_is_not_changed():
    dense = dense_model("bert-cls")
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    moe = converted(dense)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())
    assert type(dense) is CLASSES["bert-cls"][1] and not hasattr(dense.config, "quantization_config")


def test_what_was_frozen_and_is_kept_stays_frozen():
    dense = dense_model("bert-cls")
    dense.base_model.requires_grad_(False)
    model = converted(dense, norm="layer")
    layer = moe_layers(model)[0]
    assert not layer.norm.weight.requires_grad and not model.base_model.embeddings.word_embeddings.weight.requires_grad
    assert all(parameter.requires_grad for parameter in layer.experts.parameters())  # new, and to be trained


def test_settings_of_the_dense_layers_are_carried_over():
    dense = dense_model("bert-cls", hidden_act="relu", layer_norm_eps=1e-5, hidden_dropout_prob=0.2)
    for norm in ("expert", "layer"):
        layer = moe_layers(converted(dense, norm=norm))[0]
        assert layer.experts.activation == "relu" and layer.output_dropout == 0.2
        if norm == "expert":
            assert (layer.experts.eps, layer.experts.output_dropout) == (1e-5, 0.2)
        else:
            assert layer.norm.eps == 1e-5
    assert moe_layers(converted(dense, expert_dropout=0.4))[0].experts.output_dropout == 0.4
    assert moe_layers(converted(dense, expert_dropout=0.0))[1].experts.output_dropout == 0.0
    config = converted(dense).config.quantization_config
    assert (config.router, config.norm, config.expert_size, config.num_shared_neurons) == (
        "hash-random", "expert", 12, 8,
    )  # fmt: skip


def test_dtype_mode_and_missing_pooler_are_carried_over():
    dense = dense_model("bert-cls").to(torch.bfloat16).train()
    moe = converted(dense)
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert all(module.training for module in moe.modules())
    assert not moe_layers(moe)[0].router.table.is_floating_point()
    bare = CLASSES["bert"][1](dense.config, add_pooling_layer=False)
    assert converted(bare).pooler is None


def test_what_is_random_depends_on_the_seed_alone():
    dense, importance = dense_model("bert-cls"), torch.rand(L, D)

    def routers(seed, **options):
        torch.manual_seed(int(torch.randint(0, 1000, ())))
        state = torch.get_rng_state()
        model = converted(dense, importance, seed=seed, **options)
        assert torch.equal(torch.get_rng_state(), state)
        return [layer.router for layer in moe_layers(model)]

    first, again, other = routers(1), routers(1), routers(2)
    assert all(torch.equal(a.table, b.table) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].table, other[0].table)
    assert not torch.equal(first[0].table, first[1].table)
    assert torch.equal(first[0].table.long(), random_hash_table(V, 4, 1))
    assert torch.equal(first[0].table, routers(1, expert_size=10)[0].table)
    gates = routers(1, router="gate-token"), routers(1, router="gate-token")
    assert all(torch.equal(a.gate.weight, b.gate.weight) for a, b in zip(*gates, strict=True))
    assert gates[0][0].gate.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_without_importance_the_ranking_is_random_and_says_so():
    weights = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="neurons are ranked at random"):
            model = convert_to_moe(dense_model("bert-cls"), MoEConfig(**SMALL), seed=3)
        weights.append(moe_layers(model)[1].experts.w1)
    assert torch.equal(*weights)


def test_tables_from_counts_and_given_ones():
    dense, counts, given = dense_model("bert-cls"), torch.randint(0, 9, (V,)), torch.randint(0, 4, (L, V))
    balanced = converted(dense, router="hash-balance", token_counts=counts)
    chosen = converted(dense, tables=given)
    for layer in range(L):
        assert torch.equal(moe_layers(balanced)[layer].router.table.long(), balanced_hash_table(counts, 4))
        assert torch.equal(moe_layers(chosen)[layer].router.table.long(), given[layer])


def test_without_sizes_experts_are_a_quarter_and_share_two_thirds():
    """As MoEBERT's 768 and 512 of 3,072; a model of any width becomes smaller per token."""

    def sizes(**fields):
        model = convert_to_moe(dense_model("bert"), MoEConfig.moebert(**fields), importance=torch.rand(L, D))
        return model.config.quantization_config.expert_size, model.config.quantization_config.num_shared_neurons

    assert sizes() == (D // 4, D // 6)
    assert sizes(expert_size=6) == (6, 4)
    assert sizes(num_shared_neurons=2) == (D // 4, 2)


def test_balance_losses_are_in_the_loss_of_every_head():
    """With the weight of the configuration, beside what the head's own loss is."""
    for name in ("bert-cls", "bert-qa", "bert-mlm", "roberta-tokens"):
        batch = inputs(pad_token_id=1)
        batch |= labels(name, batch)
        for router in ("gate-token", "switch"):
            model = moe_model(name, router=router, load_balance=0.5)
            whole = model(**batch)
            model.config.quantization_config.load_balance = 0.0
            task = model(**batch).loss
            assert whole.loss - task > 0.9  # two layers of at least 1 each
            whole.loss.backward()
            assert all(layer.router.gate.weight.grad.any() for layer in moe_layers(model))
            model.config.quantization_config.load_balance = 0.5
            torch.testing.assert_close(model(**batch, return_dict=False)[0], whole.loss)
            assert model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).loss is None


@pytest.mark.parametrize(
    "options,message",
    [
        ({"importance": torch.rand(L, D + 1)}, r"importance: expected shape \(L=2, D=48\), got \(2, 49\)"),
        ({"importance": torch.rand(D)}, r"importance: expected shape \(L=2, D=48\), got \(48,\)"),
        ({"importance": torch.full((L, D), torch.nan)}, "scores: expected finite numbers, got nan or inf"),
        ({"expert_size": 20}, r"expert_size: expected at most 18 .* got 20"),
        ({"expert_size": 49}, "expert_size: expected 1 to the dense layer's 48 neurons, got 49"),
        ({"num_shared_neurons": 13}, "num_shared_neurons: expected 0 to expert_size=12, got 13"),
        ({"router": "hash-balance"}, r"token_counts: expected shape \(V=60,\) with router='hash-balance', got none"),
        (
            {"router": "hash-balance", "token_counts": torch.ones(5)},
            r"token_counts: expected shape \(V=60,\) with router='hash-balance', got \(5,\)",
        ),
        ({"tables": torch.zeros(7, dtype=torch.long)}, "tables: expected shape .* for a vocabulary of 60, got"),
        ({"tables": torch.full((V,), 4)}, "tables: expected experts 0 to 3, got 4 to 4"),
        ({"router": "gate-token", "tables": [0] * V}, "tables: expected none with router='gate-token'"),
    ],
)
def test_rejects(options, message):
    dense = dense_model("bert-cls")
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    fields = {key: value for key, value in options.items() if key in MoEConfig.__dataclass_fields__}
    others = {key: value for key, value in options.items() if key not in fields}
    with pytest.raises(UserError, match=message):
        convert_to_moe(dense, MoEConfig(**SMALL | fields), **{"importance": torch.rand(L, D)} | others)
    state = dense.state_dict()  # nothing of a refused conversion is left in the model
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
    assert not hasattr(dense.config, "quantization_config")


def test_layers_of_other_widths_are_refused():
    dense = dense_model("bert")
    dense.encoder.layer[1].intermediate.dense = torch.nn.Linear(H, 20)
    dense.encoder.layer[1].output.dense = torch.nn.Linear(20, H)
    with pytest.raises(UserError, match=r"model: expected feed-forwards of one width, got \[20, 48\]"):
        convert_to_moe(dense, MoEConfig(**SMALL), importance=torch.rand(L, D))


def test_a_second_weight_of_another_dtype_is_cast_with_a_warning():
    """T5 keeps its second weights in float32, and experts have one dtype, that of the first weight."""
    dense = make("t5").to(torch.bfloat16)
    seconds = [module.float().weight.clone() for name, module in dense.named_modules() if name.endswith(".wo")]
    cast = r"the second weight of encoder.block.0.layer.1.DenseReluDense is cast from torch.float32 to torch.bfloat16"
    with pytest.warns(UserWarning, match=cast):
        convert_to_moe(dense, MoEConfig.switch(num_experts=2))
    for layer, second in zip(moe_layers(dense), seconds, strict=True):
        assert torch.equal(layer.experts.w2, second.to(torch.bfloat16).expand_as(layer.experts.w2))
