"""Saving, loading, and what is said about a checkpoint that cannot be loaded."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    BertModel,
    logging,
)

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.convert.loading import MoELoader
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_config, moe_layers
from tests.convert.families import make
from tests.convert.models import CLASSES, ROUTERS, V, dense_model, inputs, moe_model
from tests.helpers import ROOT, assert_same_model

AUTO = {
    "cls": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
}
LAYER = "bert.encoder.layer.1.output"
TABLE = f"{LAYER}.router.table"
POOLER = "bert.pooler.dense.weight"
OLD = Version(transformers.__version__) < Version("5.23")


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ["bert-cls", "roberta-qa", "bert-mlm", "xlm-roberta-tokens", "roberta"])
def test_same_logits_after_reload(tmp_path, name, router):
    model = moe_model(name, router=router, dense={"pad_token_id": 1})
    model.save_pretrained(tmp_path)
    files = sorted(os.listdir(tmp_path))
    assert files == ["README.md", "config.json", "model.safetensors"]
    torch.manual_seed(99)  # a table drawn again would be another one
    again = AUTO.get(name.split("-")[-1], AutoModel).from_pretrained(tmp_path)
    assert isinstance(again, CLASSES[name][1]) and not again.training
    assert again.config.quantization_config == model.config.quantization_config
    batch = inputs(pad_token_id=1)
    assert_same_model(again, model, lambda model: model(**batch)[0])
    if name == "bert-mlm":
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.slow
def test_same_logits_in_a_new_process(tmp_path):
    model, batch = moe_model(), inputs()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)  # bitwise the same from the same file
    save_file(batch | {"logits": loaded(**batch).logits.detach()}, tmp_path / "wanted.safetensors")
    program = (
        "import sys, torch; from safetensors.torch import load_file\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "import moebert_kernels.convert\n"
        "torch.manual_seed(7)\n"
        "wanted = load_file(sys.argv[1] + '/wanted.safetensors'); logits = wanted.pop('logits')\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "assert torch.equal(model(**wanted).logits, logits)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)


def test_encoder_alone_and_shards(tmp_path):
    model = moe_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    batch = inputs()
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "encoder")
    for encoder in (AutoModel.from_pretrained(tmp_path), BertModel.from_pretrained(tmp_path / "encoder")):
        assert_same_model(encoder, model.bert, lambda encoder: encoder(**batch).last_hidden_state)
    assert moe_config(AutoConfig.from_pretrained(tmp_path)) == model.config.quantization_config
    headed = BertForSequenceClassification.from_pretrained(tmp_path / "encoder")
    assert_same_model(headed.bert, model.bert, lambda encoder: encoder(**batch).last_hidden_state)


def test_dtype_and_options_on_load(tmp_path):
    moe_model().save_pretrained(tmp_path)
    half = BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = moe_layers(half)[0]
    assert layer.experts.w1.dtype == torch.bfloat16 and layer.router.table.dtype == torch.uint8
    model, info = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, BertForSequenceClassification) and not info["missing_keys"]


@pytest.mark.skipif(OLD, reason="transformers draws no head anew where a loader takes part")
def test_a_head_of_another_size_is_drawn_where_that_is_asked_for(tmp_path):
    moe_model().save_pretrained(tmp_path)
    five = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert five.classifier.out_features == 5
    moe_model("roberta-cls").save_pretrained(tmp_path / "roberta")
    five = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "roberta", num_labels=5, ignore_mismatched_sizes=True
    )
    assert five.classifier.out_proj.out_features == 5  # the other layer of the head is that of the checkpoint
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # transformers' own
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "roberta", num_labels=5)


@pytest.mark.parametrize("ignored", [False, True])
def test_transformers_that_draws_no_head_anew_gives_none_of_another_size(tmp_path, monkeypatch, ignored):
    moe_model().save_pretrained(tmp_path)
    monkeypatch.setattr(MoELoader, "param_needs_quantization", lambda *_, **__: True)  # as before 5.23 for all
    with pytest.raises(UserError, match=r"classifier.weight: expected shape \(5, \d+\), got \(3, \d+\); .* 5\.23"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=ignored)


@pytest.mark.parametrize("name", ["bert-cls", "bert-mlm"])
@pytest.mark.parametrize("size", [V + 7, V - 7])
def test_resized_vocabulary(tmp_path, name, size):
    model = moe_model(name)
    tables = [layer.router.table.clone() for layer in moe_layers(model)]
    model.resize_token_embeddings(size)
    for old, layer in zip(tables, moe_layers(model), strict=True):
        assert layer.router.vocab_size == size and int(layer.router.table.max()) < 4
        kept = min(size, V)
        assert torch.equal(layer.router.table[:kept], old[:kept])
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, size, (2, 8))
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert_same_model(again, model, lambda model: model(ids)[0])


def change_tensor(folder, key, value):
    """Replace a tensor in the saved model, or remove it if `value` is None."""
    tensors = load_file(folder / "model.safetensors") | {key: value}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **fields):
    """Of the mixtures, in the saved model's configuration."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


def leave_out(folder, key):
    """Only a copy that transformers does not read has the tensor."""
    shutil.copy(folder / "model.safetensors", folder / "model_old.safetensors")
    change_tensor(folder, key, None)


def change_index(folder, file):
    """Say of one tensor that it lies in this file."""
    (folder / "model.safetensors").unlink()
    moe_model().save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][f"{LAYER}.experts.w1"] = file
    index.write_text(json.dumps(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "short table": (
        lambda folder: change_tensor(folder, TABLE, torch.zeros(50, dtype=torch.uint8)),
        rf"{TABLE}: expected shape \(60,\), one entry per token of the vocabulary, got \(50,\)",
    ),
    "value no expert": (
        lambda folder: change_tensor(folder, TABLE, torch.full((60,), 4)),
        rf"{TABLE}: expected experts in \[0, 4\), got values from 4 to 4",
    ),
    "value that wraps": (
        lambda folder: change_tensor(folder, TABLE, torch.full((60,), 256)),
        rf"{TABLE}: expected experts in \[0, 4\), got values from 256 to 256",
    ),
    "no table": (lambda folder: change_tensor(folder, TABLE, None), f"expected a tensor {TABLE}, got none"),
    "other experts": (
        lambda folder: change_config(folder, num_experts=5),
        r"layer.0.output.experts.b1: expected shape \(5, 12\), got \(4, 12\)",
    ),
    "other router": (lambda folder: change_config(folder, router="gate-token"), "expected a tensor .*gate.weight"),
    "unknown router": (lambda folder: change_config(folder, router="x"), "router: expected one of hash-random"),
    "unknown field": (lambda folder: change_config(folder, tail=1), "tail: expected a field of MoEConfig"),
    "newer format": (lambda folder: change_config(folder, format_version=9), "format_version: expected 1, got 9"),
    "truncated": (
        lambda folder: truncate(folder / "model.safetensors"),
        "expected a whole safetensors file, got a damaged",
    ),
    "no word embeddings": (
        lambda folder: change_tensor(folder, "bert.embeddings.word_embeddings.weight", None),
        "expected a tensor bert.embeddings.word_embeddings.weight, got none",
    ),
    "no attention": (
        lambda folder: change_tensor(folder, "bert.encoder.layer.1.attention.self.query.weight", None),
        "expected a tensor bert.encoder.layer.1.attention.self.query.weight, got none",
    ),
    "half a head": (lambda folder: change_tensor(folder, "classifier.weight", None), "a tensor classifier.weight, got"),
    "half a pooler": (lambda folder: change_tensor(folder, POOLER, None), f"expected a tensor {POOLER}, got none"),
    "experts in a file that is not loaded": (
        lambda folder: leave_out(folder, f"{LAYER}.experts.w1"),
        f"expected a tensor {LAYER}.experts.w1, got none",
    ),
    "index out of the folder": (
        lambda folder: change_index(folder, "../other.safetensors"),
        "checkpoint: expected files of one folder in its index, got ",
    ),
    "table of floats": (
        lambda folder: change_tensor(folder, TABLE, torch.zeros(60)),
        f"{TABLE}: expected integers, got torch.float32",
    ),
    "complex weights": (
        lambda folder: change_tensor(folder, POOLER, torch.zeros(16, 16, dtype=torch.complex64)),
        f"{POOLER}: expected floating-point numbers, got C64",
    ),
    "integer weights": (
        lambda folder: change_tensor(folder, POOLER, torch.zeros(16, 16, dtype=torch.int64)),
        f"{POOLER}: expected floating-point numbers, got I64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_rejects_a_damaged_checkpoint(tmp_path, damage):
    moe_model().save_pretrained(tmp_path)
    apply, message = DAMAGE[damage]
    apply(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        BertForSequenceClassification.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_table_of_another_vocabulary_is_refused_before_memory_is_taken(tmp_path):
    """A word embedding of 2^31 - 1 words would be 128 GiB."""
    moe_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 2**31 - 1}))
    with pytest.raises(UserError, match=r"router.table: expected shape \(2147483647,\), one entry .*, got \(60,\)"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["model_backup.safetensors", "model.fp16.safetensors", "model-00001-of-00001.safetensors"]
)
def test_files_that_are_not_loaded_do_not_matter(tmp_path, name):
    model, batch = moe_model(), inputs()
    model.save_pretrained(tmp_path)
    save_file(moe_model(num_experts=2).state_dict(), tmp_path / name)
    (tmp_path / "model_quantised.safetensors").write_bytes(b"not one")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_model(again, model, lambda model: model(**batch).logits)


def test_what_a_checkpoint_has_nothing_of_is_new(tmp_path):
    moe_model("bert-mlm").save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    wanted = {f"{name}.{kind}" for name in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")}
    assert info["missing_keys"] == wanted and torch.isfinite(model(**inputs()).logits).all()
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "encoder")
    tied = AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder")  # a new head, of which one matrix is there
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


SWAPS = [
    ("bert", AutoModelForMaskedLM, AutoModelForPreTraining, {"cls.seq_relationship.weight"}),
    ("bert", AutoModelForNextSentencePrediction, AutoModelForPreTraining, {"cls.predictions.transform.dense.weight"}),
    ("bert", AutoModelForCausalLM, AutoModelForPreTraining, {"cls.seq_relationship.weight"}),
    ("llama", AutoModelForSequenceClassification, AutoModelForTokenClassification, {"score.bias"}),
    ("vit", AutoModelForImageClassification, AutoModelForMaskedImageModeling, {"vit.embeddings.mask_token"}),
]  # fmt: skip


@pytest.mark.parametrize("family, saved, wanted, new", SWAPS)
def test_another_class_may_have_more_of_a_head(family, saved, wanted, new, tmp_path):
    convert_to_moe(make(family, saved), MoEConfig.switch(num_experts=2)).save_pretrained(tmp_path)
    model, info = wanted.from_pretrained(tmp_path, output_loading_info=True)
    assert new <= info["missing_keys"] and moe_layers(model)
    model.save_pretrained(tmp_path / "again")
    for name in new:  # the same class has to have it
        change_tensor(tmp_path / "again", name, None)
        with pytest.raises(UserError, match=f"checkpoint: expected a tensor {name}, got none"):
            wanted.from_pretrained(tmp_path / "again")


def test_another_class_does_not_make_a_broken_head_whole(tmp_path):
    moe_model().save_pretrained(tmp_path)
    change_tensor(tmp_path, "classifier.weight", None)
    with pytest.raises(UserError, match=r"checkpoint: expected a tensor classifier\.weight, got none"):
        AutoModelForTokenClassification.from_pretrained(tmp_path)


def test_a_given_state_is_loaded_and_checked():
    model, batch = moe_model(), inputs()
    state, options = model.state_dict(), {"config": model.config}
    again = BertForSequenceClassification.from_pretrained(None, state_dict=state, **options)
    assert_same_model(again, model, lambda model: model(**batch).logits)
    with pytest.raises(UserError, match=rf"{TABLE}: expected experts in \[0, 4\), got values from 9 to 9"):
        BertForSequenceClassification.from_pretrained(None, state_dict=state | {TABLE: torch.full((60,), 9)}, **options)
    with pytest.raises(UserError, match=r"checkpoint: expected a tensor classifier\.bias, got none"):
        del state["classifier.bias"]
        BertForSequenceClassification.from_pretrained(None, state_dict=state, **options)


def test_a_dense_checkpoint_stays_dense(tmp_path):
    dense_model("bert-cls").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert moe_config(model.config) is None and not moe_layers(model)
