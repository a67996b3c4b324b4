"""Models with MPOE's experts in use: training, generation, checkpoints, folded weights."""

import copy
import json
import pickle

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from moebert_kernels.convert import convert_to_moe, to_dense_experts
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, balance_losses, moe_layers, summed_losses
from moebert_kernels.nn import GradientMask, fold, shared_fold, unfold
from tests.convert import mpoe_models as tiny
from tests.helpers import assert_same_model, checkpoint_activations
from tests.nn.mpo import counted_folds


@pytest.fixture
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def moe(name="gpt2", **fields):
    return convert_to_moe(tiny.dense(name), MoEConfig.mpoe(num_experts=3, **fields), num_sites=3, noise=0.1)


def labelled(name):
    batch = tiny.inputs(name)
    if tiny.is_seq2seq(name):
        return batch | {"labels": batch.pop("decoder_input_ids")}
    return batch | {"labels": batch["input_ids"]}


def balance_of(model, batch):
    with balance_losses() as losses:
        model(**batch)
    return summed_losses(losses)


@pytest.mark.parametrize("name", ["t5", "t5-tokens", "gpt2", "bert", "roberta"])
def test_saved_and_loaded_by_the_auto_classes(name, tmp_path):
    model = moe(name)
    model.save_pretrained(tmp_path)
    auto = {
        "t5": tf.AutoModelForSeq2SeqLM,
        "t5-tokens": tf.AutoModelForTokenClassification,
        "gpt2": tf.AutoModelForCausalLM,
        "bert": tf.AutoModelForMaskedLM,
        "roberta": tf.AutoModelForSequenceClassification,
    }[name]
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    batch = tiny.inputs(name)
    assert_same_model(loaded, model, lambda model: tiny.outputs(model, name, batch))
    keys = [key for key in load_file(tmp_path / "model.safetensors") if "central" in key]
    assert len(keys) == len(set(keys)) == 2 * len(moe_layers(model))
    assert loaded.config.quantization_config.num_experts == 3


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_balance_loss_is_in_the_loss(name):
    model, batch = moe(name).train(), labelled(name)
    config = model.config.quantization_config
    losses = []
    for weight in (0.01, 0.5):
        config.load_balance = weight
        torch.manual_seed(0)
        losses.append(model(**batch).loss)
    torch.manual_seed(0)
    torch.testing.assert_close(losses[1] - losses[0], 0.49 * balance_of(model, batch))
    gate = moe_layers(model)[0].router.gate.weight
    gradients = []
    for weight in (0.0, 10.0):
        config.load_balance = weight
        gradients.append(torch.autograd.grad(model(**batch).loss, gate)[0])
    assert gradients[0].any() and not torch.allclose(*gradients)
    in_eval = model.eval()(**batch, return_dict=False)
    assert isinstance(in_eval, tuple) and torch.equal(in_eval[0], model(**batch).loss)


def test_padding_is_not_routed_unless_asked():
    batch = tiny.inputs("bert")
    model = moe("bert")
    padding = batch["attention_mask"] == 0
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, 7)}
    assert torch.equal(balance_of(model, other), balance_of(model, batch))
    assert not torch.equal(balance_of(moe("bert", route_padding=True), other), balance_of(model, batch))
    skipping, routing = (
        moe("bert", router="hash-random", route_padding=route)(**batch).logits for route in (False, True)
    )
    torch.testing.assert_close(routing[~padding], skipping[~padding])
    assert not torch.allclose(routing[padding], skipping[padding])


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_generation_with_a_cache_folds_nothing(name):
    model, batch = moe(name), tiny.inputs(name)
    batch.pop("decoder_input_ids", None)
    options = {"min_new_tokens": 50, "max_new_tokens": 50, "do_sample": False}
    batch = {key: value.flip(1) for key, value in batch.items()}  # padding on the left
    fold(model)
    with counted_folds() as folds:
        tokens = model.generate(**batch, **options)
    assert folds.call_count == 0 and tokens.shape[1] >= 50
    unfold(model)
    with counted_folds() as folds:
        assert torch.equal(model.generate(**batch, **options), tokens)
    assert folds.call_count == 2 * len(moe_layers(model))  # the first forward folds, and keeps
    without_cache = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(without_cache, tokens)
    fold(model, hot_experts=1)
    assert torch.equal(model.generate(**batch, **options), tokens)
    assert torch.equal(to_dense_experts(model).generate(**batch, **options), tokens)


@pytest.mark.parametrize("router", ["switch", "hash-random"])
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_folds_once_per_forward_and_once_per_shared_step(name, router):
    model, batch = moe(name, router=router).train(), labelled(name)
    layers = len(moe_layers(model))
    grads = []
    for shared in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        with counted_folds() as folds, shared_fold(model) if shared else torch.enable_grad():
            for _ in range(3):
                model(**batch).loss.backward()
        assert folds.call_count == 2 * layers * (1 if shared else 3)
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("central" in key for key in grads[0])
    for key, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][key], wanted, msg=key)


def test_gradient_mask_reaches_all_layers():
    model, batch = moe("t5").train(), labelled("t5")
    with GradientMask(model, 1.0).step(0):
        model(**batch).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == key.endswith(".central"), key


def test_copies_are_apart_and_embeddings_stay_tied():
    model = moe("t5")
    twin, batch = copy.deepcopy(model), tiny.inputs("t5")
    with torch.no_grad():
        for layer in moe_layers(twin):
            layer.experts.w1.central.zero_()
    assert not torch.equal(tiny.outputs(twin, "t5", batch), tiny.outputs(model, "t5", batch))
    assert model.lm_head.weight is model.shared.weight is model.decoder.embed_tokens.weight


def test_a_trained_model_can_be_copied_and_called_without_gradients():
    model, batch = moe("t5").train(), labelled("t5")
    model(**batch).loss.backward()
    checkpoint_activations(model)
    model(**batch).loss.backward()
    copy.deepcopy(model)
    with torch.no_grad():  # as dropout is sampled at inference
        assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("size", [tiny.V + 7, tiny.V - 7])
def test_tables_follow_the_vocabulary_of_the_encoder_inside(size, again, tmp_path):
    model = again(moe("roberta", router="hash-random"))
    tables = [layer.router.table.clone() for layer in moe_layers(model)]
    model.roberta.resize_token_embeddings(size)
    for layer, table in zip(moe_layers(model), tables, strict=True):
        assert layer.router.vocab_size == size and int(layer.router.table.max()) < 4
        kept = min(size, tiny.V)
        assert torch.equal(layer.router.table[:kept], table[:kept])
    model.save_pretrained(tmp_path)
    ids = torch.randint(2, size, (2, 9))
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_model(loaded, model, lambda model: model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["switch", "hash-random"])
def test_compiles_without_graph_breaks(router, fresh_dynamo):
    model, batch = moe("bert", router=router), labelled("bert")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(**batch)  # with the balance loss in its loss
        output.loss.backward()
        gradients.append([output.logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(gradients[1], gradients[0])
    fold(model)
    with torch.no_grad(), counted_folds() as folds:
        torch.testing.assert_close(compiled(**batch).logits, gradients[0][0])
    assert folds.call_count == 0


def test_an_incomplete_or_foreign_checkpoint_is_one_clear_error(tmp_path):
    moe("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, load = load_file(file), tf.AutoModelForCausalLM.from_pretrained
    key = "transformer.h.1.mlp.experts.w2.aux.1"
    save_file({name: tensor for name, tensor in whole.items() if name != key}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"checkpoint: expected a tensor {key}, got none"):
        load(tmp_path)
    with pytest.raises(UserError, match=f"checkpoint: expected a tensor {key}, got none"):
        places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
        load(tmp_path, device_map=places | {"transformer.h": "disk"}, offload_folder=tmp_path / "parts")
    central = "transformer.h.0.mlp.experts.w1.central"
    save_file(whole | {central: whole[central][:-1]}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{central}: expected shape \(8, 4, 4, 8\), got \(7, 4, 4, 8\)"):
        load(tmp_path)
    save_file(whole | {central: whole[central].int()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{central}: expected floating-point numbers, got I32"):
        load(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="checkpoint: expected a whole safetensors file, got a damaged "):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"w1_factors": 5}, "w1_factors: expected row and column factors .* got 5"),
        ({"w1_factors": None}, r"w1_factors: expected row and column factors \(see plan_factors\), .* got None"),
        ({"w2_factors": [[2, 2], [3, 3]]}, r"w2_factors: expected products \(16, 64\), got \(4, 9\)"),
        ({"format_version": 2}, "format_version: expected 1, got 2"),
        ({"expert_bias": "none"}, "expert_bias: expected one of expert, common, got 'none'"),
        ({"load_balance": "x"}, "load_balance: expected a number of at least 0, got 'x'"),
        ({"load_balance": -1.0}, "load_balance: expected a number of at least 0, got -1.0"),
        ({"num_experts": True}, "num_experts: expected an integer of at least 1, got True"),
        ({"router_options": None}, "router_options: expected names and values, got None"),
        ({"route_padding": "no"}, "route_padding: expected true or false, got 'no'"),
        ({"num_experts": 1, "router": "top2"}, "num_experts: expected at least 2"),
        ({"warmth": 1}, "warmth: expected a field of MoEConfig"),
        ({"num_experts": 4}, r"experts.b1: expected shape \(4, 64\), got \(3, 64\)"),
    ],
)
def test_configurations_of_which_no_model_can_be_loaded(changes, message, tmp_path):
    moe().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)
