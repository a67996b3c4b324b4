"""Exported models in ONNX Runtime, against the model, on ragged batches."""

import importlib.util

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from moebert_kernels import errors
from moebert_kernels.convert import convert_to_moe
from moebert_kernels.errors import MissingExtra, UserError
from moebert_kernels.layers import MoEConfig, moe_layers
from moebert_kernels.serve import export_onnx, prepare
from moebert_kernels.serve.onnx import StandardExperts, standard
from tests.convert.families import make, one_layer
from tests.serve.test_prepare import made

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra serve: onnx, onnxscript, onnxruntime",
)


def session_of(model, path, **options):
    import onnxruntime

    export_onnx(model, path, **options)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def ragged(generator):
    """A batch of texts of several lengths, padded on the right."""
    B, T = (int(torch.randint(1, most, (), generator=generator)) for most in (5, 20))
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator)
    lengths[0] = T
    mask = (torch.arange(T) < lengths).long()
    return {"input_ids": torch.randint(3, 99, (B, T), generator=generator) * mask, "attention_mask": mask}


def outputs_of(session, batch):
    wanted = [entry.name for entry in session.get_inputs()]
    given = dict(batch)
    if "token_type_ids" in wanted:
        given["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    found = session.run(None, {name: given[name].numpy() for name in wanted})
    return {entry.name: torch.from_numpy(value) for entry, value in zip(session.get_outputs(), found, strict=True)}


def check(model, session, batches, close=2e-5):
    seed = torch.Generator().manual_seed(7)
    for _ in range(batches):
        batch = ragged(seed)
        with torch.no_grad():
            expected = model(**batch)
        for name, got in outputs_of(session, batch).items():
            want = expected[name]
            assert got.shape == want.shape, name
            if name in ("last_hidden_state", "start_logits", "end_logits"):  # what stands at padding is nobody's
                got, want = got[batch["attention_mask"] != 0], want[batch["attention_mask"] != 0]
            assert (got - want).abs().max() <= close * max(1.0, float(want.abs().max())), name


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("family, kind", [
    ("mpnet", "hash"), ("distilbert", "switch"), ("modernbert", "top2"),  # attention of every form
    ("bert", "dense"), ("bert", "gate"), ("bert", "mpoe"),
])  # fmt: skip
def test_fifty_ragged_batches(family, kind, tmp_path):
    model = made(family, kind, **one_layer(family))
    check(model, session_of(model, tmp_path / "model.onnx"), 50)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("auto, outputs", [
    (AutoModelForSequenceClassification, ["logits"]),
    (AutoModelForQuestionAnswering, ["start_logits", "end_logits"]),
])  # fmt: skip
def test_heads(auto, outputs, tmp_path):
    model = made("bert", "hash", auto, num_hidden_layers=1)
    session = session_of(model, tmp_path / "model.onnx")
    assert [entry.name for entry in session.get_outputs()] == outputs
    assert [entry.name for entry in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    check(model, session, 5)


@needs_onnx
def test_one_type_of_token_is_no_input(tmp_path):
    """RoBERTa's tokenizers make none, and other packages give it none."""
    model = made("bert", "dense", num_hidden_layers=1, type_vocab_size=1)
    session = session_of(model, tmp_path / "model.onnx")
    assert [entry.name for entry in session.get_inputs()] == ["input_ids", "attention_mask"]
    check(model, session, 1)


@needs_onnx
@pytest.mark.slow
def test_int8(tmp_path):
    """Every product of two matrices with a weight in it becomes one of integers; padding decides no scale of one."""
    import onnx

    model = large_at_padding()
    check(model, session_of(model, tmp_path / "model.onnx", dtype="int8"), 10, close=0.05)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    experts = model.config.quantization_config.num_experts
    assert (
        operators.count("MatMulInteger") == 2 * (4 + 2 * experts) + 1
    )  # attention and experts of two layers, a pooler


@needs_onnx
@pytest.mark.slow
def test_int8_leaves_gates_and_small_heads(tmp_path):
    import onnx

    model = convert_to_moe(
        make("bert", AutoModelForSequenceClassification, num_hidden_layers=1),
        MoEConfig(router="gate-token", experts="copy", num_experts=16),  # fewer are kept as small layers are
    )
    session_of(model, tmp_path / "model.onnx", dtype="int8")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert [node.op_type for node in nodes].count("MatMulInteger") == 4 + 2 * 16 + 1


def large_at_padding():
    """A model in which padding would decide the scale of attention's inputs, and attention matters."""
    model = made("bert", "hash")
    first, second = (layer.attention for layer in model.encoder.layer)
    first.output.LayerNorm.weight.data.mul_(50)
    for linear in (second.self.query, second.self.key, second.self.value, second.output.dense):
        linear.weight.data.mul_(8)
    return model


def test_padding_is_zero_behind_the_experts():
    layer, x, ids = moe_layers(made("bert", "hash"))[0], torch.randn(2, 5, 32), torch.randint(4, (2, 5))
    ids[1, 3:] = -1
    with torch.no_grad():
        expected, got = layer.experts(x, ids), StandardExperts(layer)(x, ids)
    assert torch.equal(expected[1, 3:], x[1, 3:]) and not got[1, 3:].any()
    assert (got - expected)[ids >= 0].abs().max() < 1e-5


def test_tokens_that_a_router_drops_pass_by_the_experts():
    config = MoEConfig.switch(num_experts=4, norm="expert", router_options={"capacity_factor": 0.5})
    layer, x = moe_layers(convert_to_moe(make("bert", AutoModel), config))[0], torch.randn(2, 5, 32)
    ids = torch.randint(4, (2, 5))
    ids[1, 3:] = -1
    with torch.no_grad():
        expected, got = layer.experts(x, ids), StandardExperts(layer)(x, ids)
    assert torch.equal(got[1, 3:], x[1, 3:]) and (got - expected).abs().max() < 1e-5


@needs_onnx
def test_exported_model_on_ragged_batches(tmp_path):
    model = made("bert", "hash", num_hidden_layers=1)
    training = model.training
    check(model, session_of(model, tmp_path / "model.onnx"), 5)
    assert model.training == training and type(model.encoder.layer[0].output.experts).__name__ == "NormedExperts"


LIMITED = (
    MoEConfig.switch(num_experts=4, router_options={"capacity_factor": 0.5}),
    MoEConfig(router="top2", experts="copy", num_experts=3, router_options={"eval_capacity_factor": 0.5}),
)


def limited(config):
    model = convert_to_moe(make("bert", AutoModel, num_hidden_layers=1), config).eval()
    moe_layers(model)[0].router.gate.weight.data.mul_(300)  # else rounding changes choices
    return model


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("config", LIMITED)
def test_the_capacity_is_that_of_the_batch(config, tmp_path):
    """The exporter's example has two sequences of six tokens."""
    model = limited(config)
    session = session_of(model, tmp_path / "model.onnx")
    for B, T in ((1, 3), (5, 41)):
        ids = torch.randint(3, 99, (B, T), generator=torch.Generator().manual_seed(7))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            expected = model(**batch).last_hidden_state
        assert (outputs_of(session, batch)["last_hidden_state"] - expected).abs().max() < 2e-5


@pytest.mark.parametrize("config", LIMITED)
def test_a_traced_capacity_is_that_of_the_batch(config):
    router, free = moe_layers(standard(limited(config), StandardExperts))[0].router, torch.export.Dim.DYNAMIC
    traced = torch.export.export(router, (torch.randn(2, 6, 32),), dynamic_shapes=({0: free, 1: free},)).module()
    for B, T in ((2, 3), (5, 41)):
        x = torch.randn(B, T, 32)
        assert torch.equal(traced(x)[0], router(x)[0])
    assert (router(x)[0] < 0).any()


def test_refusals(tmp_path):
    path = tmp_path / "model.onnx"
    for model, message in (
        (torch.nn.Linear(2, 2), "model: expected a model of transformers, got Linear"),
        (make("t5"), "model: expected an encoder or a causal language model, got T5Model"),
        (make("vit"), "model: expected an encoder of texts or a causal language model, got ViTModel"),
        (prepare(make("bert")), "model: expected one that is not prepared"),
    ):
        with pytest.raises(UserError, match=message):
            export_onnx(model, path)
    with pytest.raises(UserError, match="dtype: expected float32 or int8 in an ONNX file, got 'bfloat16'"):
        export_onnx(make("bert"), path, dtype="bfloat16")
    assert not path.exists()


def test_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[serve\]'"):
        export_onnx(make("bert"), tmp_path / "model.onnx")


def test_routing_by_task_is_refused(tmp_path):
    model = make("bert")
    model.config.quantization_config = MoEConfig.task(["a", "b"])
    with pytest.raises(UserError, match="model: expected one without routing by task"):
        export_onnx(model, tmp_path / "model.onnx")


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hash", "top2"])
def test_one_operator_for_all_experts(kind, tmp_path):
    import onnx

    model = made("bert", kind, hidden_act="gelu_new")
    check(model, session_of(model, tmp_path / "model.onnx", experts="operator"), 50)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count("MoE") == 2 and "NonZero" not in operators


@needs_onnx
@pytest.mark.slow
def test_one_operator_and_gelu(tmp_path):
    """The model's gelu is the form with erf."""
    model = made("bert", "hash", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="activations differ by up to 0.0005"):
        session = session_of(model, tmp_path / "model.onnx", experts="operator")
    check(model, session, 5, close=5e-3)


@pytest.mark.parametrize("kind, options, message", [
    ("dense", {}, 'experts: expected "matrices" for a model without experts'),
    ("hash", {"dtype": "int8"}, 'dtype: expected float32 with experts="operator", got \'int8\''),
    ("hash", {"experts": "all"}, "experts: expected one of matrices, operator, got 'all'"),
])  # fmt: skip
def test_refusals_of_the_operator(kind, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export_onnx(made("bert", kind), tmp_path / "model.onnx", **{"experts": "operator"} | options)


def test_an_activation_that_the_operator_does_not_have(tmp_path):
    with pytest.raises(UserError, match=r"for the activation 'geglu', got .operator., which has gelu_tanh, identity"):
        export_onnx(made("modernbert", "hash"), tmp_path / "model.onnx", experts="operator")
