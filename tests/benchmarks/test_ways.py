"""The benchmarks of serving: every way agrees with the model before it is timed, and what is missed is said."""

import json

import pytest
import torch

from benchmarks import privacy_filter, serving, ways
from benchmarks.ways import Way, check, finished, measured


def test_a_way_that_computes_something_else_is_left_out():
    x = torch.randn(4, 8)
    made = {"plain float32": Way("plain float32", torch.relu), "other int8": Way("plain float32", torch.tanh)}
    distances, left_out = check(made, (x,))
    assert list(left_out) == ["other int8"] and distances["plain float32"] == 0
    assert left_out["other int8"].startswith("expected a distance of at most 0.15 from plain float32, got 0.")
    made["other int8"] = Way("plain float32", lambda x: x * torch.nan)
    assert "got nan" in check(made, (x,))[1]["other int8"]
    made["other int8"] = Way("plain float32", lambda x: torch.relu(x) * 1.1)
    distances, left_out = check(made, (x,))
    assert distances["other int8"] == pytest.approx(0.1) and not left_out
    rows = torch.tensor([True, False, False, False])
    made["other int8"] = Way("plain float32", lambda x: torch.relu(x) + (1 - rows[:, None].float()))
    assert check(made, (x,), rows)[0]["other int8"] == 0


def test_requirements_and_results(monkeypatch, tmp_path, capsys):
    times = {"a": [2.0, 2.0, 4.0], "b": [4.0, 6.0, 8.0]}
    monkeypatch.setattr(ways, "interleaved", lambda runs, rounds: times)
    monkeypatch.setattr(ways, "results_folder", lambda target: tmp_path)
    made = {name: Way("a", torch.relu) for name in times}
    required = [("a", "b", 2.0), ("b", "a", 1.0), ("a", "c", 1.0), ("a", "b", None)]
    case = measured({"T": 3}, made, [(torch.randn(2),), (torch.randn(2),)], 3, "b", required)
    assert case["over"]["a"] == [2.0, 2.0, 2.5] and case["ms"]["b"][1] == 6
    assert [entry[:3] for entry in case["required"]] == [["a", "b", 2.0], ["b", "a", 1.0]]
    assert finished({"cases": [case], "left_out": {"b": "it is too far"}}, "made-up", required) == 1
    printed = capsys.readouterr().out
    assert "held   a over b: 2.00" in printed and "MISSED b over a: 0.50" in printed
    assert "2 requirements missed\n  b over a at T=3\n  b, which is left out\n" in printed
    assert "1 ways left out\n  b: it is too far" in printed
    assert json.loads((tmp_path / "serving" / "made-up.json").read_text())["cases"][0]["rounds"] == 3
    assert finished({"cases": [], "left_out": {"c": "it is not installed"}}, None, required) == 0


def test_every_way_gets_the_same_inputs_in_turn(capsys):
    met = {"a float32": [], "b float32": []}
    made = {name: Way("a float32", lambda x, of=of: of.append(int(x)) or x) for name, of in met.items()}
    measured({"T": 1}, made, [(torch.tensor(n),) for n in range(3)], 2, "a float32", [])
    assert met["a float32"] == met["b float32"] == [0, 1, 2, 0, 1]  # three of them to warm up


def test_privacy_filter_runs(capsys):
    privacy_filter.main(["--smoke", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "prepared int8 over grouped_mm bfloat16" in printed and "T=512, 2 rounds" in printed


@pytest.mark.slow
def test_serving_runs(capsys):
    serving.main(["--smoke", "--layers", "1", "--threads", "1"])
    assert "moe int8 over dense int8" in capsys.readouterr().out
