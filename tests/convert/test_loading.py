"""Saving, loading, and what is said about a checkpoint that cannot be loaded."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    logging,
)

from moebert_kernels.errors import UserError
from moebert_kernels.models import MoEBertConfig, MoEBertForSequenceClassification, MoEBertModel
from tests.helpers import ROOT, assert_same_model
from tests.models import tiny

AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
}
TABLE = "moebert.encoder.layer.1.router.table"
POOLER = "moebert.pooler.dense.weight"


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("router", tiny.ROUTERS)
@pytest.mark.parametrize("head", tiny.HEADS)
def test_same_logits_after_reload(tmp_path, head, router, style):
    model = tiny.model(head, router=router, style=style)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    torch.manual_seed(99)  # a table drawn again would be another one
    again = AUTO[head].from_pretrained(tmp_path)
    assert type(again) is type(model) and not again.training
    inputs = tiny.inputs()
    assert_same_model(again, model, lambda model: model(**inputs)[0])


@pytest.mark.slow
def test_same_logits_in_a_new_process(tmp_path):
    model, inputs = tiny.model(), tiny.inputs()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)  # bitwise the same from the same file
    save_file(inputs | {"logits": loaded(**inputs).logits.detach()}, tmp_path / "wanted.safetensors")
    program = (
        "import sys, torch; from safetensors.torch import load_file\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "import moebert_kernels.models\n"
        "torch.manual_seed(7)\n"
        "wanted = load_file(sys.argv[1] + '/wanted.safetensors'); logits = wanted.pop('logits')\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "assert torch.equal(model(**wanted).logits, logits)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment, timeout=120)


def test_encoder_alone_and_shards(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    inputs = tiny.inputs()
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "encoder")
    for encoder in (AutoModel.from_pretrained(tmp_path), MoEBertModel.from_pretrained(tmp_path / "encoder")):
        assert_same_model(encoder, model.moebert, lambda encoder: encoder(**inputs).last_hidden_state)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoEBertConfig)
    headed = MoEBertForSequenceClassification.from_pretrained(tmp_path / "encoder")
    assert_same_model(headed.moebert, model.moebert, lambda encoder: encoder(**inputs).last_hidden_state)


def test_dtype_and_options_on_load(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    half = MoEBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.moebert.encoder.layer[0].experts.w1.dtype == torch.bfloat16
    assert half.moebert.encoder.layer[0].router.table.dtype == torch.uint8
    paper = MoEBertForSequenceClassification.from_pretrained(tmp_path, preset="paper", load_balance=0.3)
    assert paper.config.route_padding and paper.config.load_balance == 0.3
    five = MoEBertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert five.classifier.out_features == 5
    model, info = MoEBertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, MoEBertForSequenceClassification) and not info["missing_keys"]


@pytest.mark.parametrize("head", ["sequence", "mlm"])
@pytest.mark.parametrize("size", [tiny.V + 7, tiny.V - 7])
def test_resized_vocabulary(tmp_path, head, size):
    model = tiny.model(head)
    tables = [layer.router.table.clone() for layer in model.moebert.encoder.layer]
    model.resize_token_embeddings(size)
    for old, layer in zip(tables, model.moebert.encoder.layer, strict=True):
        layer.router.validate(size)
        kept = min(size, tiny.V)
        assert torch.equal(layer.router.table[:kept], old[:kept])
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, size, (2, 8))
    assert_same_model(type(model).from_pretrained(tmp_path), model, lambda model: model(ids)[0])


def test_tables_follow_the_vocabulary_of_the_encoder_inside():
    model = tiny.model()
    model.base_model.resize_token_embeddings(tiny.V + 7)
    for layer in model.moebert.encoder.layer:
        layer.router.validate(tiny.V + 7)


def change_tensor(folder, key, value):
    """Replace a tensor in the saved model, or remove it if `value` is None."""
    tensors = load_file(folder / "model.safetensors") | {key: value}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def leave_out(folder, key):
    """Only a copy that transformers does not read has the tensor."""
    shutil.copy(folder / "model.safetensors", folder / "model_old.safetensors")
    change_tensor(folder, key, None)


def change_index(folder, file):
    """Say of one tensor that it lies in this file."""
    (folder / "model.safetensors").unlink()
    tiny.model().save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["moebert.encoder.layer.0.experts.w1"] = file
    index.write_text(json.dumps(content))


def cut_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    truncate(folder / "pytorch_model.bin")


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
    "no table": (lambda folder: change_tensor(folder, TABLE, None), f"expected a tensor {TABLE}, got none in "),
    "other experts": (
        lambda folder: change_config(folder, num_experts=5),
        r"layer.0.experts.b1: expected shape \(5, 12\), got \(4, 12\) in .*; ignore_mismatched_sizes=True would",
    ),
    "other labels": (
        lambda folder: change_tensor(folder, "classifier.bias", torch.zeros(4)),
        r"classifier.bias: expected shape \(3,\), got \(4,\) in ",
    ),
    "other router": (lambda folder: change_config(folder, router="gate-token"), "expected a tensor .*gate.weight"),
    "unknown router": (lambda folder: change_config(folder, router="x"), "router: expected one of hash-random"),
    "truncated": (
        lambda folder: truncate(folder / "model.safetensors"),
        "expected a whole safetensors file, got a damaged",
    ),
    "no word embeddings": (
        lambda folder: change_tensor(folder, "moebert.embeddings.word_embeddings.weight", None),
        "expected a tensor moebert.embeddings.word_embeddings.weight, got none in ",
    ),
    "no attention": (
        lambda folder: change_tensor(folder, "moebert.encoder.layer.1.attention.self.query.weight", None),
        "expected a tensor moebert.encoder.layer.1.attention.self.query.weight, got none in ",
    ),
    "half a head": (lambda folder: change_tensor(folder, "classifier.weight", None), "a tensor classifier.weight, got"),
    "half a pooler": (lambda folder: change_tensor(folder, POOLER, None), f"expected a tensor {POOLER}, got none in "),
    "experts in a file that is not loaded": (
        lambda folder: leave_out(folder, "moebert.encoder.layer.0.experts.w1"),
        "expected a tensor moebert.encoder.layer.0.experts.w1, got none in ",
    ),
    "table of floats": (
        lambda folder: change_tensor(folder, TABLE, torch.zeros(60)),
        f"{TABLE}: expected integers, got torch.float32",
    ),
    "complex weights": (
        lambda folder: change_tensor(folder, POOLER, torch.zeros(16, 16, dtype=torch.complex64)),
        f"{POOLER}: expected floating-point numbers, got C64 in ",
    ),
    "integer weights": (
        lambda folder: change_tensor(folder, POOLER, torch.zeros(16, 16, dtype=torch.int64)),
        f"{POOLER}: expected floating-point numbers, got I64 in ",
    ),
    "index out of the folder": (
        lambda folder: change_index(folder, "../other.safetensors"),
        r"expected files inside .*, got .*\.\./other.safetensors in its index",
    ),
    "index to no file": (lambda folder: change_index(folder, "no.safetensors"), "checkpoint: expected a readable one"),
    "cut pickle": (lambda folder: cut_pickle(folder), "checkpoint: expected a readable one, got "),
    "JSON null": (
        lambda folder: (folder / "config.json").write_text("null"),
        "expected a configuration in config.json of .*, got something else",
    ),
    "JSON list": (lambda folder: (folder / "config.json").write_text("[]"), "expected a configuration in config.json"),
    "deep JSON": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000),
        "expected a configuration in config.json of .*, got something else",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "checkpoint: expected a readable one, got "),
    "no config": (lambda folder: (folder / "config.json").unlink(), "expected a folder with a config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "checkpoint: expected a readable one, got "),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_rejects_a_damaged_checkpoint(tmp_path, damage):
    tiny.model().save_pretrained(tmp_path)
    apply, message = DAMAGE[damage]
    apply(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        MoEBertForSequenceClassification.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["model_backup.safetensors", "model.fp16.safetensors", "model-00001-of-00001.safetensors"]
)
def test_files_that_are_not_loaded_do_not_matter(tmp_path, name):
    model, inputs = tiny.model(), tiny.inputs()
    model.save_pretrained(tmp_path)
    save_file(tiny.model(num_experts=2).state_dict(), tmp_path / name)
    (tmp_path / "model_quantised.safetensors").write_bytes(b"not one")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_model(again, model, lambda model: model(**inputs).logits)


def test_what_a_checkpoint_has_nothing_of_is_new(tmp_path):
    tiny.model("mlm").save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    wanted = {f"{name}.{kind}" for name in ("classifier", "moebert.pooler.dense") for kind in ("weight", "bias")}
    assert info["missing_keys"] == wanted and torch.isfinite(model(**tiny.inputs()).logits).all()


def test_a_given_state_is_loaded_and_checked():
    model, inputs = tiny.model(), tiny.inputs()
    state, options = model.state_dict(), {"config": model.config}
    again = type(model).from_pretrained(None, state_dict=state, **options)
    assert_same_model(again, model, lambda model: model(**inputs).logits)
    with pytest.raises(UserError, match=rf"{TABLE}: expected experts in \[0, 4\), got values from 256 to 256"):
        type(model).from_pretrained(None, state_dict=state | {TABLE: torch.full((60,), 256)}, **options)


def test_sizes_that_do_not_fit_are_refused_before_memory_is_taken(tmp_path):
    """A word embedding of 2^31 - 1 words would be 128 GiB."""
    tiny.model(router="gate-token").save_pretrained(tmp_path)
    change_config(tmp_path, vocab_size=2**31 - 1)
    with pytest.raises(UserError, match=r"word_embeddings.weight: expected shape \(2147483647, 16\), got \(60, 16\)"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_rejects_what_is_no_moe(tmp_path):
    BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    ).save_pretrained(tmp_path)
    for load in (MoEBertForSequenceClassification, MoEBertModel):
        with pytest.raises(UserError, match=r"got 'bert' in .*; to make one of a dense model, use convert_to_moe"):
            load.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expected a folder with a model, got .*, which is not a folder"):
        MoEBertModel.from_pretrained(tmp_path / "nowhere")
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="config: expected a MoEBertConfig, got a BertConfig"):
        MoEBertModel.from_pretrained(tmp_path, config=BertConfig())
