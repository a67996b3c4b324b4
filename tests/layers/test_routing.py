"""What a user of transformers expects of a converted encoder, and what hash routing promises."""

import types

import accelerate
import pytest
import torch
from transformers import AutoModelForPreTraining, LongformerConfig, LongformerModel

from moebert_kernels.convert import convert_to_moe, importance_scores
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, balance_losses, moe_layers, summed_losses
from moebert_kernels.nn import hash_router
from tests.convert.families import make, make_inputs
from tests.convert.models import ROUTERS, D, L, dense_model, inputs, labels, moe_model

FAMILIES = ("bert", "roberta")


def with_balance(model, batch):
    """Hidden states and pooled ones, and the balance loss or None."""
    with torch.no_grad(), balance_losses() as losses:
        output = model(**batch)
    return output.last_hidden_state, output.pooler_output, summed_losses(losses) if losses else None


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_padding_does_not_reach_the_rest(router, name):
    # RoBERTa counts positions from the padding tokens, so they must be in place.
    model, batch = moe_model(name, router=router, dense={"pad_token_id": 1}), inputs(pad_token_id=1)
    mask = batch["attention_mask"].bool()
    longer = {
        key: torch.cat([tensor, torch.full((len(tensor), 4), 1 if key == "input_ids" else 0)], 1)
        for key, tensor in batch.items()
    }
    short, long = with_balance(model, batch), with_balance(model, longer)
    torch.testing.assert_close(long[0][:, : mask.shape[1]][mask], short[0][mask])
    torch.testing.assert_close(long[1], short[1])
    assert (long[2] is None) == (router in ("hash-random", "hash-balance", "task"))
    torch.testing.assert_close(long[2], short[2])


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_is_computed_if_asked(router):
    batch = inputs()
    mask = batch["attention_mask"].bool()
    (skipped, *_), (routed, *_) = (
        with_balance(moe_model("bert", router=router, route_padding=route), batch) for route in (False, True)
    )
    if router != "gate-sentence":  # whose choice is by the mean over all of its tokens
        torch.testing.assert_close(skipped[mask], routed[mask])
    assert not torch.allclose(skipped[~mask], routed[~mask])


@pytest.mark.parametrize("router", ROUTERS)
def test_without_a_mask_or_with_one_of_more_dimensions(router):
    model, batch = moe_model("bert", router=router).eval(), inputs()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    torch.testing.assert_close(model(ids).last_hidden_state, model(ids, torch.ones_like(ids)).last_hidden_state)
    square = mask.bool()[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    got, wanted = model(ids, square).last_hidden_state, model(**batch).last_hidden_state
    if router != "gate-sentence":  # whose mean then includes the padding
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("router", ["gate-sentence", "top2", "task"])
def test_sentences_of_a_model_that_flattens_them_stay_apart_without_a_mask(router):
    own = {"experts": "copy"}
    config = MoEConfig.task(["a", "b"], **own) if router == "task" else MoEConfig(router=router, num_experts=3, **own)
    model, batch = convert_to_moe(make("opt"), config, noise=0.5), make_inputs("opt", padded=False)
    more = {"task_ids": torch.tensor([0, 1])} if router == "task" else {}
    mask = {"attention_mask": torch.ones_like(batch["input_ids"])}
    got, wanted = model(**batch, **more).last_hidden_state, model(**batch, **mask, **more).last_hidden_state
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("router", ["hash-random", "switch"])
def test_chunks_of_feed_forwards_are_not_made(router):
    """A chunk would have another chunk's mask, and no grouping."""
    batch = inputs()
    whole, chunked = (
        convert_to_moe(dense_model("bert", chunk_size_feed_forward=size), MoEConfig(router=router, experts="copy"))
        for size in (0, 2)
    )
    assert torch.equal(whole(**batch).last_hidden_state, chunked(**batch).last_hidden_state)


@pytest.mark.parametrize("unwrapped", [False, True])
def test_a_forward_that_a_training_has_left_is_not_in_the_way(unwrapped):
    """accelerate's, which is the dense class's."""
    dense, batch = dense_model("bert-cls"), inputs() | {"labels": torch.tensor([0, 1, 2, 0])}
    wanted = importance_scores(dense, [batch])
    # as `Accelerator.prepare_model`, without the state that a process has once
    function = accelerate.utils.convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(dense.forward.__func__))
    dense._original_forward, dense.forward = dense.forward, types.MethodType(function, dense)
    if unwrapped:
        dense = accelerate.utils.extract_model_from_parallel(dense, keep_fp32_wrapper=False)
    before = dict(vars(dense))
    assert "forward" in before
    torch.testing.assert_close(importance_scores(dense, [batch]), wanted)  # without its autocast, which comes back
    assert vars(dense) == before
    model = convert_to_moe(dense, MoEConfig(router="switch", load_balance=100.0))
    assert "forward" not in vars(model) and model(**batch).loss > 50


def test_a_forward_of_the_users_own_stays():
    def states(self, input_ids=None, attention_mask=None):
        return type(self).forward(self, input_ids, attention_mask).last_hidden_state

    dense, batch = dense_model("bert"), inputs()
    dense.forward = types.MethodType(states, dense)
    assert convert_to_moe(dense, MoEConfig())(**batch).shape[:2] == batch["input_ids"].shape


def test_hooks_of_accelerate_are_refused():
    hooked = accelerate.cpu_offload(dense_model("bert-cls"), torch.device("cpu"))
    with pytest.raises(UserError, match="model: expected one without accelerate's hooks"):
        convert_to_moe(hooked, MoEConfig(router="switch"))


def test_all_groupings_are_built_once_before_the_first_layer(monkeypatch):
    model, events = moe_model("bert"), []
    group = hash_router.group_tokens_by_hash

    def spy(*args):
        events.append("group")
        return group(*args)

    monkeypatch.setattr(hash_router, "group_tokens_by_hash", spy)
    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(lambda *_: events.append("layer"))
    model(**inputs())
    assert events == ["group", *["layer"] * L]


def test_each_layer_uses_its_own_table():
    model, batch = moe_model("bert"), inputs()
    before = model(**batch, output_hidden_states=True).hidden_states
    router = moe_layers(model)[1].router
    router.table = (router.table + 1) % 4
    after = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(before[1], after[1]) and not torch.allclose(before[2], after[2])


def test_no_input_is_refused():
    with pytest.raises(UserError, match="input_ids: expected token ids, which hash routing needs, got none"):
        moe_model("bert")()
    with pytest.raises(UserError, match="input_ids: expected token ids or inputs_embeds, got neither"):
        moe_model("bert", router="task")()
    with pytest.raises(UserError, match=r"task_ids: expected none with router='hash-random', got some"):
        moe_model("bert")(**inputs(), task_ids=0)


def test_a_model_that_pads_its_texts_itself_is_told_to_get_them_padded():
    config = LongformerConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attention_window=[8, 8], max_position_embeddings=40,
    )  # fmt: skip
    net = convert_to_moe(LongformerModel(config), MoEConfig(num_experts=2)).eval()
    assert net(torch.randint(3, 50, (2, 16))).last_hidden_state.shape == (2, 16, 16)
    with pytest.raises(UserError, match=r"expected the tokens of input_ids, \(2, 11\), got \(2, 16\).*pad_to_mult"):
        net(torch.randint(3, 50, (2, 11)))


def test_outputs_are_those_of_the_dense_class():
    eager, batch = {"attn_implementation": "eager"}, inputs()
    model, dense = moe_model("bert", router="gate-token", dense=eager), dense_model("bert", **eager)
    output, of_dense = (one(**batch, output_hidden_states=True, output_attentions=True) for one in (model, dense))
    assert list(output) == list(of_dense)
    assert len(output.hidden_states) == L + 1 and len(output.attentions) == L
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    plain = model(**batch, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], output.last_hidden_state)
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)


def test_eager_and_sdpa_agree():
    model, batch = moe_model("bert"), inputs()
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(**batch).last_hidden_state
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**batch).last_hidden_state, sdpa)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ROUTERS)
def test_low_precision(router, dtype):
    fields = {"load_balance": 0.1} if router not in ("hash-random", "hash-balance", "task") else {}
    model = moe_model("bert-cls", router=router, expert_size=D, num_shared_neurons=D, **fields)
    batch = inputs()  # experts are the same, so that a token whose probabilities are close may change its own
    batch |= labels("bert-cls", batch)
    exact = model(**batch)
    with torch.autocast("cpu", dtype):
        cast = model(**batch)
    cast.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(cast.logits.float(), exact.logits, rtol=0.1, atol=0.1)
    half = model.to(dtype)(**batch)
    assert half.logits.dtype == dtype
    torch.testing.assert_close(half.logits.float(), exact.logits, rtol=0.1, atol=0.1)


def test_a_model_that_gives_no_loss_for_its_labels():
    """One of two heads has labels, which is not enough for this class."""
    moe = convert_to_moe(make("bert", AutoModelForPreTraining), MoEConfig.switch(num_experts=2))
    ids = make_inputs("bert")["input_ids"]
    assert moe(input_ids=ids, labels=ids).loss is None
    assert moe(input_ids=ids, labels=ids, return_dict=False)[0].ndim == 3
    assert moe(input_ids=ids, labels=ids, next_sentence_label=torch.zeros(len(ids), dtype=torch.int64)).loss > 0
