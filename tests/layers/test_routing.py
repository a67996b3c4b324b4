"""What a user of transformers expects of the encoder, and what hash routing promises."""

import pytest
import torch

from moebert_kernels.errors import UserError
from moebert_kernels.models import MoEBertModel
from moebert_kernels.nn import hash_router
from tests.models import tiny


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("router", tiny.ROUTERS)
def test_padding_does_not_reach_the_rest(router, style):
    model = MoEBertModel(tiny.config(router=router, style=style, pad_token_id=1)).eval()
    inputs = tiny.inputs()
    mask = inputs["attention_mask"].bool()
    # RoBERTa counts positions from the padding tokens, so they must be in place.
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~mask, 1)
    other = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.ones(tiny.B, 4, dtype=torch.int64)], 1)}
    other["attention_mask"] = torch.cat([inputs["attention_mask"], torch.zeros(tiny.B, 4, dtype=torch.int64)], 1)

    short, long = model(**inputs), model(**other)
    torch.testing.assert_close(long.last_hidden_state[:, : tiny.T][mask], short.last_hidden_state[mask])
    torch.testing.assert_close(long.pooler_output, short.pooler_output)
    torch.testing.assert_close(long.balance_loss, short.balance_loss)


@pytest.mark.parametrize("router", tiny.ROUTERS)
def test_paper_preset_computes_padding_too(router):
    torch.manual_seed(1)
    skipping = MoEBertModel(tiny.config(router=router)).eval()
    torch.manual_seed(1)
    routing = MoEBertModel(tiny.config(router=router, preset="paper")).eval()
    inputs = tiny.inputs()
    mask = inputs["attention_mask"].bool()
    skipped, routed = skipping(**inputs).last_hidden_state, routing(**inputs).last_hidden_state
    torch.testing.assert_close(skipped[mask], routed[mask])
    assert not torch.allclose(skipped[~mask], routed[~mask])


@pytest.mark.parametrize("router", tiny.ROUTERS)
def test_without_mask(router):
    model = MoEBertModel(tiny.config(router=router)).eval()
    ids = tiny.inputs()["input_ids"]
    torch.testing.assert_close(model(ids).last_hidden_state, model(ids, torch.ones_like(ids)).last_hidden_state)


@pytest.mark.parametrize("router", tiny.ROUTERS)
def test_attention_mask_of_more_dimensions(router):
    model = MoEBertModel(tiny.config(router=router)).eval()
    inputs = tiny.inputs()
    mask = inputs["attention_mask"].bool()
    square = mask[:, None, None, :].expand(-1, 1, tiny.T, -1)
    got, wanted = model(inputs["input_ids"], square), model(**inputs)
    if router != "gate-sentence":  # whose mean then includes the padding
        torch.testing.assert_close(got.last_hidden_state[mask], wanted.last_hidden_state[mask])


def test_all_groupings_are_built_once_before_the_first_layer(monkeypatch):
    model = MoEBertModel(tiny.config(num_hidden_layers=3)).eval()
    events = []
    group = hash_router.group_tokens_by_hash

    def spy(*args):
        events.append("group")
        return group(*args)

    monkeypatch.setattr(hash_router, "group_tokens_by_hash", spy)
    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(lambda *_: events.append("layer"))
    model(**tiny.inputs())
    assert events == ["group", "layer", "layer", "layer"]


def test_each_layer_uses_its_own_table():
    model = MoEBertModel(tiny.config()).eval()
    inputs = tiny.inputs()
    before = model(**inputs, output_hidden_states=True).hidden_states
    table = model.encoder.layer[1].router.table
    model.encoder.layer[1].router.set_table((table + 1) % 4)
    after = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(before[1], after[1]) and not torch.allclose(before[2], after[2])


def test_new_tables():
    tables = [layer.router.table for layer in MoEBertModel(tiny.config()).encoder.layer]
    assert not torch.equal(*tables)
    balanced = [layer.router.table for layer in MoEBertModel(tiny.config(router="hash-balance")).encoder.layer]
    assert torch.equal(*balanced) and balanced[0].bincount().tolist() == [15] * 4


def test_outputs():
    model = MoEBertModel(tiny.config(attn_implementation="eager")).eval()
    inputs = tiny.inputs()
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert output.attentions[0].shape == (tiny.B, 2, tiny.T, tiny.T)
    assert output.balance_loss is None
    plain = model(**inputs, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], output.last_hidden_state)
    assert model(**inputs).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 3


def test_eager_and_sdpa_agree():
    model = MoEBertModel(tiny.config()).eval()
    inputs = tiny.inputs()
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(**inputs).last_hidden_state
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).last_hidden_state, sdpa)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # no other name in 5.17
@pytest.mark.parametrize("router", tiny.ROUTERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(router, reentrant):
    model = tiny.model(router=router, load_balance=0.1, hidden_dropout_prob=0.2).train()
    batch = tiny.inputs() | tiny.labels("sequence")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, msg=name)


def test_embeddings_instead_of_ids():
    inputs = tiny.inputs()
    for router in tiny.ROUTERS:
        model = MoEBertModel(tiny.config(router=router)).eval()
        wanted = model(**inputs).last_hidden_state
        embeds = {"inputs_embeds": model.embeddings.word_embeddings(inputs["input_ids"])}
        torch.testing.assert_close(model(**inputs, **embeds).last_hidden_state, wanted)
        mask = {"attention_mask": inputs["attention_mask"]}
        if router.startswith("hash"):
            with pytest.raises(UserError) as error:
                model(**embeds, **mask)
            assert str(error.value) == (
                f"input_ids: expected token ids, which router='{router}' routes by, got inputs_embeds alone"
            )
        else:
            torch.testing.assert_close(model(**embeds, **mask).last_hidden_state, wanted)


def test_rejects_inputs():
    model = MoEBertModel(tiny.config()).eval()
    with pytest.raises(UserError, match="input_ids: expected token ids or inputs_embeds, got neither"):
        model()
    with pytest.raises(UserError, match=r"input_ids: expected the shape of inputs_embeds, \(2, 5\), got \(2, 4\)"):
        model(torch.ones(2, 4, dtype=torch.int64), inputs_embeds=torch.zeros(2, 5, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", tiny.ROUTERS)
def test_low_precision(router, dtype):
    model = tiny.model(router=router, load_balance=0.1)
    batch = tiny.inputs() | tiny.labels("sequence")
    exact = model(**batch)
    with torch.autocast("cpu", dtype):
        cast = model(**batch)
    cast.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(cast.logits.float(), exact.logits, rtol=0.1, atol=0.1)
    half = model.to(dtype)(**batch)
    assert half.logits.dtype == dtype
    torch.testing.assert_close(half.logits.float(), exact.logits, rtol=0.1, atol=0.1)


def test_expert_dropout():
    assert tiny.model().moebert.encoder.layer[0].experts.dropout == 0.1
    assert tiny.model(expert_dropout=0.0).moebert.encoder.layer[0].experts.dropout == 0.0
