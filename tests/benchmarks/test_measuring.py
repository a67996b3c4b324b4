"""How times become ratios, verdicts and files."""

import json
import time

import pytest

from benchmarks import results
from benchmarks.measuring import MAX_ROUNDS, Case, Provider, Requirement, measure, speed_ratio, spread


def test_rounds_are_interleaved_and_warmup_is_dropped():
    calls = []
    samples = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
                      seconds=0.0, min_rounds=5, warmup_rounds=2)  # fmt: skip
    assert [len(times) for times in samples.values()] == [5, 5]
    rounds = [set(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert rounds == [{"a", "b"}] * 7
    assert len({tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)}) == 2  # no provider is always the first


def test_rounds_end_with_the_time_or_at_the_most_allowed():
    assert len(measure({"a": lambda: time.sleep(0.01)}, seconds=0.05, min_rounds=1)["a"]) < 6
    assert len(measure({"a": lambda: None}, seconds=60.0)["a"]) == MAX_ROUNDS
    assert measure({}, seconds=60.0) == {}


def test_spread_is_quartiles():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_ratio_pairs_rounds():
    samples = {"ours": [1.0, 10.0, 2.0], "theirs": [2.0, 20.0, 4.0]}  # the machine was slow in the second round
    assert speed_ratio(samples, "ours", "theirs") == (2.0, 2.0, 2.0)
    assert speed_ratio({"ours": [1.0, 2.0, 4.0], "once": [100.0]}, "ours", "once")[1] == 50.0
    assert speed_ratio(samples, "ours", "refused") is None


@pytest.mark.parametrize("at_least,passed", [(0.01, True), (1e9, False)])
def test_requirements_are_judged(at_least, passed, tmp_path):
    import torch

    provider = Provider(lambda: (torch.ones(2),), lambda dtype: (torch.ones(2, dtype=dtype),))
    case = Case("ones", {"T": 2}, ("a", "b"), lambda: {"a": provider, "b": provider}, "b",
                (Requirement("a", "b", at_least),))  # fmt: skip
    result = results.run_suite("ones", [case], seconds=0.0, min_rounds=3, threads=1, smoke=False)
    assert bool(results.failures(result)) is not passed
    written = json.loads(results.save(result, tmp_path).read_text())
    assert written == result
    assert [path.name for path in tmp_path.iterdir()] == ["ones.json"]
    assert written["environment"]["threads"] == 1
    judged = results.run_suite("ones", [case], seconds=0.0, min_rounds=3, threads=1, smoke=True)
    assert judged["cases"][0]["requirements"] == []


@pytest.mark.parametrize("q3,warned", [(1.05, False), (1.5, True)])
def test_wide_spread_is_warned_of(q3, warned):
    numbers = {"median_ms": 1.0, "q1_ms": 0.99, "q3_ms": q3, "rounds": 7}
    result = {"what": "ones", "cases": [{"providers": {"a": numbers, "b": {"refused": "wrong"}}}]}
    assert bool(results.busy_warning(result)) is warned


def test_device_is_a_folder_name(monkeypatch):
    monkeypatch.setattr(results, "cpu_model", lambda: "Intel(R) Xeon(R) Processor @ 2.50GHz")
    assert results.device_slug() == "intel-xeon-processor-2.50ghz"
    monkeypatch.setattr(results, "cpu_model", lambda: "AMD EPYC 7B13 64-Core Processor")
    assert results.device_slug() == "amd-epyc-7b13-64-core-processor"
