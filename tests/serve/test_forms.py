"""Forms of a model side by side, and calls in turns."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from moebert_kernels.errors import UserError
from moebert_kernels.serve import prepare
from moebert_kernels.serve.forms import forms_of
from tests.convert.families import make, make_inputs, valid
from tests.serve.test_prepare import distance, made, run


def test_forms_give_about_the_same(tmp_path):
    model, inputs = made("bert", "hash"), make_inputs("bert")
    expected = run(model, inputs)
    names = ("float32", "packed", "bfloat16", "int8", "int8-token", "int8-bfloat16")
    forms = dict(forms_of(model, names, inputs, tmp_path))
    for name, form in forms.items():
        got = valid("bert", run(form, inputs), inputs)
        assert distance(got, valid("bert", expected, inputs)) < {"float32": 1e-9, "packed": 1e-5}.get(name, 0.06), name
    assert torch.equal(run(model, inputs), expected) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra serve")
def test_forms_that_are_compiled(tmp_path):
    model, inputs = made("bert", "hash", AutoModelForSequenceClassification, num_hidden_layers=1), make_inputs("bert")
    names = ("compiled", "onnx", "onnx-int8")
    forms = dict(forms_of(model, names, inputs, tmp_path))
    shorter = {name: tensor[:, :6] for name, tensor in inputs.items()}
    for batch in (inputs, shorter):
        expected = run(model, batch)
        for name in names:
            assert distance(run(forms[name], batch), expected) < (0.06 if name == "onnx-int8" else 1e-5), name
    assert forms["onnx"](input_ids=inputs["input_ids"]).logits.shape == (2, 2)  # as without padding


def test_a_form_that_does_not_run_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("moebert_kernels.serve.forms.prepare", lambda *_, **__: 1 / 0)
    model = make("t5")
    batch = make_inputs("t5")
    found = dict(forms_of(model, ("float32", "onnx", "int8"), batch, tmp_path / "x"))
    assert found["float32"] is model and found["int8"] == "ZeroDivisionError: division by zero"
    assert found["onnx"].startswith("model: expected an encoder or a causal language model, got T5")
    with pytest.raises(UserError, match=r"form: expected one of float32, compiled, .*, got 'int4'"):
        next(forms_of(model, ("int4",), batch, tmp_path))


@pytest.mark.parametrize("options, name", [
    ({"dtype": "bfloat16"}, "as saved (bfloat16)"), ({"batches": [make_inputs("bert")]}, "as saved (int8, calibrated)"),
])  # fmt: skip
def test_a_prepared_model_has_one_form(options, name, tmp_path):
    model = prepare(make("bert", num_hidden_layers=1), **options)
    assert list(forms_of(model, ("float32", "int8", "onnx"), make_inputs("bert"), tmp_path)) == [(name, model)]
