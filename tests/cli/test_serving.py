"""`moebert quantize` and `moebert export` on what the other commands made."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, T5Config, T5EncoderModel

from moebert_kernels import errors, serve
from moebert_kernels.cli import bench_forms
from moebert_kernels.layers import moe_layers
from moebert_kernels.serve import prepare
from moebert_kernels.serve.experts import PackedExperts
from tests.cli.tiny import TABLE, done, moebert, refused
from tests.distill.tiny_text import byte_tokenizer, tiny_gpt2


def test_quantize(student, data, tmp_path):
    output = done("quantize", "--model", student, *TABLE, "--data", data, "--output", tmp_path / "int8")
    assert "as it was, in " in output and "int8, in " in output and "MiB of weights became" in output
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert isinstance(moe_layers(loaded)[0].experts, PackedExperts)
    again = done("quantize", "--model", student, *TABLE, "--data", data, "--output", tmp_path / "int8")
    assert "is there already" in again
    assert "validation (64 examples)" in done("eval", "--model", tmp_path / "int8", *TABLE, "--data", data)


def test_quantize_calibrates_by_texts_with_and_without_labels(base, data, student, tmp_path):
    def scales(name):
        return AutoModel.from_pretrained(tmp_path / name).prepared.token_scales

    words = ("quantize", "--model", student, "--data", data)
    assert "a scale for each token in " in done(*words, *TABLE, "--output", tmp_path / "task")
    assert "a scale for each token" not in done(*words, *TABLE, "--no-calibrate", "--output", tmp_path / "off")
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "the film was good\n" * 9)
    by_texts = ("quantize", "--model", base, "--data", texts, "--output", tmp_path / "texts")
    output = done(*by_texts)
    assert "a scale for each token in " in output and "as it was" not in output
    assert "is there already" in done(*by_texts)
    texts.write_text("text\n" + "the play was bad\n" * 9)
    assert "with a model of other files of data (--force replaces it)" in refused(*by_texts)
    assert isinstance(scales("task"), list) and isinstance(scales("texts"), list) and scales("off") is None


def test_each_line_of_a_text_file_is_a_text(base, tmp_path, monkeypatch):
    """A language model reads windows of the document instead."""
    tiny_gpt2(positions=16).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    file, seen = tmp_path / "film.txt", []
    file.write_text("the film was good\n\n" * 6 + "the play was bad " * 40)  # 680 characters, which are two texts

    def prepared(model, dtype, *, tokens, batches):
        batches = list(batches)
        seen.append(sum(len(batch["input_ids"]) for batch in batches))
        return prepare(model, dtype, tokens=tokens, batches=batches)

    monkeypatch.setattr(serve, "prepare", prepared)
    for model, name in ((base, "base8"), (tmp_path / "gpt2", "gpt8")):
        done("quantize", "--model", model, "--data", file, "--output", tmp_path / name)
    tokens = sum(map(len, byte_tokenizer()(file.read_text().splitlines(keepends=True))["input_ids"]))
    assert seen == [6 + 2, -(-tokens // 15)]  # windows of 16 that share a token
    file.write_text(" \n\n")
    line = refused("quantize", "--model", base, "--data", file, "--output", tmp_path / "x")
    assert line == "data: expected at least one row, got none"
    monkeypatch.undo()
    result = moebert("quantize", "--model", base, "--output", tmp_path / "none")
    assert "int8 is not calibrated, for which texts are needed" in result.stderr and result.exit_code == 0


def test_quantize_refuses_what_cannot_calibrate(base, data, tmp_path):
    words = ("quantize", "--model", base, "--output", tmp_path / "x")
    assert "calibrate: expected texts (--task, or --data FILE), got none" in refused(*words, "--calibrate")
    both = ("--dtype", "int8-token", "--data", data)
    assert "calibrate: expected it with --dtype int8 alone, got --dtype int8-token" in refused(
        *words, *both, "--calibrate"
    )
    assert "data: expected --task too, since without it texts only calibrate int8" in refused(*words, *both)
    for option, got in (
        (("label-column", "mood"), "'mood'"), (("regression",), "True"), (("hold-out", "halves"), "'halves'"),
        (("doc-stride", 4), "4"),
    ):  # fmt: skip
        line = refused(*words, "--data", data, f"--{option[0]}", *option[1:])
        assert line == f"{option[0]}: it is used only with --task; leave it out (got {got})"


def test_quantize_refusals(moe, base, tmp_path):
    assert "expected one of int8, int8-token, int8-bfloat16, bfloat16, float32, got 'int4'" in refused(
        "quantize", "--model", base, "--dtype", "int4", "--output", tmp_path / "x"
    )
    done("quantize", "--model", base, "--dtype", "bfloat16", "--output", tmp_path / "bf16")
    assert AutoModel.from_pretrained(tmp_path / "bf16").prepared.dtype == "bfloat16"
    assert "expected one that is not prepared" in refused(
        "quantize", "--model", tmp_path / "bf16", "--output", tmp_path / "again"
    )
    words = ("student", "--output", tmp_path / "small")
    for name, models in (("model", (tmp_path / "bf16", "layers")), ("init", (base, tmp_path / "bf16"))):
        line = refused(*words, "--model", models[0], "--init", models[1])
        assert line.startswith(f"{name}: expected one that can be trained, got ")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra serve")
def test_export(moe, tmp_path):
    done("export", "--model", moe, "--output", tmp_path / "onnx")
    done("export", "--model", moe, "--output", tmp_path / "onnx8", "--dtype", "int8")
    files = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "moebert.json"} <= files
    assert "quantization_config" not in (tmp_path / "onnx" / "config.json").read_text()
    assert "is there already" in done("export", "--model", moe, "--output", tmp_path / "onnx")


def test_export_with_one_operator_is_refused_for_dense_models(base, tmp_path):
    assert 'experts: expected "matrices" for a model without experts' in refused(
        "export", "--model", base, "--experts", "operator", "--output", tmp_path / "x"
    )


def test_bench_of_forms(student, teacher, data, tmp_path, monkeypatch):
    out, chart = tmp_path / "bench.json", tmp_path / "chart.png"
    words = ("--form", "float32", "--form", "int8", "--form", "bfloat16", "--rounds", 2, "--batch-size", 4)
    both = ("bench", "--model", student, "--against", teacher, *words)
    text = done(*both, *TABLE, "--data", data, "--output", out, "--chart", chart)
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    names = [f"{model} {form}" for model in ("model", "against") for form in ("float32", "int8", "bfloat16")]
    assert list(case["forms"]) == names == list(result["scores"]) and result["baseline"] == "against float32"
    assert case["forms"]["against float32"]["speed"]["median"] == 1
    assert all(0 <= metrics["accuracy"] <= 1 for metrics in result["scores"].values())
    assert "over against float32" in text and chart.read_bytes().startswith(b"\x89PNG")
    assert "model int8" in done(*both, "--length", 8)
    assert bench_forms.is_chart(chart)  # and so a later call may replace it
    monkeypatch.setattr(bench_forms, "forms_chart", lambda *_: 1 / 0)
    out.unlink()
    assert moebert(*both, *TABLE, "--data", data, "--output", out, "--chart", chart).exit_code == 1 and out.exists()


def test_bench_scores_each_model_with_its_own_tokenizer_and_classes(teacher, data, tmp_path):
    turned = tmp_path / "turned"  # the same model, but for the numbers of its classes
    model = AutoModelForSequenceClassification.from_pretrained(teacher / "best")
    with torch.no_grad():
        for part in (model.classifier.weight, model.classifier.bias):
            part.copy_(part.flip(0))
    names = [model.config.id2label[n] for n in (1, 0)]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: n for n, name in enumerate(names)}
    model.save_pretrained(turned)
    AutoTokenizer.from_pretrained(teacher / "best").save_pretrained(turned)
    words = ("--form", "float32", "--rounds", 1, "--batch-size", 4, *TABLE, "--data", data)
    done("bench", "--model", turned, "--against", teacher, *words, "--output", tmp_path / "bench.json")
    ours, theirs = json.loads((tmp_path / "bench.json").read_text())["scores"].values()
    assert ours == theirs


def test_bench_of_a_model_as_it_was_saved(base, data, tmp_path):
    served = tmp_path / "served"
    done("quantize", "--model", base, "--data", data / "train.tsv", "--output", served)
    both = ("bench", "--model", served, "--against", base, "--length", 8, "--rounds", 1)
    done(*both, "--form", "float32", "--form", "int8", "--output", tmp_path / "bench.json")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert list(result["cases"][0]["forms"]) == ["model as saved (int8, calibrated)", "against float32", "against int8"]
    assert result["left_out"] == {} and result["models"]["model"] == {"path": str(served)}
    line = refused(*both)
    assert line == f"form: expected one, such as float32, with {served}, which is measured as it was quantized"


def test_bench_of_an_encoder_of_t5(base, tmp_path):
    model = T5EncoderModel(T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    model.save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "t5")
    done(
        "convert",
        "--model",
        tmp_path / "t5",
        "--router",
        "hash-random",
        "--experts",
        "copy",
        "--output",
        tmp_path / "moe",
    )
    both = ("bench", "--model", tmp_path / "moe", "--against", tmp_path / "t5", "--length", 8, "--rounds", 1)
    assert "against float32" in done(*both, "--form", "float32") and "speed" in done(*both)


def test_eval_draws_nothing_at_random(base):
    assert "No such option: --seed" in moebert("eval", "--model", base, "--task", "sst2", "--seed", 1).stderr


def test_bench_names_what_does_not_run(student, teacher, monkeypatch):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    text = done("bench", "--model", student, "--against", teacher, "--form", "float32", "--form", "onnx", "--rounds", 1,
                "--length", 8)  # fmt: skip
    assert "model onnx is left out: " in text and "pip install -e '.[serve]'" in text


def test_bench_of_forms_under_task_routing(base, tmp_path, monkeypatch):
    words = ("--router", "task", "--task", "sst2", "--task", "cola", "--experts", "copy", "--output", tmp_path / "moe")
    done("convert", "--model", base, *words)
    both = ("bench", "--model", tmp_path / "moe", "--against", base, "--rounds", 1, "--batch-size", 2, "--length", 8)
    assert "is left out" not in done(*both, "--form", "float32")
    monkeypatch.setattr("moebert_kernels.serve.forms.prepare", lambda *_, **__: 1 / 0)
    wanted = "form: expected one that runs here, got none (model int8: ZeroDivisionError: division by zero)"
    assert refused(*both, "--form", "int8") == wanted


def test_bench_refusals_of_forms(base, tmp_path):
    both = ("bench", "--model", base, "--against", base)
    assert "form: expected one of float32, compiled" in refused(*both, "--form", "int4")
    assert "dtype: expected none with --form" in refused(*both, "--form", "int8", "--dtype", "bfloat16")
    assert "chart: expected --task too" in refused(*both, "--form", "int8", "--chart", tmp_path / "c.png")
    assert "chart: expected --form too" in refused(*both, "--chart", tmp_path / "c.png")
