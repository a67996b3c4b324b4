"""`prepare`: families and dtypes against the model itself, what it refuses, and saving and loading."""

import copy
import json
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DebertaConfig,
    DebertaModel,
    Trainer,
    TrainingArguments,
)

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers
from moebert_kernels.serve import PreparedConfig, describe, prepare
from moebert_kernels.serve.dtypes import DTYPES
from moebert_kernels.serve.embedding import PackedEmbedding
from moebert_kernels.serve.experts import PackedExperts
from moebert_kernels.serve.modules import PackedLinear
from moebert_kernels.serve.packed import available
from tests.convert.families import FAMILIES, IMAGES, ONE_OF_EACH_SHAPE, make, make_inputs, valid
from tests.helpers import misaligned

SPLIT = {"expert_size": 18, "num_shared_neurons": 8}
KINDS = {
    "dense": None,
    "hash": MoEConfig(**SPLIT),
    "gate": MoEConfig(router="gate-token", **SPLIT),
    "switch": MoEConfig.switch(num_experts=3),
    "top2": MoEConfig(router="top2", experts="copy", num_experts=3),
    "mpoe": MoEConfig.mpoe(num_experts=3),
}
# relative distance of the hidden states of tiny models
WIDER = 15.0
CLOSE = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.06, "int8-token": 0.06, "int8-bfloat16": 0.06}


def made(family, kind, auto=AutoModel, wider=WIDER, **changes):
    """Converted, with feed-forwards whose weights are `wider` than new ones: else they add nearly nothing."""
    model, config = make(family, auto, **changes), KINDS[kind]
    for site in find_sites(model):
        for weight in (module.weight for module in site.linear_modules):
            weight.data.mul_(wider)
    if config is None:
        return model
    with pytest.warns(UserWarning, match="no importance") if config.experts == "split" else _nothing():
        moe = convert_to_moe(model, config).eval()
    for layer in moe_layers(moe):
        if hasattr(layer.router, "gate"):
            layer.router.gate.weight.data.mul_(300)  # else rounding changes choices
    return moe


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def kinds_of(family):
    return [
        kind for kind, config in KINDS.items() if family not in IMAGES or config is None or not config.is_hash_routed
    ]


def run(model, inputs):
    dtype = next(p for p in model.parameters()).dtype
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        output = model(**inputs)
    return next(output[name] for name in ("logits", "last_hidden_state") if name in output)


def without_experts(model, inputs):
    """What a model gives whose feed-forwards, of either kind, are zero."""
    zeroed = copy.deepcopy(model)
    parts = [layer.experts for layer in moe_layers(zeroed)]
    for part in parts or [module for site in find_sites(zeroed) for module in site.linear_modules]:
        for name, parameter in part.named_parameters():
            if "norm" not in name:
                parameter.data.zero_()
    return run(zeroed, inputs)


def distance(got, wanted):
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def usual_distance(family, prepared, model):
    """The median of three inputs: in a random model rounding may grow in one token, or send it to another expert."""
    distances = []
    for seed in (1, 2, 3):
        inputs = make_inputs(family, seed=seed)
        distances.append(distance(*(valid(family, run(one, inputs), inputs) for one in (prepared, model))))
    return sorted(distances)[1]


@pytest.fixture(autouse=True)
def small_embeddings_too(monkeypatch):
    monkeypatch.setattr("moebert_kernels.serve.preparation.FEWEST_ROWS", 50)
    # a second measurement may find another engine, whose sums differ by rounding; here the numbers are compared by bits
    monkeypatch.setattr("moebert_kernels.serve.packed.available", lambda dtype: available(dtype)[-1:])


@pytest.mark.parametrize("family", ONE_OF_EACH_SHAPE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_saved_and_loaded(family, dtype, tmp_path):
    check_family(family, dtype, tmp_path, ("dense", "gate" if family in IMAGES else "hash"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_OF_EACH_SHAPE)
def test_every_router_and_kind_of_experts(family, tmp_path):
    check_family(family, "int8", tmp_path, kinds_of(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ONE_OF_EACH_SHAPE])
def test_every_family(family, tmp_path):
    """Routers and kinds of experts are packed in the same way in all of them."""
    check_family(family, "int8", tmp_path, ("dense", "gate" if family in IMAGES else "hash"))


def check_family(family, dtype, tmp_path, kinds):
    if family == "deberta" and "bfloat16" in dtype:
        pytest.skip("transformers compiles parts of it for the dtype that it sees first in a process")
    inputs = make_inputs(family)
    for kind in kinds:
        model = made(family, kind)
        expected = run(model, inputs)
        prepared = prepare(copy.deepcopy(model), dtype)
        got = run(prepared, inputs)
        assert usual_distance(family, prepared, model) < CLOSE[dtype], kind
        assert distance(without_experts(model, inputs), expected) > 3 * CLOSE[dtype], kind  # which is seen
        assert type(prepared).__name__ == type(model).__name__
        prepared.save_pretrained(tmp_path / kind)
        loaded = AutoModel.from_pretrained(tmp_path / kind)
        assert not loaded.training and loaded.dtype == prepared.dtype
        for one in (loaded, copy.deepcopy(prepared), pickle.loads(pickle.dumps(loaded))):
            assert torch.equal(run(one, inputs), got), kind
            state = one.state_dict()
            assert state.keys() == prepared.state_dict().keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in prepared.state_dict().items())
            with pytest.raises(UserError, match="train: a prepared model is for inference"):
                one.train()


@pytest.mark.parametrize("family, auto", [
    ("bert", AutoModelForMaskedLM),
    ("modernbert", AutoModelForMaskedLM),
    ("bert", AutoModelForSequenceClassification),
    ("gpt2", AutoModelForCausalLM),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_tied_weights(family, auto, dtype, tmp_path):
    inputs, model = make_inputs(family), made(family, "hash", auto)
    expected = run(model, inputs)
    prepared = prepare(model, dtype)
    got = run(prepared, inputs)
    tokens = [valid(family, hidden, inputs) if hidden.ndim == 3 else hidden for hidden in (got, expected)]
    assert distance(*tokens) < 2 * CLOSE[dtype]
    prepared.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), got)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(run(auto.from_pretrained(tmp_path / "again"), inputs), got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prepared_model_does_not_depend_on_where_the_model_lies(dtype):
    """A head is not packed, and products of some CPUs sum in another order where a file begins a tensor."""
    model = made("bert", "gate", AutoModelForSequenceClassification, num_labels=4)
    text = {name: tensor[:1] for name, tensor in make_inputs("bert").items()}
    here, there = (prepare(one, dtype) for one in (copy.deepcopy(model), misaligned(model, by=2)))
    assert torch.equal(run(here, text), run(there, text))


def test_what_becomes_of_the_modules():
    model = made("bert", "gate", AutoModelForSequenceClassification)
    positions = model.bert.embeddings.position_embeddings.weight.shape[0]
    prepared = prepare(model)
    layer = moe_layers(prepared)[0]
    assert isinstance(layer.experts, PackedExperts) and layer.experts.adds_residual
    assert type(layer.router.gate) is nn.Linear  # a gate's choice is between logits that are close
    assert type(prepared.classifier) is nn.Linear  # two outputs
    assert isinstance(prepared.bert.encoder.layer[0].attention.self.query, PackedLinear)
    assert isinstance(prepared.bert.embeddings.word_embeddings, PackedEmbedding)
    assert positions == 64 and type(prepared.bert.embeddings.position_embeddings) is nn.Embedding
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    lines = describe(prepared).splitlines()
    assert any(line.startswith("experts") and "32 -> 18" in line and "int8: " in line for line in lines)


def test_embeddings_whose_weight_a_model_reads_are_left(tmp_path):
    """DeBERTa's relative positions."""
    config = DebertaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"],
    )  # fmt: skip
    prepared = prepare(DebertaModel(config).eval())
    assert isinstance(prepared.embeddings.word_embeddings, PackedEmbedding)
    assert prepared.encoder.rel_embeddings.num_embeddings >= 50 and run(prepared, make_inputs("bert")).isfinite().all()


def test_padding_costs_nothing_and_changes_nothing():
    """The grouping leaves padding out, also where it would decide the scale of the activations."""
    model, inputs = made("bert", "hash"), make_inputs("bert")
    rows = []
    prepared = prepare(model, "float32")
    for layer in moe_layers(prepared):
        outputs = layer.experts._outputs
        layer.experts._outputs = lambda x, bounds, outputs=outputs: rows.append(len(x)) or outputs(x, bounds)
    run(prepared, inputs)
    assert rows == [int(inputs["attention_mask"].sum())] * 2


def test_few_and_many_rows_of_an_expert_are_the_same():
    model = prepare(made("bert", "hash"))
    inputs = make_inputs("bert")
    few = run(model, inputs)
    for rows in (1, 5, 12):
        for layer in moe_layers(model):
            layer.experts._rows_together = rows
        assert distance(run(model, inputs), few) < 1e-6


def test_half_precision_models_too():
    for dtype in DTYPES:
        prepared = prepare(made("bert", "hash").bfloat16(), dtype)
        assert prepared.dtype == (torch.bfloat16 if "bfloat16" in dtype else torch.float32)
        assert torch.isfinite(run(prepared, make_inputs("bert"))).all()


@pytest.mark.parametrize("change, message", [
    ({"dtype": "int4"}, "dtype: expected one of int8, int8-token, int8-bfloat16, bfloat16, float32, got 'int4'"),
    ({"tokens": 0}, "tokens: expected an integer of at least 1, got 0"),
    ({"tokens": True}, "tokens: expected an integer of at least 1, got True"),
    ({"model": nn.Linear(4, 4)}, "model: expected a model of transformers, got Linear"),
])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(UserError, match=message):
        prepare(**{"model": make("bert"), "dtype": "int8"} | change)


def test_refuses_what_is_prepared_elsewhere_or_empty():
    prepared = prepare(make("bert"))
    with pytest.raises(UserError, match="model: expected one that is not prepared, got one that is"):
        prepare(prepared)
    with torch.device("meta"):
        empty = make("bert")
    with pytest.raises(UserError, match=r"model: expected all weights on the CPU, got embeddings.* on meta"):
        prepare(empty)
    tiny = make("bert", hidden_size=8, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(UserError, match="model: expected linear layers with at least 16 outputs, found none"):
        prepare(tiny)


def test_warns_on_slow_cpus(monkeypatch):
    monkeypatch.setattr("moebert_kernels.cpu.capabilities", lambda: {"avx2": True})
    with pytest.warns(UserWarning, match="no int8 dot products"):
        prepare(make("bert"), "int8")
    with pytest.warns(UserWarning, match="no bfloat16 instructions"):
        prepare(make("bert"), "bfloat16")


def test_a_trainer_refuses_in_one_line(tmp_path):
    model = prepare(made("bert", "hash", AutoModelForSequenceClassification))
    data = [{**{k: v[0] for k, v in make_inputs("bert").items()}, "labels": 1}]
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True), train_dataset=data
    )
    with pytest.raises(UserError, match="train: a prepared model is for inference"):
        trainer.train()


@pytest.fixture
def folder(tmp_path):
    prepare(made("bert", "hash")).save_pretrained(tmp_path)
    return tmp_path


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    for name in ("encoder.layer.1.output.experts.w2_scale", "encoder.layer.0.attention.self.key.weight"):
        save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"checkpoint: expected a tensor {name}, got none"):
            AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("change, message", [
    ({"dtype": "int3"}, "dtype: expected one of int8, int8-token, int8-bfloat16, bfloat16, float32, got 'int3'"),
    ({"tokens": "many"}, "tokens: expected an integer of at least 1, got 'many'"),
    ({"format_version": 9}, "format_version: expected 1, got 9"),
    ({"speed": 3}, "speed: expected a field of PreparedConfig"),
    ({"token_scales": ["pooler"]}, "token_scales: expected names of this model's products, got 'pooler'"),
    ({"token_scales": "all"}, "token_scales: expected a list of names, got 'all'"),
    ({"dtype": "int8-token", "token_scales": []}, "token_scales: expected them with dtype 'int8' alone, got"),
    ({"moe": {"router": "oracle"}}, "router: expected one of"),
])  # fmt: skip
def test_a_wrong_configuration_is_named(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        AutoModel.from_pretrained(folder)


def test_the_configuration_of_the_model_stays_its_own(folder):
    loaded = AutoModel.from_pretrained(folder)
    assert isinstance(loaded.config.quantization_config, MoEConfig)
    assert isinstance(loaded.prepared, PreparedConfig) and loaded.prepared.moe["router"] == "hash-random"
    dense = prepare(make("bert"))
    assert not hasattr(dense.config, "quantization_config")
    dense.save_pretrained(folder / "dense")
    assert not hasattr(dense.config, "quantization_config")
    assert not hasattr(AutoModel.from_pretrained(folder / "dense").config, "quantization_config")


def test_the_dtype_is_that_of_the_checkpoint(folder):
    assert AutoModel.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.float32


def test_an_int8_checkpoint_has_a_quarter_of_the_size(tmp_path, monkeypatch):
    monkeypatch.undo()
    model = convert_to_moe(
        BertModel(
            BertConfig(
                num_hidden_layers=2, num_attention_heads=4, hidden_size=256, intermediate_size=1024, vocab_size=4000
            )
        ),
        importance=torch.rand(2, 1024),
    )
    model.save_pretrained(tmp_path / "float")
    prepare(model).save_pretrained(tmp_path / "int8")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "int8")]
    assert sizes[1] < 0.3 * sizes[0]  # embeddings of positions, norms and tables stay as they are


def test_a_model_that_was_trained_under_autocast():
    """accelerate leaves the autocast on its forward, in which int8's engines would meet bfloat16."""
    model, inputs = made("bert", "hash"), make_inputs("bert")
    twin = copy.deepcopy(model)
    AcceleratorState._reset_state(True)  # of other tests' trainers
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    AcceleratorState._reset_state(True)
    with torch.no_grad():
        expected = prepare(twin, "int8")(**inputs).last_hidden_state
        assert torch.equal(prepare(model, "int8")(**inputs).last_hidden_state, expected)


def test_what_transformers_keeps_in_float32_stays_so():
    """Names that hold a pattern, of parameters and of buffers."""
    model = make("bert")
    model._keep_in_fp32_modules_strict = {"LayerNorm.weight", "encoder.*.counts"}
    model.encoder.layer[0].register_buffer("counts", torch.ones(3))
    model.register_buffer("others", torch.ones(3))
    half = prepare(model, "bfloat16")
    assert half.encoder.layer[0].counts.dtype == half.embeddings.LayerNorm.weight.dtype == torch.float32
    assert half.others.dtype == half.embeddings.LayerNorm.bias.dtype == torch.bfloat16
