"""Attention that hands its tokens to the experts in their order computes what it does in the order of the tokens."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModel

from moebert_kernels import backend
from moebert_kernels.convert import convert_to_moe
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, expert_order, moe_layers, set_expert_order
from moebert_kernels.serve import prepare
from tests.convert import families
from tests.helpers import assert_as_accurate, checkpoint_activations
from tests.layers import kinds

BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "layoutlm", "big_bird")
KINDS = ("split-bert-hash", "one_norm")
LAYERS = 2


def model(kind="split-bert-hash", family="bert", **changes):
    """Of a family, with experts that have norms of their own, or with the layer's one norm."""
    if family == "bert" and kind != "one_norm":
        return kinds.model(kind)
    config = MoEConfig(router="hash-random", num_experts=3, norm="layer" if kind == "one_norm" else None, **changes)
    return convert_to_moe(families.make(family), config, importance=torch.rand(LAYERS, 48)).eval()


def run(net, inputs, dtype=None):
    """The first output, and the gradients of all parameters that get one."""
    net = net if dtype is None else copy.deepcopy(net).to(dtype)
    y = net(**inputs)[0]
    wanted = [p for p in net.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, y.numel()).sin().view_as(y).to(y.dtype)
    return [y, *(g for g in torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True) if g is not None)]


@pytest.fixture
def written(monkeypatch):
    """Shapes of what was written in the order of the experts."""
    shapes, op = [], expert_order.add_norm_in_order

    def noted(*args, **kwargs):
        rows = op(*args, **kwargs)
        shapes.append(tuple(rows.shape))
        return rows

    monkeypatch.setattr(expert_order, "add_norm_in_order", noted)
    return shapes


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind, family", [*((kind, "bert") for kind in KINDS), ("one_norm", "roberta")])
def test_values_and_gradients(kind, family, padded, written):
    net, inputs = model(kind, family), families.make_inputs(family, padded)
    inputs["input_ids"] %= net.config.vocab_size
    plain, exact = run(net, inputs), run(net, inputs, torch.float64)
    assert set_expert_order(net) == LAYERS
    written.clear()
    got = run(net, inputs)
    assert written == [(*inputs["input_ids"].shape, net.config.hidden_size)] * LAYERS
    for i, tensors in enumerate(zip(got, plain, exact, strict=True)):
        assert_as_accurate(*tensors, name=f"result {i}")


@pytest.mark.parametrize("family", BERT_LIKE[2:])
def test_families_of_the_same_shape(family, written):
    net, inputs = model(family=family), families.make_inputs(family)
    with torch.no_grad():
        plain = net(**inputs)[0]
        assert set_expert_order(net) == LAYERS
        written.clear()
        torch.testing.assert_close(net(**inputs)[0], plain, rtol=1e-4, atol=1e-5)
    assert len(written) == LAYERS


def test_triton_in_its_interpreter(written):
    pytest.importorskip("triton")
    net, inputs = kinds.model("split-bert-hash"), kinds.batch("split-bert-hash", length=6)
    with torch.no_grad(), backend.use_backend("torch"):
        plain = net(**inputs).logits
        set_expert_order(net)
    written.clear()
    with torch.no_grad(), backend.use_backend("triton", strict=True):
        torch.testing.assert_close(net(**inputs).logits, plain, rtol=1e-4, atol=1e-4)
    assert len(written) == LAYERS


def test_off_is_the_model_that_it_was(written):
    net, inputs = model(), kinds.batch("split-bert-hash")
    plain, classes = net(**inputs).logits, [type(module) for module in net.modules()]
    set_expert_order(net)
    assert set_expert_order(net) == LAYERS  # twice is once
    assert set_expert_order(net, False) == LAYERS
    written.clear()
    assert torch.equal(net(**inputs).logits, plain) and not written
    assert [type(module) for module in net.modules()] == classes


@pytest.mark.parametrize("autocast", [False, True])
def test_training_with_dropout_and_checkpoints(autocast, written):
    """Recomputed layers draw the masks of their first run, and hand on rows of their own."""
    inputs, found = kinds.batch("split-bert-hash", labels=True), []
    for recompute in (False, True):
        net = model().train()
        set_expert_order(net)
        if recompute:
            checkpoint_activations(net)
        written.clear()
        torch.manual_seed(3)
        with torch.autocast("cpu", enabled=autocast):
            found.append(run(net, inputs))
        assert len(written) == LAYERS * (1 + recompute)
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)
    torch.manual_seed(4)
    assert not torch.equal(run(net, inputs)[0], got := found[0][0]) and torch.isfinite(got)


def test_saved_and_loaded_as_without(tmp_path):
    net, inputs = model("one_norm"), families.make_inputs("bert")
    keys = list(net.state_dict())
    plain = net(**inputs)[0]
    set_expert_order(net)
    assert list(net.state_dict()) == keys
    net.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert not any(hasattr(module, "moe_layer") for module in loaded.modules())
    torch.testing.assert_close(loaded(**inputs)[0], plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies_have_layers_of_their_own(copied, written):
    net, inputs = model(), kinds.batch("split-bert-hash")
    set_expert_order(net)
    plain, other = net(**inputs).logits, copied(net)
    with torch.no_grad():
        for layer in moe_layers(net):
            layer.experts.w1.zero_()
    written.clear()
    assert torch.equal(other(**inputs).logits, plain) and len(written) == LAYERS
    own = moe_layers(other)
    assert [m.moe_layer for m in other.modules() if hasattr(m, "moe_layer")] == own


def test_replicas_of_data_parallel(written):
    net, inputs = model(), kinds.batch("split-bert-hash")
    plain = net(**inputs).logits
    set_expert_order(net)
    written.clear()
    torch.testing.assert_close(kinds.replica(net)(**inputs).logits, plain, rtol=1e-4, atol=1e-5)
    assert len(written) == LAYERS


def test_prepared_models_keep_the_order_of_the_tokens(written, monkeypatch):
    # a second measurement may find another engine, whose sums differ by rounding
    monkeypatch.setattr("moebert_kernels.serve.packed.available", lambda dtype: ["plain"])
    net, inputs = model(), kinds.batch("split-bert-hash")
    plain = prepare(copy.deepcopy(net), "float32", tokens=8)(**inputs).logits
    set_expert_order(net)
    written.clear()
    assert torch.equal(prepare(net, "float32", tokens=8)(**inputs).logits, plain) and not written


def test_compiled_models_keep_the_order_of_the_tokens(written):
    net, inputs = model(), kinds.batch("split-bert-hash")
    plain = net(**inputs).logits
    set_expert_order(net)
    written.clear()
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, plain, rtol=1e-4, atol=1e-5)
    assert not written


def test_a_hook_that_changes_what_is_handed_on_is_an_error():
    net, inputs = model(), kinds.batch("split-bert-hash")
    set_expert_order(net)
    hook = net.bert.encoder.layer[1].attention.register_forward_hook(lambda *_: (_[2][0] * 1, *_[2][1:]))
    with pytest.raises(ValueError, match=r"hidden_states: expected the tensor that the attention wrote .*False\)"):
        net(**inputs)
    hook.remove()
    net(**inputs)
    net.bert.encoder.layer[0].attention.output.LayerNorm.register_forward_hook(lambda *_: None)
    net(**inputs)  # whose norm runs itself


def test_a_layer_that_uses_its_attention_twice_is_left_alone():
    net, inputs = model(), kinds.batch("split-bert-hash")
    layer = net.bert.encoder.layer[0]
    plain = type(layer).forward

    class Twice(type(layer)):
        def forward(self, hidden_states, *args, **kwargs):
            return plain(self, hidden_states, *args, **kwargs) + self.attention(hidden_states, *args, **kwargs)[0]

    layer.__class__ = Twice
    wanted = net(**inputs).logits
    assert set_expert_order(net) == LAYERS - 1
    torch.testing.assert_close(net(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mpoe-gpt2-hash", "mpoe-bert-hash", "split-bert-gate", "split-bert-task"])
def test_models_without_such_a_layer_are_refused(kind):
    with pytest.raises(UserError, match=r"model: expected a converted encoder of BERT's family with hash routing"):
        set_expert_order(kinds.model(kind))


@pytest.mark.parametrize("family", ["mpnet", "megatron-bert", "distilbert"])
def test_families_of_another_shape_are_refused(family):
    with pytest.raises(UserError, match="without such a layer"):
        set_expert_order(model(family=family))
