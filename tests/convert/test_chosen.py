"""Experts and tables chosen by text: better than random ones, in any family, saved, repeatable, resumed."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from moebert_kernels.convert import (
    choose_experts,
    convert_to_moe,
    dense_student,
    judge_experts,
    report_chart,
    report_table,
)
from moebert_kernels.convert.correction import Refit
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers
from tests.convert.families import FAMILIES, IMAGES, ONE_OF_EACH_SHAPE, TWO_STACKS, make

CONFIG = MoEConfig.chosen(num_experts=3, expert_size=16)


def text(family="bert", count=12, seed=0, vocab=(3, 40)):
    """Batches of four sequences of 12 tokens, the last one of each shorter."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(*vocab, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[3, 8:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
        if family in TWO_STACKS:
            batches[-1]["decoder_input_ids"] = ids.flip(1)
    return batches


def two_languages():
    """One sequence in eight, which judges, has ids of its own."""
    batches = text(vocab=(3, 40))
    for batch in batches[1::2]:
        batch["input_ids"][3] += 40
    return batches


def chosen_for(model, config=CONFIG, batches=None, **options):
    return choose_experts(model, text() if batches is None else batches, config, **options)


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else same([x], [y]) if isinstance(x, Refit) else x == y
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "family",
    [f if f in ONE_OF_EACH_SHAPE else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in IMAGES],
)
def test_every_family_is_converted_by_text_and_loads(family, tmp_path):
    model, batches = make(family), text(family)
    state = copy.deepcopy(model.state_dict())
    choices = chosen_for(model, batches=batches)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    for choice in choices:
        assert choice.report.best <= choice.report.chosen
        assert choice.report.load < 2
    plain = convert_to_moe(copy.deepcopy(model), CONFIG, chosen=choices)
    moe = convert_to_moe(model, CONFIG, batches=batches)
    for layer, other, choice in zip(moe_layers(moe), moe_layers(plain), choices, strict=True):
        assert torch.equal(layer.router.table.long(), choice.table)
        torch.testing.assert_close(other.experts.w2, choice.w2)
    moe.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batches[0])[0], moe(**batches[0])[0])
    assert loaded.config.quantization_config.router == "hash-chosen"


def strong(family="bert", **changes):
    """A model whose feed-forwards matter: with the usual first weights they are nearly zero."""
    model = make(family, **changes)
    with torch.no_grad():
        for site in find_sites(model):
            for module in (*site.first_modules, site.second_module):
                module.weight.mul_(10)
    return model


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_chosen_lose_less_than_dense_and_random_and_reports_are_true(family):
    """On text that chose nothing; the report's error is that of the converted layer itself."""
    model, batches = strong(family), text(family, 60)
    dense = copy.deepcopy(model)
    choices = chosen_for(model, batches=batches)
    for choice in choices:
        report = choice.report
        assert report.best <= report.chosen < 0.9 * report.dense
        assert report.chosen < 0.7 * report.random
        assert report.load < 1.35  # of 320 tokens
        assert report.unseen == 0.0
        assert sum(report.shares) == pytest.approx(1)
        assert (report.least, report.load) == (3 * min(report.shares), 3 * max(report.shares))
    if family != "bert":
        return
    moe = convert_to_moe(model, CONFIG, chosen=choices)
    first, layer = dense.encoder.layer[0], moe.encoder.layer[0]
    rows = {}
    hook = first.intermediate.register_forward_pre_hook(lambda _, args: rows.update(x=args[0]))
    squares = count = 0
    with torch.no_grad():
        for n, batch in enumerate(batches):
            want = dense(**batch, output_hidden_states=True).hidden_states[1]
            got = moe(**batch, output_hidden_states=True).hidden_states[1]
            judged = (4 * n + torch.arange(4)) % 8 == 7
            kept = (batch["attention_mask"] != 0) & judged[:, None]
            squares += float((got - want)[kept].square().sum())
            count += int(kept.sum()) * want.shape[-1]
    hook.remove()
    assert layer.output.experts.norm_weight.eq(1).all()  # so that the error without the norm's scale is this one
    assert squares / count == pytest.approx(choices[0].report.chosen, rel=1e-3)


def test_the_same_text_and_seed_give_the_same_choice():
    model = strong()
    before = torch.random.get_rng_state()
    first, second = chosen_for(model, seed=3), chosen_for(model, seed=3)
    assert same(first, second)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not same(first, chosen_for(model, seed=4))
    assert not same(first, chosen_for(model, seed=3, batches=text(seed=1)))


def test_no_expert_gets_more_than_its_room_of_the_text_that_chooses():
    for max_load in (1.05, 1.5):
        config = MoEConfig.chosen(num_experts=3, expert_size=16, max_load=max_load)
        batches = text(count=30)
        ids = torch.cat([batch["input_ids"] for batch in batches])
        kept = torch.cat([batch["attention_mask"] for batch in batches]) != 0
        kept &= (torch.arange(len(ids)) % 8 != 7)[:, None]
        for choice in chosen_for(strong(), config, batches):
            loads = torch.bincount(choice.table[ids[kept]], minlength=3)
            assert loads.max() <= (1 + 0.5 * (max_load - 1)) * loads.sum() / 3 + 1


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(router="hash-chosen", experts="split", num_experts=3, expert_size=16, num_shared_neurons=8),
        MoEConfig(router="hash-random", experts="clustered", num_experts=3, expert_size=16),
        MoEConfig.chosen(num_experts=3, expert_size=16, num_shared_neurons=5),
        MoEConfig.chosen(num_experts=3, expert_size=16, correction=False),
        MoEConfig.chosen(num_experts=2, expert_size=48),
        MoEConfig.chosen(num_experts=1, expert_size=20),
    ],
)
@pytest.mark.filterwarnings("ignore:no importance scores given")
def test_the_axes_of_the_configuration_are_free_of_each_other(config):
    model = strong()
    dense = copy.deepcopy(model)
    moe = convert_to_moe(model, config, batches=text())
    for layer, other in zip(moe_layers(moe), dense.encoder.layer, strict=True):
        w1 = other.intermediate.dense.weight
        neurons = [{int((w1 == row).all(1).nonzero()) for row in of_expert} for of_expert in layer.experts.w1]
        assert all(len(of_expert) == config.expert_size for of_expert in neurons)
        assert len(set.intersection(*neurons)) >= (config.num_shared_neurons or 0)
        kept = layer.experts.w2[0][:, 0]
        is_dense = bool((kept == other.output.dense.weight.T).all(1).any())
        corrected = config.experts == "clustered" and config.correction and config.expert_size < 48
        assert is_dense == (not corrected)
    with torch.no_grad():
        got, want = (m(**text()[0]).last_hidden_state for m in (moe, dense))
    if config.expert_size == 48:
        kept = text()[0]["attention_mask"] != 0
        torch.testing.assert_close(got[kept], want[kept], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(got).all()


def test_a_dense_student_is_corrected_too():
    """Its errors are those of the report, at its own layer's inputs."""
    model, batches = strong(), text(count=60)
    choices = chosen_for(model, batches=batches)
    student = dense_student(model, chosen=choices)
    assert student.config.intermediate_size == 16
    for choice, site, old in zip(choices, find_sites(student), find_sites(model), strict=True):
        assert torch.equal(site.weights().w1, old.weights().w1[choice.dense.kept])
        assert torch.equal(site.weights().w2, choice.dense.w2)
        assert torch.equal(site.weights().b2, choice.dense.b2)
    with torch.no_grad():
        want = model(**batches[0]).last_hidden_state
        plain = dense_student(model, torch.stack([c.strength for c in choices]), 16)
        lost = [(m(**batches[0]).last_hidden_state - want).square().mean() for m in (student, plain)]
    assert lost[0] < 0.8 * lost[1]


def test_labels_bring_a_dense_students_answers_closer(tmp_path):
    """Behind a head that reads the first token; experts and tables stay what they are without labels."""
    torch.manual_seed(0)
    model = strong(auto=AutoModelForSequenceClassification)
    batches = [batch | {"labels": torch.tensor([0, 1, 1, 0])} for batch in text(count=60)]
    for batch in batches:
        batch["input_ids"][:, 0] = 2
    plain = chosen_for(model, batches=batches, folder=tmp_path)
    weighed = chosen_for(model, batches=batches, weigh_dense=True, folder=tmp_path / "weighed")
    for one, other in zip(plain, weighed, strict=True):
        assert same([one[:6]], [other[:6]])
        assert one.report == other.report
    with torch.no_grad():
        want = [model(**batch).logits for batch in batches]
        lost = [
            sum(float((dense_student(model, chosen=choices)(**batch).logits - y).square().sum()) for batch, y in
                zip(batches, want, strict=True))
            for choices in (plain, weighed)
        ]  # fmt: skip
    assert lost[1] < 0.8 * lost[0]
    with pytest.raises(UserError, match="folder: expected the choice of this weigh_dense, got another one's"):
        chosen_for(model, batches=batches, folder=tmp_path / "weighed")


def test_a_choice_is_judged_on_other_text():
    model, batches = strong(), text(count=60)
    choices = chosen_for(model, batches=batches)
    same_kind = judge_experts(model, choices, text(count=20, seed=5))
    other = judge_experts(model, choices, text(count=20, seed=5, vocab=(40, 90)))
    for choice, near, far in zip(choices, same_kind, other, strict=True):
        assert near.chosen == pytest.approx(choice.report.chosen, rel=0.3)
        assert near.dense == pytest.approx(choice.report.dense, rel=0.3)
        assert near.unseen == 0.0
        assert far.unseen == 1.0
        assert far.chosen > near.chosen


def test_text_makes_chosen_experts_the_default():
    moe = convert_to_moe(strong(), batches=text())
    assert moe.config.quantization_config.router == "hash-chosen"
    assert moe.config.quantization_config.expert_size == 12


def test_several_passes_give_what_one_gives(monkeypatch):
    from moebert_kernels.convert import chosen

    one = chosen_for(strong())
    monkeypatch.setattr(chosen, "_MEMORY", 1)
    assert same(one, chosen_for(strong()))
    with pytest.raises(UserError, match="what can be read again: the 2 feed-forwards take 2 passes, got generator"):
        chosen_for(strong(), batches=(batch for batch in text()))


def test_activations_that_are_not_kept_give_what_kept_ones_give(monkeypatch):
    from moebert_kernels.convert import site_errors

    kept = chosen_for(strong())
    monkeypatch.setattr(site_errors, "_KEPT_BYTES", 0)
    assert same(kept, chosen_for(strong()))


def test_an_interrupted_choice_goes_on(tmp_path, monkeypatch):
    from moebert_kernels.convert import chosen

    whole = chosen_for(strong())
    monkeypatch.setattr(chosen, "_MEMORY", 1)
    reads = []

    class Stops(list):
        def __iter__(self):
            reads.append(len(reads))
            if len(reads) == 2:
                raise KeyboardInterrupt
            return super().__iter__()

    batches = Stops(text())
    monkeypatch.setattr(chosen, "iter", lambda given: None, raising=False)  # the check is no read
    with pytest.raises(KeyboardInterrupt):
        chosen_for(strong(), batches=batches, folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert same(whole, chosen_for(strong(), batches=batches, folder=tmp_path))
    assert len(reads) == 3
    assert same(whole, chosen_for(strong(), batches=batches, folder=tmp_path))
    assert len(reads) == 3
    with pytest.raises(UserError, match="folder: expected the choice of this seed, got another one's in"):
        chosen_for(strong(), batches=batches, folder=tmp_path, seed=1)
    (tmp_path / "feed-forward-001.safetensors").unlink()
    with pytest.raises(UserError, match="folder: expected the choice of this text, got another one's in"):
        chosen_for(strong(), batches=text(seed=9), folder=tmp_path)
    (tmp_path / "feed-forward-000.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=r"000.safetensors: expected a choice of experts, got a damaged file"):
        chosen_for(strong(), batches=batches, folder=tmp_path)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_and_decoder_have_a_text_each(family, tmp_path):
    model, batches = make(family), text(family)
    config = MoEConfig.chosen(num_experts=2, expert_size=8)
    made = choose_experts(model, batches, config, folder=tmp_path)
    again = choose_experts(model, batches, config, folder=tmp_path)
    assert all(torch.equal(one.table, other.table) for one, other in zip(made, again, strict=True))
    (tmp_path / "feed-forward-000.safetensors").unlink()
    with pytest.raises(UserError, match="folder: expected the choice of this text, got another one's"):
        choose_experts(model, batches[::-1], config, folder=tmp_path)


def test_the_report_is_a_table():
    reports = [choice.report for choice in chosen_for(strong())]
    table = report_table(reports).splitlines()
    assert " ".join(table[0].split()) == "feed-forward dense random chosen best least load common unseen"
    assert [line.split()[0] for line in table[1:]] == ["encoder.layer.0.output", "encoder.layer.1.output", "mean"]
    assert len({len(line) for line in table}) == 1
    assert report_table([replace(reports[0], shares=[])]).splitlines()[1].split()[5] == "-"  # least


def test_the_chart_has_bars_as_long_as_the_errors():
    report = chosen_for(strong())[0].report
    one = replace(report, name="a", dense=0.4, chosen=0.2)
    other = replace(report, name="long", dense=0.1, chosen=0.1)
    none = replace(report, name="none", dense=0.0, chosen=0.0)
    assert report_chart([one, other, none], width=20).splitlines() == [
        "a    ##########---------- 50 % below dense",
        "long ##### 0 % below dense",
        "none  no error",
    ]


@pytest.mark.parametrize(
    ("family", "fields", "options", "message"),
    [
        ("bert", {}, {}, "batches: expected text to choose experts by with router='hash-chosen' .* got none"),
        ("bert", {"router": "hash-random", "experts": "split"}, {"batches": text()}, "batches: expected none with"),
        ("bert", {"expert_size": 49}, {"batches": text()}, "expert_size: expected 1 to the dense layer's 48 neurons"),
        (
            "bert",
            {"expert_size": 8, "num_shared_neurons": 9},
            {"batches": text()},
            "num_shared_neurons: expected 0 to expert_size=8",
        ),
        ("vit", {}, {"batches": text()}, "router: hash-chosen routes by token ids, and .* of ViTModel gets none"),
        ("bert", {}, {"batches": []}, "batches: expected text to choose experts by, got no tokens"),
        (
            "bert",
            {},
            {"batches": text(), "tables": torch.zeros(100)},
            "tables: expected none with router='hash-chosen'",
        ),
        ("bert", {}, {"batches": text(vocab=(3, 6))}, "at least 8 different token ids for 4 experts, got 3 in"),
        ("bert", {}, {"batches": two_languages()}, "of which 100 % of the tokens are unseen in the others"),
    ],
)
def test_what_cannot_be_chosen_is_refused(family, fields, options, message):
    with pytest.raises(UserError, match=message):
        convert_to_moe(make(family), MoEConfig.chosen(**fields), **options)


def test_few_tokens_are_a_warning():
    with pytest.warns(UserWarning, match="batches: 44 tokens are few to correct experts of 16 neurons by; 20,000 do"):
        chosen_for(strong(), batches=text(count=1, vocab=(3, 12)))


def test_a_choice_for_another_model_is_refused():
    with pytest.raises(UserError, match=r"model: expected feed-forwards behind token ids, got .* of ViTModel"):
        choose_experts(make("vit"), text())
    choices = chosen_for(strong())
    for config in (MoEConfig.chosen(num_experts=4, expert_size=16), MoEConfig.chosen(num_experts=3)):
        with pytest.raises(UserError, match=r"chosen: expected 2 choices of . experts of \d+, got another model's"):
            convert_to_moe(make("bert"), config, chosen=choices)
    with pytest.raises(UserError, match="chosen: expected 1 choices"):
        convert_to_moe(make("bert", num_hidden_layers=1), CONFIG, chosen=choices)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"router": "hash-chosen", "experts": "copy"},
            "router: 'hash-chosen' needs experts that differ, split or clust",
        ),
        ({"router": "gate-token", "experts": "clustered"}, "experts: 'clustered' needs routing by token ids"),
        ({"experts": "clustered", "expert_bias": "common"}, "expert_bias: expected 'expert' with experts='clustered'"),
        ({"max_load": 0.9}, "max_load: expected a number of at least 1, got 0.9"),
        ({"max_load": "much"}, "max_load: expected a number of at least 0, got 'much'"),
        ({"max_load": None}, "max_load: expected a number of at least 1, got None"),
        ({"correction": 1}, "correction: expected true or false, got 1"),
    ],
)
def test_a_configuration_without_meaning_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(**fields)


def test_a_choice_is_of_the_experts_and_tables_that_were_given(tmp_path):
    V = strong().config.vocab_size
    tables = torch.arange(2 * V).view(2, V) % 3
    chosen = chosen_for(strong(), folder=tmp_path, tables=tables)
    with pytest.raises(UserError, match="folder: expected the choice of this tables, got another one's in"):
        chosen_for(strong(), folder=tmp_path, tables=tables.flip(1))
    with pytest.raises(UserError, match="chosen: expected it without tables, which the choice replaces"):
        convert_to_moe(strong(), CONFIG, chosen=chosen, tables=tables)
