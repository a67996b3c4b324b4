"""`moebert quantize` and `moebert export` on what the other commands made."""

import importlib.util

import pytest
from transformers import AutoModel, AutoModelForSequenceClassification

from moebert_kernels.layers import moe_layers
from moebert_kernels.serve.modules import PackedExperts
from tests.cli.tiny import TABLE, done, refused


def test_quantize(student, data, tmp_path):
    output = done("quantize", "--model", student, *TABLE, "--data", data, "--output", tmp_path / "int8")
    assert "as it was: " in output and "int8: " in output and "MiB of weights became" in output
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert isinstance(moe_layers(loaded)[0].experts, PackedExperts)
    again = done("quantize", "--model", student, *TABLE, "--data", data, "--output", tmp_path / "int8")
    assert "is there already" in again
    assert "validation (64 examples)" in done("eval", "--model", tmp_path / "int8", *TABLE, "--data", data)


def test_quantize_refusals(moe, base, tmp_path):
    assert "expected one of int8, int8-token, bfloat16, float32, got 'int4'" in refused(
        "quantize", "--model", base, "--dtype", "int4", "--output", tmp_path / "x"
    )
    done("quantize", "--model", base, "--dtype", "bfloat16", "--output", tmp_path / "bf16")
    assert AutoModel.from_pretrained(tmp_path / "bf16").prepared.dtype == "bfloat16"
    assert "expected one that is not prepared" in refused(
        "quantize", "--model", tmp_path / "bf16", "--output", tmp_path / "again"
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra serve")
def test_export(moe, tmp_path):
    done("export", "--model", moe, "--output", tmp_path / "onnx")
    done("export", "--model", moe, "--output", tmp_path / "onnx8", "--dtype", "int8")
    files = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "moebert.json"} <= files
    assert "quantization_config" not in (tmp_path / "onnx" / "config.json").read_text()
    assert "is there already" in done("export", "--model", moe, "--output", tmp_path / "onnx")


def test_export_refusals(base, tmp_path):
    assert "expected one of onnx, got 'gguf'" in refused(
        "export", "--model", base, "--format", "gguf", "--output", tmp_path / "x"
    )
