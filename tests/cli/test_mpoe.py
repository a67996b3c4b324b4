"""`moebert convert --method mpoe`."""

import json
import re

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from moebert_kernels.layers import moe_config, moe_layers
from tests.cli.tiny import TABLE, TRAINING, done, refused


@pytest.fixture(scope="module")
def gpt2(base, tmp_path_factory):
    """A GPT-2 with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(base)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_converts_and_reports(base, tmp_path):
    words = ("convert", "--method", "mpoe", "--model", base, "--num-experts", 3, "--sites", 3)
    output = done(*words, "--output", tmp_path / "out")
    assert "with 3 dense experts" in output and "1 / E = 0.3333" in output and "aux / dense" in output
    assert "folded for inference" in output
    model = AutoModel.from_pretrained(tmp_path / "out")
    config = moe_config(model.config)
    assert len(moe_layers(model)) == model.config.num_hidden_layers and model.config.model_type == "bert"
    assert (config.router, config.experts, config.balance_weight) == ("switch", "mpo", 0.01)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the film was good", return_tensors="pt")
    dense = AutoModel.from_pretrained(base)
    torch.testing.assert_close(model(**ids)[0], dense(**ids)[0], rtol=0, atol=5e-6)
    assert "is there already" in done(*words, "--output", tmp_path / "out")
    result = tmp_path / "bench.json"
    bench = ("bench", "--model", tmp_path / "out", "--against", base, "--rounds", 1, "--length", 6, "--output", result)
    assert "model: parameters" in done(*bench)
    entry = json.loads(result.read_text())["models"]["model"]
    assert entry["mpoe"]["parameters"] == entry["total_parameters"]
    line = refused(*words, "--noise", 0.1, "--output", tmp_path / "out")
    assert line.startswith("output: expected a new or empty folder")


@pytest.mark.parametrize("router", ["switch", "hash-random"])
def test_a_classifier_follows_its_teacher(router, teacher, data, tmp_path):
    """Layer by layer, with the balance loss beside; then it is no teacher and no dense model any more."""
    moe, out = tmp_path / "moe", tmp_path / "out"
    done("convert", "--method", "mpoe", "--model", teacher, "--num-experts", 2, "--sites", 2, "--router", router,
         "--noise", 0.1, "--output", moe)  # fmt: skip
    words = (*TABLE, "--data", data, *TRAINING)
    done("distill", "--model", moe, "--teacher", teacher, *words, "--cache", tmp_path / "cache", "--output", out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any("hidden" in line for line in lines)
    assert any(line.get("balance", 0.0) > 0 for line in lines) == (router == "switch")
    model = AutoModelForSequenceClassification.from_pretrained(out / "best")
    assert type(model).__name__ == "BertForSequenceClassification" and len(moe_layers(model)) == 2
    printed = done("eval", "--model", out, *TABLE, "--data", data)
    assert float(re.search(r"accuracy ([\d.]+)", printed)[1]) > 0.9
    line = refused("distill", "--model", moe, "--teacher", out, *words, "--output", tmp_path / "no")
    assert line == "teacher: expected a dense model, got a MoE (model_type 'bert')"
    scores = ("importance", "--model", out, *TABLE, "--data", data, "--output", tmp_path / "i.safetensors")
    assert refused(*scores).endswith("which is a MoE already")


def test_gpt2_with_hash_routing_and_dense_experts(gpt2, tmp_path):
    words = ("convert", "--method", "mpoe", "--model", gpt2, "--experts", "copy", "--router", "hash-random")
    output = done(*words, "--output", tmp_path / "out")
    assert "(1.00 times)" in output


def test_refusals(base, gpt2, tmp_path):
    words = ("convert", "--method", "mpoe", "--output", tmp_path / "out", "--model")
    line = refused(*words, base, "--max-bond", 1)
    assert line.startswith("max-bond: expected caps at which building the weight pays")
    line = refused(*words, base, "--importance", tmp_path / "scores.safetensors")
    assert line.startswith("importance: it is used only with --experts split; leave it out")
    assert refused(*words, base, "--router", "task") == "task: expected different tasks, got none"
    line = refused(*words, base, "--experts", "copies")
    assert line == "experts: expected one of split, clustered, copy, mpo, got 'copies'"
    done(*words, gpt2, "--max-bond", 1, "--low-bonds", "--sites", 2)
    assert not (tmp_path / "out2").exists()
    line = refused("convert", "--method", "mpoe", "--output", tmp_path / "out2", "--model", tmp_path / "out")
    assert line.startswith("model: expected a dense checkpoint, got ") and line.endswith("which is a MoE already")
