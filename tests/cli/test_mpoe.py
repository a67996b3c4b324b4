"""`moebert convert --method mpoe`."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from moebert_kernels.models import MPOEBertConfig
from tests.cli.tiny import done, refused


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
    assert isinstance(model.config, MPOEBertConfig) and model.config.load_balance == 0.01
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


def test_gpt2_with_hash_routing_and_dense_experts(gpt2, tmp_path):
    words = ("convert", "--method", "mpoe", "--model", gpt2, "--experts", "dense", "--router", "hash-random")
    output = done(*words, "--output", tmp_path / "out")
    assert "(1.00 times)" in output


def test_refusals(base, gpt2, tmp_path):
    words = ("convert", "--method", "mpoe", "--output", tmp_path / "out", "--model")
    line = refused(*words, base, "--max-bond", 1)
    assert line.startswith("max-bond: expected caps at which building the weight pays")
    line = refused(*words, base, "--importance", tmp_path / "scores.safetensors")
    assert line.startswith("importance: expected none with --method mpoe")
    assert refused(*words, base, "--router", "gate-sentence").startswith("router: expected one of switch, top2,")
    done(*words, gpt2, "--max-bond", 1, "--low-bonds", "--sites", 2)
    assert not (tmp_path / "out2").exists()
    line = refused("convert", "--method", "mpoe", "--output", tmp_path / "out2", "--model", tmp_path / "out")
    assert line.startswith("model: expected a dense model, got MPOEGPT2LMHeadModel")
