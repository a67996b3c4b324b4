import copy
import pickle

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from moebert_kernels import models
from moebert_kernels.convert import convert_to_mpoe, to_dense_experts
from moebert_kernels.errors import UserError
from moebert_kernels.models.mpoe_layers import slots
from moebert_kernels.models.outputs import MPOE_OUTPUTS
from moebert_kernels.nn import GradientMask
from tests.convert import mpoe_models as tiny
from tests.helpers import assert_same_model, checkpoint_activations
from tests.nn.mpo import counted_folds

T5_BASE = dict(d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12, vocab_size=32128)
FACTORS = {
    "w1_factors": [[4, 4, 8, 6, 4], [3, 4, 4, 4, 4]],
    "w2_factors": [[3, 4, 4, 4, 4], [4, 4, 8, 6, 4]],
}


@pytest.fixture
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def moe(name="gpt2", **options):
    return convert_to_mpoe(tiny.dense(name), 3, **({"sites": 3, "noise": 0.1} | options))


def labelled(name):
    batch = tiny.inputs(name)
    if tiny.is_seq2seq(name):
        return batch | {"labels": batch.pop("decoder_input_ids")}
    return batch | {"labels": batch["input_ids"]}


@pytest.mark.parametrize("num_experts, mpo, switch", [(4, 258.4, 562.7), (8, 294.0, 1015.8), (16, 365.1, 1921.9)])
def test_parameters_of_the_t5_base_shape(num_experts, mpo, switch):
    counts = []
    for options in (FACTORS, {"experts": "dense"}):
        config = models.MPOET5Config(num_experts=num_experts, **options, **T5_BASE)
        with torch.device("meta"):
            model = models.MPOE_CLASSES["MPOET5ForConditionalGeneration"](config)
        counts.append(round(model.num_parameters() / 1e6, 1))
    assert counts == [mpo, switch]


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
    assert len(keys) == len(set(keys)) == 2 * len(list(slots(model)))
    assert tf.AutoConfig.from_pretrained(tmp_path).num_experts == 3


def test_new_models_start_with_random_experts_of_the_usual_size():
    config = moe().config
    fresh = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        weights = next(slots(fresh)).module.experts.w1()
    assert weights.std().item() == pytest.approx(config.initializer_range, rel=0.3)
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_balance_loss_is_in_the_loss(name):
    model, batch = moe(name).train(), labelled(name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    torch.manual_seed(0)
    output = model(**batch)
    model.config.load_balance = 0.5
    torch.manual_seed(0)
    heavier = model(**batch)
    torch.testing.assert_close(heavier.loss - output.loss, 0.49 * output.balance_loss[0])
    gate = next(slots(model)).module.router.gate.weight
    model.config.load_balance = 0.0
    task = torch.autograd.grad(model(**batch).loss, gate)[0]
    model.config.load_balance = 10.0
    both = torch.autograd.grad(model(**batch).loss, gate)[0]
    assert task.any() and not torch.allclose(task, both)
    in_eval = model.eval()(**batch, return_dict=False)
    assert isinstance(in_eval, tuple) and torch.equal(in_eval[0], model(**batch).loss)


def test_padding_is_not_routed_unless_asked():
    batch = tiny.inputs("bert")
    model = moe("bert")
    padding = batch["attention_mask"] == 0
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, 7)}
    assert torch.equal(model(**other).balance_loss, model(**batch).balance_loss)
    assert not torch.equal(moe("bert", route_padding=True)(**other).balance_loss, model(**batch).balance_loss)
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
    model.fold()
    with counted_folds() as folds:
        tokens = model.generate(**batch, **options)
    assert folds.call_count == 0 and tokens.shape[1] >= 50
    model.unfold()
    with counted_folds() as folds:
        assert torch.equal(model.generate(**batch, **options), tokens)
    assert folds.call_count == 2 * len(list(slots(model)))  # the first forward folds, and keeps
    without_cache = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(without_cache, tokens)
    model.fold(hot_experts=1)
    assert torch.equal(model.generate(**batch, **options), tokens)
    assert torch.equal(to_dense_experts(model).generate(**batch, **options), tokens)


@pytest.mark.parametrize("router", ["switch", "hash-random"])
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_folds_once_per_forward_and_once_per_shared_step(name, router):
    model, batch = moe(name, router=router).train(), labelled(name)
    layers = len(list(slots(model)))
    grads = []
    for shared in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        with counted_folds() as folds, model.shared_fold() if shared else torch.enable_grad():
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


@pytest.mark.parametrize("router", ["switch", "hash-random"])
def test_gradient_checkpointing_changes_nothing(router):
    model, batch = moe("t5", router=router).train(), labelled("t5")
    grads = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        output = model(**batch)
        output.loss.backward()
        grads.append([output.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for again in grads[1:]:
        torch.testing.assert_close(again, grads[0])


def test_copies_are_apart_and_embeddings_stay_tied():
    model = moe("t5")
    twin, batch = copy.deepcopy(model), tiny.inputs("t5")
    with torch.no_grad():
        for slot in slots(twin):
            slot.module.experts.w1.central.zero_()
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


def test_settings_for_generation_are_carried_over_and_back():
    dense = tiny.dense("t5")
    dense.generation_config.num_beams, dense.generation_config.decoder_start_token_id = 3, 5
    model = convert_to_mpoe(dense, 2, sites=3)
    for converted in (model, to_dense_experts(model)):
        assert converted.generation_config.to_dict() == dense.generation_config.to_dict()
    assert model.generation_config is not dense.generation_config


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("size", [tiny.V + 7, tiny.V - 7])
def test_tables_follow_the_vocabulary_of_the_encoder_inside(size, again, tmp_path):
    model = again(moe("roberta", router="hash-random"))
    tables = [slot.module.router.table.clone() for slot in slots(model)]
    model.roberta.resize_token_embeddings(size)
    for slot, table in zip(slots(model), tables, strict=True):
        slot.module.router.validate(size)
        kept = min(size, tiny.V)
        assert torch.equal(slot.module.router.table[:kept], table[:kept])
    model.save_pretrained(tmp_path)
    ids = torch.randint(2, size, (2, 9))
    assert_same_model(type(model).from_pretrained(tmp_path), model, lambda model: model(ids).logits)


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert"])
def test_models_and_outputs_can_be_pickled(name):
    model, batch = moe(name), tiny.inputs(name)
    with torch.no_grad():
        output = model(**batch)
        again, loaded = pickle.loads(pickle.dumps((model, output)))
        assert type(again) is type(model) and type(loaded) is type(output)
        assert torch.equal(loaded[0], output[0]) and torch.equal(loaded.balance_loss, output.balance_loss)
        assert torch.equal(again(**batch)[0], output[0])
    made = (*models.MPOE_CLASSES.values(), *MPOE_OUTPUTS.values())
    assert all(pickle.loads(pickle.dumps(cls)) is cls for cls in made)


def test_hash_tables_follow_the_vocabulary():
    model = moe("gpt2", router="hash-random")
    model.resize_token_embeddings(tiny.V + 5)
    assert {slot.module.router.vocab_size for slot in slots(model)} == {tiny.V + 5}
    model(input_ids=torch.full((1, 3), tiny.V + 4))


@pytest.mark.slow
@pytest.mark.parametrize("router", ["switch", "hash-random"])
def test_compiles_without_graph_breaks(router, fresh_dynamo):
    model, batch = moe("gpt2", router=router), tiny.inputs("gpt2")
    del model.transformer.h[1:]  # compiling takes its time
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = model(**batch).logits.detach()
    if router == "switch":
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(**batch)
            (output.logits.square().mean() + output.balance_loss.mean()).backward()
            gradients.append([output.logits, *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(gradients[1], gradients[0])
    model.fold()
    with torch.no_grad(), counted_folds() as folds:
        torch.testing.assert_close(compiled(**batch).logits, logits)
    assert folds.call_count == 0


def test_an_incomplete_or_foreign_checkpoint_is_one_clear_error(tmp_path):
    model = moe("gpt2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    key = "transformer.h.1.mlp.experts.w2.aux.1"
    save_file({name: tensor for name, tensor in whole.items() if name != key}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"checkpoint: expected a tensor {key}, got none in"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    central = "transformer.h.0.mlp.experts.w1.central"
    save_file(whole | {central: whole[central][:-1]}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{central}: expected shape \(8, 4, 4, 8\), got \(7, 4, 4, 8\) in "):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="checkpoint: expected a folder with"):
        type(model).from_pretrained(tmp_path / "missing")
    tiny.dense("gpt2").save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="checkpoint: expected model_type 'mpoe-gpt2', got 'gpt2' in"):
        type(model).from_pretrained(tmp_path / "dense")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"w1_factors": None}, r"w1_factors: expected row and column factors \(see plan_factors\), .* got None"),
        ({"w1_factors": 5}, "w1_factors: expected row and column factors .* got 5"),
        ({"w2_factors": [[2, 2], [3, 3]]}, r"w2_factors: expected products \(16, 64\), got \(4, 9\)"),
        ({"format_version": 2}, "format_version: expected 1, got 2"),
        ({"expert_bias": "none"}, "expert_bias: expected one of expert, shared, got 'none'"),
        ({"activation_function": "tanh"}, "activation_function: expected one of .*relu.*, got 'tanh'"),
        ({"load_balance": -1.0}, "load_balance: expected a number of at least 0, got -1.0"),
        ({"load_balance": "x"}, "load_balance: expected a number of at least 0, got 'x'"),
        ({"num_experts": 10**9}, "num_experts: expected an integer of at most 1048576, got 1000000000"),
        ({"num_experts": True}, "num_experts: expected an integer of at least 1, got True"),
        ({"router_options": None}, "router_options: expected a mapping, got None"),
        ({"route_padding": "no"}, "route_padding: expected True or False, got 'no'"),
        ({"num_experts": 1, "router": "top2"}, "num_experts: expected at least 2"),
    ],
)
def test_configurations_of_which_no_model_can_be_built(changes, message):
    config = moe().config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        tf.AutoModelForCausalLM.from_config(config)
