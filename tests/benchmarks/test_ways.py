"""The benchmarks of serving: every way agrees with the model before it is timed, and what is missed is said."""

import json

import pytest
import torch

from benchmarks import privacy_filter, serving, ways
from benchmarks.ways import Way, check, finished, measured


def test_a_way_that_computes_something_else_is_refused():
    x = torch.randn(4, 8)
    made = {"plain float32": Way("plain float32", torch.relu), "other int8": Way("plain float32", torch.tanh)}
    with pytest.raises(SystemExit, match=r"other int8: expected a distance of at most 0\.15 from plain float32, got 0"):
        check(made, (x,))
    made["other int8"] = Way("plain float32", lambda x: torch.relu(x) * 1.1)
    assert check(made, (x,))["other int8"] == pytest.approx(0.1)
    rows = torch.tensor([True, False, False, False])
    made["other int8"] = Way("plain float32", lambda x: torch.relu(x) + (1 - rows[:, None].float()))
    assert check(made, (x,), rows)["other int8"] == 0


def test_requirements_and_results(monkeypatch, tmp_path, capsys):
    times = {"a": [2.0, 2.0, 4.0], "b": [4.0, 6.0, 8.0]}
    monkeypatch.setattr(ways, "interleaved", lambda runs, rounds: times)
    monkeypatch.setattr(ways, "results_folder", lambda target: tmp_path)
    made = {name: Way("a", torch.relu) for name in times}
    required = [("a", "b", 2.0), ("b", "a", 1.0), ("a", "c", 1.0), ("a", "b", None)]
    case = measured({"T": 3}, made, (torch.randn(2),), 3, "b", required)
    assert case["over"]["a"] == (2.0, 2.0, 2.5) and case["ms"]["b"][1] == 6
    assert [entry[:3] for entry in case["required"]] == [["a", "b", 2.0], ["b", "a", 1.0]]
    assert finished({"cases": [case]}, "made-up") == 1
    printed = capsys.readouterr().out
    assert "held   a over b: 2.00" in printed and "MISSED b over a: 0.50" in printed
    assert "1 requirements missed\n  b over a at T=3" in printed
    assert json.loads((tmp_path / "serving" / "made-up.json").read_text())["cases"][0]["rounds"] == 3


def test_privacy_filter_runs(capsys):
    privacy_filter.main(["--smoke", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "prepared int8 over grouped_mm bfloat16" in printed and "T=512, 2 rounds" in printed


@pytest.mark.slow
def test_serving_runs(capsys):
    serving.main(["--smoke", "--layers", "1", "--threads", "1"])
    assert "moe int8 over dense int8" in capsys.readouterr().out
