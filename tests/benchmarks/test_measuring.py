"""How times become ratios, verdicts and files."""

import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import clocks, identity, results
from benchmarks.clocks import WallTimer
from benchmarks.measuring import (
    ENOUGH_FOR_P99,
    MAX_ROUNDS,
    Case,
    Limit,
    Provider,
    Requirement,
    Samples,
    Skipped,
    Target,
    latency,
    measure,
    speed_ratio,
)
from benchmarks.model import Cost

CPU = Target.of("cpu")
ROOF = {"tflops": 1.0, "gbytes_per_s": 10.0}


@pytest.fixture
def known_roof(monkeypatch):
    """Not measured: that takes seconds."""
    monkeypatch.setattr(clocks, "roof", lambda *_: ROOF)


def ones_case(name="ones", requires=(), cost=None, calls=None):
    def run():
        if calls is not None:
            calls.append(name)
        return (torch.ones(2),)

    provider = Provider(run, lambda dtype: (torch.ones(2, dtype=dtype),))
    return Case(name, {"T": 2}, ("a", "b"), lambda: {"a": provider, "b": provider}, "b", requires, cost, seconds=0.0)


@pytest.mark.parametrize("seconds, most, warmup", [(0.0, 5, 1), (60.0, 200, 2)])
def test_rounds_are_interleaved_and_warmup_is_dropped(seconds, most, warmup):
    calls = []
    samples = measure({name: WallTimer(lambda name=name: calls.append(name)) for name in "ab"},
                      seconds=seconds, min_rounds=5, warmup_rounds=2)  # fmt: skip
    assert [len(of_provider.rounds) for of_provider in samples.values()] == [most, most]
    rounds = [set(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert rounds == [{"a", "b"}] * (most + warmup)
    assert len({tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)}) == 2  # no provider is always the first


def test_rounds_end_with_the_time_or_at_the_most_allowed():
    assert len(measure({"a": WallTimer(lambda: time.sleep(0.01))}, seconds=0.05, min_rounds=1)["a"].rounds) < 6
    assert len(measure({"a": WallTimer(lambda: None)}, seconds=60.0)["a"].rounds) == MAX_ROUNDS
    assert measure({}, seconds=60.0) == {}


class TimerOfKnownTimes:
    how, not_captured, calls = "graph", "", 1

    def warm_ms(self):
        return [1.0, 9.0, 2.0]

    def cold_ms(self):
        return [5.0, 4.0, 30.0]


def test_a_round_is_the_median_of_its_calls_and_every_call_is_kept():
    timer = TimerOfKnownTimes()
    samples = measure({"a": timer}, seconds=0.0, min_rounds=2)["a"]
    assert samples == Samples(rounds=[2.0, 2.0], cold=[5.0, 5.0], calls=[1.0, 9.0, 2.0] * 2)
    timer.calls = 20  # each time is a mean, of which no percentile of calls can be told
    assert measure({"a": timer}, seconds=0.0, min_rounds=2)["a"] == replace(samples, calls=[])


def test_percentiles_want_enough_calls():
    assert latency([1.0] * (ENOUGH_FOR_P99 - 1)) is None
    assert latency([float(i) for i in range(101)]) == (50.0, 99.0)


def test_ratio_pairs_rounds():
    rounds = {"ours": [1.0, 10.0, 2.0], "theirs": [2.0, 20.0, 4.0]}  # the machine was slow in the second round
    assert speed_ratio(rounds, "ours", "theirs") == {"q1": 2.0, "median": 2.0, "q3": 2.0}
    assert speed_ratio({"ours": [1.0, 2.0, 4.0], "once": [100.0]}, "ours", "once")["median"] == 50.0
    assert speed_ratio(rounds, "ours", "refused") is None


def test_ratio_over_several_is_over_the_fastest_that_has_a_time():
    rounds = {"ours": [1.0], "eager": [4.0], "compiled": [3.0]}
    assert speed_ratio(rounds, "ours", ("eager", "compiled", "skipped"))["median"] == 3.0
    assert speed_ratio(rounds, "ours", ("skipped",)) is None


@pytest.mark.parametrize("requirement,passed", [
    (Requirement("a", "b", 0.01), True), (Requirement("a", ("b",), 1e9), False),
    (Limit("a", 1e9), True), (Limit("a", 0.0), False),
])  # fmt: skip
def test_requirements_are_judged(requirement, passed, tmp_path, known_roof):
    case = ones_case(requires=(requirement,), cost=Cost(flops=2e9, bytes=1e6))
    result = results.run_suite("ones", [case], CPU, min_rounds=3, threads=1, folder=tmp_path)
    assert bool(results.failures(result)) is not passed
    assert json.loads((tmp_path / "ones.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["ones.json"]
    assert result["environment"]["threads"] == 1
    assert (result["environment"]["device"], result["environment"]["dtype"]) == ("cpu", "float32")
    smoke = results.run_suite("ones", [case], Target.of("cpu", smoke=True), threads=1)
    assert smoke["cases"][0]["requirements"] == []


def test_a_refused_rival_fails_a_requirement_and_a_skipped_one_is_named():
    def requirement_with(**others):
        sound = Provider(lambda: (torch.ones(2),), lambda dtype: (torch.ones(2, dtype=dtype),))
        made = {"a": sound, "b": sound, **others}
        requires = (Requirement("a", ("b", *others), 0.001),)
        case = Case("ones", {"T": 2}, tuple(made), lambda: made, "b", requires, seconds=0.0)
        (requirement,) = results.run_case(case, CPU, {}, seconds=0.0, min_rounds=3)["requirements"]
        return requirement["passed"], results.requirement_text(requirement)

    wrong = Provider(lambda: (-torch.ones(2),), lambda dtype: (torch.ones(2, dtype=dtype),))
    passed, text = requirement_with(c=wrong)
    assert not passed and text.startswith("FAIL: a ") and text.endswith("best of b, c, wanted >= 0.001x; c is refused")
    passed, text = requirement_with(c=Skipped("not installed"))
    assert passed and text.endswith("best of b, c, wanted >= 0.001x; without c: not installed")
    assert not requirement_with(c=wrong, d=Skipped("not installed"))[0]


def test_cost_and_shares_of_the_roof():
    entry = results.run_case(
        ones_case(cost=Cost(flops=2e9, bytes=1e6)), CPU, {"tflops": 1.0, "gbytes_per_s": 1.0}, seconds=0.0, min_rounds=1
    )
    assert entry["cost"] == {"flops": 2e9, "bytes": 1e6, "roof_ms": 2.0, "bound_by": "compute"}
    times = entry["providers"]["a"]
    assert times["tflops"] == pytest.approx(2.0 / times["median_ms"], rel=1e-3)
    assert times["share_of_roof"] == pytest.approx(2.0 / times["median_ms"], rel=1e-3)
    assert "how" not in times and "peak_mib" not in times  # of a GPU alone
    assert "cost" not in results.run_case(ones_case(), CPU, {}, seconds=0.0, min_rounds=1)


@pytest.mark.parametrize("moved_s,gbytes_per_s,wanted_ms", [
    (0.5, 3000.0, 1.433),  # bytes are most of it: longer on an H100 as its memory is slower
    (0.5, 4400.0, 1.0),  # never shorter
    (0.4, 3000.0, 1.0),  # products or launches are, of which both GPUs do as many
])  # fmt: skip
def test_limits_are_those_of_the_gpu_in_hand(moved_s, gbytes_per_s, wanted_ms):
    cost = Cost(bytes=moved_s * 4300e6)
    roof = {"tflops": 790.0, "gbytes_per_s": gbytes_per_s}
    assert results.scaled(Limit("a", 1.0), cost, roof) == Limit("a", wanted_ms)
    ratio = Requirement("a", "b", 2.0)
    assert results.scaled(ratio, cost, roof) == ratio


@pytest.mark.parametrize("gpu,judged", [("NVIDIA H100 80GB HBM3", 1), ("NVIDIA H200", 1), ("NVIDIA A100", 0)])
def test_hoppers_are_judged(gpu, judged, known_roof, monkeypatch):
    monkeypatch.setattr(results, "environment", lambda target: {"gpu": gpu})
    monkeypatch.setattr(clocks, "timer", lambda *_: WallTimer(lambda: None))
    monkeypatch.setattr(clocks, "peak_mib", lambda *_: None)
    target = Target(torch.device("cuda"), torch.float32)
    result = results.run_suite("ones", [ones_case(requires=(Limit("a", 60e3),))], target, min_rounds=1, threads=1)
    assert len(result["cases"][0]["requirements"]) == judged


@pytest.mark.slow
def test_a_cut_run_keeps_its_cases_and_goes_on(tmp_path, known_roof):
    calls = []
    cases = [ones_case(name, calls=calls) for name in ("first", "second", "third")]

    def run(chosen, **options):
        calls.clear()
        return results.run_suite("ones", chosen, CPU, min_rounds=1, threads=1, folder=tmp_path, **options)

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([cases[0], Case("second", {}, ("a",), killed, "a"), cases[2]])
    left = results.load(tmp_path / "ones.json")
    assert [case["name"] for case in left["cases"]] == ["first"] and left["not_run"] == ["second", "third"]
    whole = run(cases)
    assert set(calls) == {"second", "third"}
    assert [case["name"] for case in whole["cases"]] == ["first", "second", "third"] and whole["not_run"] == []
    assert whole["cases"][0] == left["cases"][0]
    run(cases)
    assert set(calls) == {"first", "second", "third"}  # a whole result is measured again
    before = run(cases[:2])
    after = run(cases, only="first")
    assert set(calls) == {"first"} and after["not_run"] == ["third"]
    assert after["cases"][1] == before["cases"][1]


def test_a_case_that_cannot_be_built_is_a_failure_and_costs_no_other(known_roof):
    broken = Case("second", {}, ("a",), lambda: 1 / 0, "a")
    result = results.run_suite("ones", [ones_case("first"), broken, ones_case("third")], CPU, min_rounds=1, threads=1)
    assert [case["name"] for case in result["cases"]] == ["first", "third"]
    assert results.failures(result) == ["second: ZeroDivisionError: division by zero"]


def test_results_of_another_format_are_refused(tmp_path):
    (tmp_path / "old.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="expected format_version 2, got 1"):
        results.load(tmp_path / "old.json")


@pytest.mark.parametrize("q3,warned", [(1.05, False), (1.5, True)])
def test_wide_spread_is_warned_of(q3, warned):
    numbers = {"median_ms": 1.0, "q1_ms": 0.99, "q3_ms": q3, "rounds": 7}
    result = {"what": "ones", "cases": [{"providers": {"a": numbers, "b": {"refused": "wrong"}}}]}
    assert bool(results.busy_warning(result)) is warned


def test_device_is_a_folder_name(monkeypatch):
    monkeypatch.setattr(identity, "cpu_model", lambda: "Intel(R) Xeon(R) Processor @ 2.50GHz")
    assert identity.device_slug() == "intel-xeon-processor-2.50ghz"
    monkeypatch.setattr(identity, "cpu_model", lambda: "AMD EPYC 7B13 64-Core Processor")
    assert identity.device_slug() == "amd-epyc-7b13-64-core-processor"
    assert identity.device_slug("NVIDIA H200") == "nvidia-h200"


def test_roof_is_measured_in_the_same_run():
    result = results.run_suite("ones", [ones_case()], Target.of("cpu", smoke=True), threads=1)
    assert set(result["roof"]) == {"tflops", "gbytes_per_s"} and min(result["roof"].values()) > 0
