"""Saving, loading, and what is said about a checkpoint that cannot be loaded."""

import json
import os
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
