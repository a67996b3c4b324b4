"""`prepare` with batches: which products get a scale for each token, what that saves, and what it refuses."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_layers
from moebert_kernels.serve import calibration as module
from moebert_kernels.serve import describe, prepare
from moebert_kernels.serve.modules import products_of
from moebert_kernels.serve.packed import available
from moebert_kernels.serve.tiles import SWITCH
from tests.convert.families import IMAGES, ONE_OF_EACH_SHAPE, make, make_inputs
from tests.serve.problems import SEVEN_BITS
from tests.serve.test_prepare import CLOSE, distance, made, run, valid
from tests.serve.test_transformers_experts import IDS, hidden, tiny

INPUTS = make_inputs("bert")
WIDE = {"initializer_range": 0.3}  # feed-forwards whose outputs count


@pytest.fixture(autouse=True)
def one_engine(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")  # with tiles all experts have a scale for each token
    monkeypatch.setattr("moebert_kernels.serve.packed.available", lambda dtype: available(dtype)[-1:])


def inputs_of(model, feed_forward):
    """(N, H) of the tokens that are no padding."""
    seen = []
    hook = feed_forward.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, INPUTS)
    hook.remove()
    return seen[0][INPUTS["attention_mask"] != 0]


@torch.no_grad()
def give_outlier(x, w1, b1, w2, value=150.0):
    """Let the first neuron answer the first row of x (N, H) with this value, and the others with almost nothing."""
    target = torch.full((len(x),), -3.0)
    target[0] = value
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), target[:, None], driver="gelsd").solution
    w1[0], b1[0] = solved[:-1, 0], solved[-1, 0]
    w2[:, 0] *= 0.01


@pytest.fixture
def dense():
    model = make("bert", **WIDE)
    layer = model.encoder.layer[0]
    give_outlier(
        inputs_of(model, layer.intermediate.dense),
        layer.intermediate.dense.weight, layer.intermediate.dense.bias, layer.output.dense.weight,
    )  # fmt: skip
    return model


@pytest.fixture
def converted():
    """The outlier is in the expert of the first token."""
    model = made("bert", "hash", wider=1, **WIDE)
    layer = moe_layers(model)[0]
    ids = INPUTS["input_ids"][INPUTS["attention_mask"] != 0]
    expert = int(layer.router.table[ids[0]])
    rows = inputs_of(model, layer)[layer.router.table[ids] == expert]
    give_outlier(rows, layer.experts.w1[expert], layer.experts.b1[expert], layer.experts.w2[expert])
    return (
        model,
        f"encoder.layer.0.output.experts.w2.{expert}",
        INPUTS["attention_mask"] * (layer.router.table[INPUTS["input_ids"]] == expert),
    )


def check(model, names, tmp_path, outputs, times):
    calibrated, expected = prepare(copy.deepcopy(model), batches=[INPUTS]), outputs(model)
    assert calibrated.prepared.token_scales == names
    assert {n for n, p in products_of(calibrated).items() if p.engine.endswith("-token")} == set(names)
    one, token = (prepare(copy.deepcopy(model), dtype) for dtype in ("int8", "int8-token"))
    errors = [distance(outputs(prepared), expected) for prepared in (calibrated, token, one)]
    assert errors[0] < 1.5 * errors[1] and errors[2] > times * errors[0], errors
    calibrated.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert (
        loaded.prepared == calibrated.prepared
        and describe(loaded).splitlines()[-1] == describe(calibrated).splitlines()[-1]
    )
    for one in (loaded, copy.deepcopy(calibrated), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(run(one, INPUTS), run(calibrated, INPUTS))
        assert {n: p.engine for n, p in products_of(one).items()} == {
            n: p.engine for n, p in products_of(calibrated).items()
        }
    return calibrated


def test_the_one_layer_with_an_outlier_gets_a_scale_for_each_token(dense, tmp_path):
    def outputs(model):
        return valid("bert", run(model, INPUTS), INPUTS)

    calibrated = check(dense, ["encoder.layer.0.output.dense"], tmp_path, outputs, times=3)
    last = describe(calibrated).splitlines()[-1]
    assert last == "a scale for each token in 1 of 13 products: encoder.layer.0.output.dense"


def test_the_one_expert_with_an_outlier_gets_a_scale_for_each_token(converted, tmp_path):
    model, name, tokens = converted

    def outputs(model):
        seen = []
        hook = moe_layers(model)[0].register_forward_hook(lambda _, args, y: seen.append(y - args[0]))
        run(model, INPUTS)
        hook.remove()
        return seen[0][tokens != 0]

    calibrated = check(model, [name], tmp_path, outputs, times=1.5)  # one of its three tokens is the outlier
    head, expert = name.rsplit(".", 1)
    assert describe(calibrated).endswith(f"in 1 of 25 products: {head}[{expert}]")


def test_a_checkpoint_loads_with_another_head_or_none(dense, tmp_path):
    """The names of its products are other ones then; those of a head that is not there are left out."""
    prepare(dense, batches=[INPUTS]).save_pretrained(tmp_path / "stack")
    headed = prepare(make("bert", AutoModelForSequenceClassification, num_labels=20), batches=[INPUTS])
    name = "encoder.layer.0.output.dense"
    headed.prepared.token_scales[:] = [f"bert.{name}", "classifier"]
    headed.save_pretrained(tmp_path / "headed")
    for folder, auto, names in (
        ("stack", AutoModelForSequenceClassification, [f"bert.{name}"]),
        ("headed", AutoModelForSequenceClassification, [f"bert.{name}", "classifier"]),
        ("headed", AutoModel, [name]),
    ):
        loaded = auto.from_pretrained(tmp_path / folder)
        assert loaded.prepared.token_scales == names
        assert {n for n, p in products_of(loaded).items() if p.engine.endswith("-token")} == set(names)


def test_without_need_nothing_changes():
    model = make("bert", **WIDE)
    calibrated = prepare(copy.deepcopy(model), batches=[INPUTS])
    assert calibrated.prepared.token_scales == [] and describe(calibrated).endswith("in 0 of 13 products")
    plain = prepare(model)
    assert torch.equal(run(calibrated, INPUTS), run(plain, INPUTS))
    assert plain.prepared.token_scales is None and "a scale for each token" not in describe(plain)


def test_an_expert_that_the_text_does_not_reach_gets_them():
    model = made("bert", "hash", wider=1, **WIDE)
    for layer in moe_layers(model):
        layer.router.table.fill_(2)
    names = prepare(model, batches=[INPUTS]).prepared.token_scales
    assert names == [
        f"encoder.layer.{n}.output.experts.{w}.{e}" for n in (0, 1) for w in ("w1", "w2") for e in (0, 1, 3)
    ]


@pytest.mark.parametrize("family", ["mixtral", "openai_privacy_filter"])
def test_experts_of_transformers(family, tmp_path):
    model = tiny(family)
    calibrated = prepare(copy.deepcopy(model), batches=[{"input_ids": IDS}])
    assert set(calibrated.prepared.token_scales) < products_of(calibrated).keys()
    assert distance(hidden(calibrated), hidden(model)) < 0.3
    calibrated.save_pretrained(tmp_path)
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path, attn_implementation="eager")), hidden(calibrated))


@pytest.mark.parametrize("family", [family for family in ONE_OF_EACH_SHAPE if family != "bert"])
def test_every_shape_of_model(family):
    inputs = make_inputs(family)
    for kind in ("dense",) if family in IMAGES else ("dense", "hash"):
        model = made(family, kind)
        calibrated = prepare(copy.deepcopy(model), batches=[inputs])
        tokens = [valid(family, run(one, inputs), inputs) for one in (calibrated, model)]
        assert distance(*tokens) < CLOSE["int8"], kind
        names = calibrated.prepared.token_scales
        # with seven bits a product of T5's loses more than calibration lets pass
        none = kind == "dense" and not SEVEN_BITS
        assert names == [] if none else set(names) < products_of(calibrated).keys()


def test_reading_ends_and_labels_are_not_needed(dense, monkeypatch):
    monkeypatch.setattr(module, "MOST_TOKENS", 40)
    tokens = int(INPUTS["attention_mask"].sum())
    batches = iter([INPUTS | {"labels": torch.tensor([-1, -1])}] * 9)
    prepare(dense, batches=batches)
    assert len(list(batches)) == 9 - -(-40 // tokens)


def test_padding_counts_where_it_decides_the_scale_alone(dense):
    """Rows of padding, which are most here, do not outvote the tokens."""
    pad = torch.nn.functional.pad
    longer = {name: pad(tensor, (0, 40)) for name, tensor in INPUTS.items()}
    assert prepare(dense, batches=[longer]).prepared.token_scales == ["encoder.layer.0.output.dense"]


@pytest.mark.parametrize("options, message", [
    ({"dtype": "int8-token", "batches": [INPUTS]}, "batches: expected them with dtype 'int8' alone"),
    ({"batches": 3}, "batches: expected a list of mappings with input_ids, got int"),
    ({"batches": INPUTS}, "batches: expected several in an iterable, got a single one; put it in a list"),
    ({"batches": ["a"]}, "batches: expected mappings with input_ids, tokenized texts, got str"),
    ({"batches": [{"input_ids": [[1, 2], [3]]}]}, r"got input_ids \(list\); call the tokenizer with padding=True and"),
    ({"batches": []}, "batches: expected text to calibrate by, got no tokens"),
    ({"batches": [{"text": torch.ones(1)}]}, "batches: expected tensors that the model takes, got text"),
    ({"batches": [{"input_ids": INPUTS["input_ids"] + 90}]}, "batches: expected input_ids from 0 to 99"),
    ({"batches": [{"input_ids": torch.ones(1, 9)}]}, "batches: expected input_ids as whole numbers"),
    ({"batches": [{"input_ids": torch.ones(1, 65, dtype=torch.int64)}]}, "batches: expected texts of at most 64"),
])  # fmt: skip
def test_refusals_leave_the_model_as_it_was(options, message):
    model = make("bert")
    before, expected = copy.deepcopy(model.state_dict()), run(model, INPUTS)
    with pytest.raises(UserError, match=message):
        prepare(model, **options)
    assert torch.equal(run(model, INPUTS), expected) and not products_of(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_decoder_needs_its_inputs():
    with pytest.raises(UserError, match=r"forward takes, got input_ids \(1, 9\) torch.int64 \("):
        prepare(make("t5"), batches=[{"input_ids": torch.ones(1, 9, dtype=torch.int64)}])


def test_padding_of_a_converted_model_decides_no_scale_behind_the_experts():
    """Padding passes the experts by: as x in float32, as 0 in int8, so that tokens alone decide the next scales."""
    for dtype in ("float32", "int8", "int8-token"):
        model, seen = prepare(made("bert", "hash"), dtype), []
        layer = moe_layers(model)[0]
        layer.register_forward_hook(lambda _, args, y, seen=seen: seen.append((args[0], y)))
        run(model, INPUTS)
        (x, y), padding = seen[0], INPUTS["attention_mask"] == 0
        assert torch.equal(y[padding], x[padding] if dtype == "float32" else torch.zeros_like(x[padding]))
        assert (y[~padding] != 0).all()
