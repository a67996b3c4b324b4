"""The correction of a converted model, layer after layer: least squares, any family, and what it leaves alone."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from transformers import BertModel, BertPreTrainedModel

from moebert_kernels.convert import choose_experts, convert_to_moe, correct_in_turn, dense_student
from moebert_kernels.convert.in_turn import RIDGE, _least_squares
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.convert.streams import KnownBlocks, kind_of
from moebert_kernels.convert.text_pass import read_text
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers, set_expert_order
from tests.convert.families import FAMILIES, IMAGES, ONE_OF_EACH_SHAPE, make
from tests.convert.test_chosen import CONFIG, text
from tests.convert.test_text_pass import NORMED

ALONE = ("gemma2", "gemma3_text")  # a norm stands between the feed-forward and the sum


def lively(family):
    """A model whose layers change their inputs much."""
    model = make(family)
    with torch.no_grad():
        for site in find_sites(model):
            for tensor in site.weights():
                if tensor is not None:
                    tensor.mul_(8)
    return model


def students(family, batches):
    """The dense model, and the converted and the narrower one without a correction in turn."""
    model = lively(family)
    chosen = choose_experts(model, batches, CONFIG)
    return model, convert_to_moe(copy.deepcopy(model), CONFIG, chosen=chosen), dense_student(model, chosen=chosen)


def states(model, batches):
    with torch.no_grad():
        return [model(**batch)[0] for batch in batches]


def distance(model, other, batches):
    pairs = zip(states(model, batches), states(other, batches), strict=True)
    return sum(float((a - b)[batch["attention_mask"] != 0].square().sum()) for (a, b), batch in
               zip(pairs, batches, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [f if f in ONE_OF_EACH_SHAPE else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in IMAGES],
)
def test_both_students_of_every_family_come_nearer_to_their_teacher(family):
    batches, other = text(family, 40), text(family, 10, seed=1)
    model, *made = students(family, batches)
    state = copy.deepcopy(model.state_dict())
    for student in made:
        changes = second_weights(student)
        rest = {name: t.clone() for name, t in student.state_dict().items() if not name.endswith(changes)}
        far = distance(model, student, other)
        done = correct_in_turn(student, model, batches)
        assert [part.name for part in done] == [site.name for site in find_sites(model)]
        assert all(part.after <= part.before for part in done) and any(part.after < part.before for part in done)
        assert distance(model, student, other) < far
        assert all(torch.equal(rest[name], student.state_dict()[name]) for name in rest)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


def second_weights(student):
    """How the names of the tensors end that may change."""
    if moe_layers(student):
        return ("experts.w2", "experts.b2")
    seconds = {site.second.rpartition(".")[2] for site in find_sites(student)}
    return tuple(f"{end}.{kind}" for end in seconds for kind in ("weight", "bias"))


@pytest.mark.parametrize("family", [*ONE_OF_EACH_SHAPE[:-1], "deberta-v2", "bart", "gemma2", "gpt_neox"])
def test_forwards_that_begin_behind_known_blocks_are_whole_ones(family, monkeypatch):
    layers = {"gpt2": "n_layer", "t5-v1_1": "num_layers", "bart": "encoder_layers"}.get(family, "num_hidden_layers")
    convolves = {"conv_kernel_size": 3} if family == "deberta-v2" else {}  # behind its first block
    model, batches = make(family, **{layers: 4}, **convolves), text(family, 12)
    chosen, made, found = choose_experts(model, batches, CONFIG), [], []
    for is_the_same in (KnownBlocks._is_the_same, lambda *_: False):
        monkeypatch.setattr(KnownBlocks, "_is_the_same", lambda *a, ask=is_the_same: found.append(ask(*a)) or found[-1])
        made.append(convert_to_moe(copy.deepcopy(model), CONFIG, chosen=chosen))
        correct_in_turn(made[-1], model, batches)
    assert sum(found) >= 2
    for layer, other in zip(*map(moe_layers, made), strict=True):
        torch.testing.assert_close(layer.experts.w2, other.experts.w2)
    assert not any("forward" in vars(module) for module in made[0].modules())


def test_it_is_noticed_where_blocks_give_something_else(monkeypatch):
    """As those of a model that hands more from block to block than their outputs."""
    model, batches = make("bert", num_hidden_layers=4), text(count=12)
    student = convert_to_moe(copy.deepcopy(model), CONFIG, batches=batches)
    whole, found, asked = copy.deepcopy(student), [], KnownBlocks._is_the_same
    monkeypatch.setattr(KnownBlocks, "_is_the_same", lambda *_: False)
    correct_in_turn(whole, model, batches)

    def ask(self, got):
        self.outputs = [output + 1 for output in self.outputs]
        found.append(asked(self, got))
        return found[-1]

    monkeypatch.setattr(KnownBlocks, "_is_the_same", ask)
    correct_in_turn(student, model, batches)
    assert found == [False, False]
    for layer, other in zip(moe_layers(student), moe_layers(whole), strict=True):
        assert torch.equal(layer.experts.w2, other.experts.w2)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in IMAGES])
def test_where_a_feed_forward_goes(family):
    model = make(family)
    wanted = "normed" if family in {*NORMED, *BERTS} else "alone" if family in ALONE else "added"
    assert {kind_of(model, site, text(family, 1)[0]) for site in find_sites(model)} == {wanted}


BERTS = ("roberta", "xlm-roberta", "camembert", "electra", "deberta", "ernie", "layoutlm", "big_bird")


def test_the_change_is_the_ridge_regression():
    torch.manual_seed(0)
    h, ahead, weight = torch.randn(50, 6).double(), torch.randn(50, 4).double(), torch.rand(50).double()
    change, shift = _least_squares(h, ahead, weight, centred=True)
    share = weight / weight.sum()
    ridge = RIDGE * float((share @ (h - share @ h).square()).mean())
    rows = torch.cat([share.sqrt()[:, None] * torch.cat([h, torch.ones(50, 1).double()], 1),
                      ridge**0.5 * torch.eye(7).double()[:6]])  # fmt: skip
    solved = torch.linalg.lstsq(rows, torch.cat([share.sqrt()[:, None] * ahead, torch.zeros(6, 4).double()])).solution
    torch.testing.assert_close(change, solved[:6].T)
    torch.testing.assert_close(shift, solved[6])


def test_tokens_that_no_expert_has_change_nothing():
    change, shift = _least_squares(torch.zeros(0, 6), torch.zeros(0, 4), torch.zeros(0), centred=True)
    assert not change.any() and not shift.any()


def test_the_first_layer_alone_cannot_gain_what_it_has():
    """A second correction finds the least squares of the first layer done, up to the ridge."""
    batches = text(count=40)
    model, student, _ = students("bert", batches)
    first = correct_in_turn(student, model, batches)[0]
    again = correct_in_turn(student, model, batches)[0]
    assert again.before == pytest.approx(first.after, rel=1e-4)
    assert again.before - again.after < 0.3 * (first.before - first.after) + 1e-9


def test_a_correction_that_does_not_help_is_left_out():
    """Of text whose judging sequences are of another kind."""
    batches = text(count=3)
    for batch in batches[1::2]:
        batch["input_ids"][3] += 40
    model, student, _ = students("bert", text(count=40))
    before = copy.deepcopy(student.state_dict())
    for part, layer in zip(correct_in_turn(student, model, batches), moe_layers(student), strict=True):
        name = part.name + ".experts.w2"
        assert (part.after == part.before) == torch.equal(before[name], layer.experts.w2)


def test_conversion_corrects_by_the_text_that_chose():
    model, batches = lively("bert"), text(count=40)
    chosen = choose_experts(model, batches, CONFIG)
    student = convert_to_moe(copy.deepcopy(model), CONFIG, batches=batches)
    alone = convert_to_moe(copy.deepcopy(model), CONFIG, chosen=chosen)
    both = convert_to_moe(copy.deepcopy(model), CONFIG, chosen=chosen, batches=batches)
    correct_in_turn(alone, model, batches)
    for layer, other, third in zip(moe_layers(student), moe_layers(alone), moe_layers(both), strict=True):
        assert torch.equal(layer.experts.w2, other.experts.w2) and torch.equal(layer.experts.b2, third.experts.b2)
    dense, plain = dense_student(model, chosen=chosen, batches=batches), dense_student(model, chosen=chosen)
    correct_in_turn(plain, model, batches)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in dense.state_dict().items())


def test_without_the_correction_it_corrects_nothing():
    model, batches = lively("bert"), text(count=40)
    config = MoEConfig.chosen(num_experts=3, expert_size=16, correction=False)
    for layer, site in zip(moe_layers(convert_to_moe(copy.deepcopy(model), config, batches=batches)), find_sites(model),
                           strict=True):  # fmt: skip
        w2 = site.weights().w2
        assert all(any(torch.equal(column, other) for other in w2.T) for column in layer.experts.w2[0].T)


def test_moeberts_own_experts_can_be_corrected():
    model, batches, other = lively("bert"), text(count=40), text(count=10, seed=1)
    config = MoEConfig.moebert(num_experts=3, expert_size=16, num_shared_neurons=4)
    student = convert_to_moe(copy.deepcopy(model), config, importance=torch.rand(2, 48))
    far = distance(model, student, other)
    correct_in_turn(student, model, batches)
    assert distance(model, student, other) < far


def test_layers_that_are_not_converted_stay():
    model, batches = lively("bert"), text(count=40)
    config = MoEConfig.chosen(num_experts=3, expert_size=16, target_modules=["layer.1.output"])
    student = convert_to_moe(copy.deepcopy(model), config, batches=batches)
    done = correct_in_turn(student, model, batches)
    assert [part.name for part in done] == ["encoder.layer.1.output"]
    assert torch.equal(student.encoder.layer[0].output.dense.weight, model.encoder.layer[0].output.dense.weight)


@pytest.mark.parametrize("family", ["bert", "llama", "gemma2"])
def test_in_bfloat16(family):
    model, batches, other = lively(family).bfloat16(), text(family, 40), text(family, 10, seed=1)
    student = convert_to_moe(copy.deepcopy(model), CONFIG, chosen=choose_experts(model, batches, CONFIG))
    far = distance(model, student, other)
    done = correct_in_turn(student, model, batches)
    assert all(part.after < part.before for part in done) and distance(model, student, other) < far
    assert all(layer.experts.w2.dtype == torch.bfloat16 for layer in moe_layers(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.05, 0.2])
def test_where_small_outputs_go(dtype, size):
    model = make("llama")
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1 / model.embed_tokens.weight.std())
        for site in find_sites(model):
            site.second_module.weight.mul_(size / 0.001)
    model, batch = model.to(dtype), text("llama", 1)[0]
    assert {kind_of(model, site, batch) for site in find_sites(model)} == {"added"}


def test_one_layer_is_corrected_by_the_least_squares_of_its_own_tokens():
    """Those that are neither padding nor judge, weighted by the size of the dense model's stream."""
    model, batches = lively("bert"), text(count=40)
    model.encoder.layer = model.encoder.layer[:1]
    student = convert_to_moe(copy.deepcopy(model), CONFIG, chosen=choose_experts(model, batches, CONFIG))
    site, layer, before = find_sites(model)[0], moe_layers(student)[0], copy.deepcopy(student)
    correct_in_turn(student, model, batches)
    (seen,) = read_text(model, [site], batches, 10**6)
    w1, b1, w2, b2 = site.weights()
    total = seen.x + F.linear(F.gelu(F.linear(seen.x, w1, b1)), w2, b2)
    old = moe_layers(before)[0].experts
    for e in range(3):
        own = (layer.router.table[seen.ids] == e) & ~seen.held_out
        h = F.gelu(F.linear(seen.x[own], old.w1[e], old.b1[e]))
        ahead = total[own] - seen.x[own] - F.linear(h, old.w2[e], old.b2[e])
        change, shift = _least_squares(h, ahead, 1 / total[own].var(1, unbiased=False), centred=True)
        torch.testing.assert_close(layer.experts.w2[e], old.w2[e] + change, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.experts.b2[e], old.b2[e] + shift, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1])
def test_it_reads_so_many_tokens(rows):
    """Five batches of 44 tokens, and of the next one so many sequences of 12."""
    model, batches = lively("bert"), text(count=40)
    chosen, read = choose_experts(model, batches, CONFIG), []
    some, cut = (convert_to_moe(copy.deepcopy(model), CONFIG, chosen=chosen) for _ in range(2))
    correct_in_turn(some, model, (read.append(0) or batch for batch in batches), max_tokens=44 * 5 + 12 * rows)
    assert len(read) == 5 + rows
    rest = [{name: tensor[:rows] for name, tensor in batches[5].items()}] if rows else []
    correct_in_turn(cut, model, [*batches[:5], *rest])
    for layer, other in zip(moe_layers(some), moe_layers(cut), strict=True):
        torch.testing.assert_close(layer.experts.w2, other.experts.w2, rtol=1e-4, atol=1e-5)


def test_a_short_first_text_does_not_decide_where_outputs_go():
    batches = text(count=40)
    short = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    model, student, _ = students("bert", batches)
    last = copy.deepcopy(student)
    near = [part.before for part in correct_in_turn(student, model, [short, *batches])]
    assert near == pytest.approx([part.before for part in correct_in_turn(last, model, [*batches, short])], rel=0.2)


def test_few_sequences_correct_nothing():
    model, student, _ = students("bert", text(count=40))
    before = copy.deepcopy(student.state_dict())
    with pytest.warns(UserWarning, match="4 sequences are too few to correct layers in turn"):
        done = correct_in_turn(student, model, text(count=1))
    assert all(part.after == part.before > 0 for part in done)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())


class TwoReadings(BertPreTrainedModel):
    """Reads its texts twice, as a model of pairs does."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        both = [self.bert(ids, attention_mask=attention_mask)[0] for ids in (input_ids, input_ids.flip(0))]
        return (both[0] + both[1],)


def test_a_model_that_reads_twice():
    torch.manual_seed(0)
    model, batches = TwoReadings(make("bert").config).eval(), text(count=20)
    for batch in batches:
        batch["attention_mask"][:] = 1
    with torch.no_grad():
        for site in find_sites(model):
            site.second_module.weight.mul_(30)
    student = convert_to_moe(copy.deepcopy(model), CONFIG, chosen=choose_experts(model, batches, CONFIG))
    far = distance(model, student, batches)
    correct_in_turn(student, model, batches)
    assert distance(model, student, batches) < far


def test_blocks_that_leave_something_for_later_ones():
    model, batches = make("bert", num_hidden_layers=4), text(count=12)
    student = convert_to_moe(copy.deepcopy(model), CONFIG, batches=batches)
    first, third, left = student.encoder.layer[0], student.encoder.layer[2], []

    def clear(*_):
        left.clear()

    def leave(*_):
        left.append(0)

    def need(*_):
        left.pop()  # an error where the first block was not run

    student.register_forward_pre_hook(clear)
    first.attention.register_forward_hook(leave)
    third.register_forward_pre_hook(need)
    own = first.forward
    first.forward = own
    done = correct_in_turn(student, model, batches)
    assert len(done) == 4 and first.forward is own


def test_a_conversion_that_fails_changes_nothing():
    model, batches = make("bert"), text(count=40)
    chosen = choose_experts(model, batches, CONFIG)
    long = {"input_ids": torch.full((2, 70), 5)}
    for wrong in (
        [],
        batches[0],
        [{"input_ids": torch.full((2, 8), 1000)}],
        [*batches[:2], long],
        [{"x": torch.ones(2)}],
    ):
        with pytest.raises(UserError, match="batches: "):
            convert_to_moe(model, CONFIG, chosen=chosen, batches=wrong)
        assert not moe_layers(model)
    model.lock = threading.Lock()
    with pytest.raises(UserError, match="model: expected one that can be copied"):
        convert_to_moe(model, CONFIG, chosen=chosen, batches=batches)
    assert not moe_layers(model)


def test_refuses_by_name():
    batches = text(count=4)
    model, student, _ = students("bert", text(count=40))
    with pytest.raises(UserError, match="student: expected a converted copy of the teacher, got the teacher"):
        correct_in_turn(model, model, batches)
    with pytest.raises(UserError, match="batches: expected text to correct by, got none"):
        correct_in_turn(student, model, [])
    with pytest.raises(UserError, match="with its 2 feed-forwards, got a BertModel with 3"):
        correct_in_turn(make("bert", num_hidden_layers=3), model, batches)
    with pytest.raises(UserError, match="got another size or device"):
        correct_in_turn(make("bert", hidden_size=16), model, batches)
    ordered = copy.deepcopy(student)
    set_expert_order(ordered)
    with pytest.raises(UserError, match="student: expected tokens in their own order, got set_expert_order"):
        correct_in_turn(ordered, model, batches)
    gates = convert_to_moe(copy.deepcopy(model), MoEConfig.switch())
    with pytest.raises(UserError, match="with weights of their own, routed by a hash table, at"):
        correct_in_turn(gates, model, batches)
    with pytest.raises(UserError, match="batches: expected none without `chosen`"):
        dense_student(model, torch.rand(2, 48), 16, batches=batches)
