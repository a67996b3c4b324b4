"""Forms of a model side by side, and calls in turns."""

import pytest
import torch

from moebert_kernels.errors import UserError
from moebert_kernels.serve.forms import forms_of, interleaved
from tests.convert.families import make, make_inputs
from tests.serve.test_prepare import distance, made, run


def test_forms_give_about_the_same(tmp_path):
    model, inputs = made("bert", "hash"), make_inputs("bert")
    expected = run(model, inputs)
    forms = dict(forms_of(model, ("float32", "packed", "bfloat16", "int8", "int8-token"), inputs, tmp_path))
    for name, form in forms.items():
        assert distance(run(form, inputs), expected) < {"float32": 1e-9, "packed": 1e-5}.get(name, 0.06), name
    assert torch.equal(run(model, inputs), expected) and not list(tmp_path.iterdir())


def test_a_form_that_does_not_run_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("moebert_kernels.serve.forms.prepare", lambda *_, **__: 1 / 0)
    model = make("t5")
    batch = make_inputs("t5")
    found = dict(forms_of(model, ("float32", "onnx", "int8"), batch, tmp_path / "x"))
    assert found["float32"] is model and found["int8"] == "ZeroDivisionError: division by zero"
    assert found["onnx"].startswith("model: expected an encoder, got T5")
    with pytest.raises(UserError, match="form: expected one of float32, compiled, .*, got 'int4'"):
        next(forms_of(model, ("int4",), batch, tmp_path))


def test_calls_take_turns():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3, warm_up=1)
    assert calls == list("abababab") and [len(ms) for ms in times.values()] == [3, 3]
