"""The pass over text: what it keeps of each feed-forward, which tokens, and what text it refuses."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from moebert_kernels.convert.sites import find_sites
from moebert_kernels.convert.text_pass import HELD_OUT_EVERY, SiteText, check_text, read_text, unseen_share
from moebert_kernels.errors import UserError
from tests.convert.families import TWO_STACKS, make
from tests.convert.test_chosen import text

NORMED = ("bert", "mpnet", "distilbert", "bart", "deberta-v2")
NOT_NORMED = ("megatron-bert", "modernbert", "gpt2", "gpt_neox", "qwen3", "gemma2", "t5-v1_1", "opt", "phi3")


def of_ids(ids, held_out=None):
    ids = torch.as_tensor(ids)
    held_out = torch.zeros(len(ids), dtype=torch.bool) if held_out is None else torch.as_tensor(held_out)
    return SiteText(ids, torch.zeros(len(ids), 4), held_out, torch.ones(len(ids)), True)


@pytest.mark.parametrize("family", [*NORMED, *NOT_NORMED])
def test_it_knows_whether_a_norm_stands_behind_the_residual(family):
    model = make(family)
    for found in read_text(model, find_sites(model), text(family, 2), 1000):
        assert found.is_normed == (family in NORMED)


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "t5", "opt"])
def test_it_keeps_the_inputs_of_the_tokens_that_are_not_padding(family):
    model, batches = make(family), text(family, 3)
    sites = find_sites(model)
    seen = [[] for _ in sites]
    hooks = [
        site.first_modules[0].register_forward_pre_hook(lambda _, args, into=into: into.append(args[0]))
        for site, into in zip(sites, seen, strict=True)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    found = read_text(model, sites, batches, 10**6)
    mask = torch.cat([batch["attention_mask"] for batch in batches]) != 0
    for site, of_site, inputs in zip(sites, found, seen, strict=True):
        decodes = family in TWO_STACKS and "decoder" in site.name
        name = "decoder_input_ids" if decodes else "input_ids"
        kept = torch.ones_like(mask) if decodes else mask
        assert torch.equal(of_site.ids, torch.cat([batch[name] for batch in batches])[kept])
        assert torch.equal(of_site.x, torch.cat([x.view(4, 12, -1) for x in inputs])[kept])
        rows = torch.arange(12).unsqueeze(1).expand(12, 12)[kept]
        assert torch.equal(of_site.held_out, rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)


def test_the_stream_is_what_the_next_layer_gets():
    model, batches = make("gpt2"), text("gpt2", 1)
    found = read_text(model, find_sites(model), batches, 10**6)
    with torch.no_grad():
        states = model(**batches[0], output_hidden_states=True).hidden_states
    kept = batches[0]["attention_mask"] != 0
    torch.testing.assert_close(found[0].stream, states[1][kept].square().mean(-1))


def test_reading_ends_at_the_limit_and_leaves_the_model_as_it_was():
    model = make("bert").train()
    read = []

    def batches():
        for batch in text(count=20):
            read.append(batch)
            yield batch

    found = read_text(model, find_sites(model), batches(), 100)
    assert len(found[0].ids) == len(found[1].x) == 100
    assert len(read) == 3  # of 44 tokens each
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradients_are_those_of_the_models_loss(family):
    model = make(family, AutoModelForSequenceClassification).train()
    sites = find_sites(model)
    batches = [batch | {"labels": torch.tensor([0, 1, 1, 0])} for batch in text(family, 3)]
    found = read_text(model, sites, batches, 100, with_gradient=True)
    plain = read_text(model, sites, batches, 100)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()
    for site, of_site, other in zip(sites, found, plain, strict=True):
        outputs, wanted = [], []
        hook = site.second_module.register_forward_hook(lambda _, args, y, into=outputs: into.append(y))
        for batch in batches:
            (gradient,) = torch.autograd.grad(model(**batch).loss, outputs[-1], allow_unused=True)
            squares = gradient.square().sum(-1)
            mean = torch.stack([row[row > 0].mean() for row in squares])
            wanted.append((squares / mean[:, None])[batch["attention_mask"] != 0])
        hook.remove()
        torch.testing.assert_close(of_site.gradient, torch.cat(wanted)[:100])
        assert torch.equal(of_site.x, other.x)
        assert other.gradient is None


def test_a_loss_is_needed_for_gradients():
    for model in (make("bert"), make("bert", AutoModelForSequenceClassification)):
        with pytest.raises(UserError, match="batches: expected labels, and a model with a head that gives a loss"):
            read_text(model, find_sites(model), text(count=1), 100, with_gradient=True)


def test_the_models_half_precision_is_kept():
    model = make("bert").to(torch.bfloat16)
    assert read_text(model, find_sites(model), text(count=1), 100)[0].x.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches: expected text to choose experts by, got no tokens"),
        ([{"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3)}], "got no tokens"),
        ([torch.ones(1, 3)], "batches: expected mappings with input_ids, tokenized texts, got Tensor"),
        ([{"inputs_embeds": torch.zeros(1, 3, 32)}], r"token ids \(input_ids\) as a tensor, by which experts"),
    ],
)
def test_nothing_to_read_is_refused(batches, message):
    model = make("bert")
    with pytest.raises(UserError, match=message):
        read_text(model, find_sites(model), batches, 100)


def test_text_of_which_no_table_can_be_made_is_refused():
    with pytest.raises(UserError, match="at least 8 different token ids for 4 experts, got 7 in 70 tokens"):
        check_text(of_ids([*range(7)] * 10), 4)
    with pytest.raises(UserError, match="a language that the tokenizer knows, got token id 3 for 60 % of the tokens"):
        check_text(of_ids([3] * 60 + [*range(10, 50)]), 4)
    held_out = [False] * 40 + [True] * 10
    with pytest.raises(UserError, match="of which 70 % of the tokens are unseen in the others"):
        check_text(of_ids([*range(40), *range(37, 47)], held_out), 4)
    check_text(of_ids([*range(40), *range(10)], held_out), 4)


def test_unseen_share():
    assert unseen_share(of_ids([1, 2, 3, 4], [False, False, True, True])) == 1.0
    assert unseen_share(of_ids([1, 2, 1, 4], [False, False, True, True])) == 0.5
    assert unseen_share(of_ids([1, 2])) == 0.0
