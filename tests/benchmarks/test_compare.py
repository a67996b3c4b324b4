"""Regressions beyond the spread are flagged, and only those."""

import json

import pytest
import torch

from benchmarks import clocks
from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.measuring import Case, Provider, Target
from benchmarks.results import run_case
from tests.benchmarks.results_of import ENVIRONMENT, encoder_case, entry, requirement, result, some_results, write


def changed(change) -> dict:
    one = encoder_case()
    change(one)
    return one


def outcome(before, after) -> tuple[list[str], list[str]]:
    """Lines and regressions of two runs of one case."""
    return compare(*({"encoder": result("encoder", [one])} for one in (before, after)))


def test_equal_results_have_no_changes():
    results = {one["what"]: one for one in some_results()}
    lines, regressions = compare(results, results)
    assert regressions == [] and lines == ["0 regressions, 0 faster, 30 unchanged within the spread"]


def ours(ms, **more):
    return lambda one: one["providers"].update(moebert_kernels=entry(ms, 150 / ms, **more))


@pytest.mark.parametrize(
    "before,after,word",
    [
        (ours(100), ours(105), "slower"),
        (ours(105), ours(100), "faster"),
        (ours(100), ours(102.5, spread=0.001), None),  # beyond the spread, but below 3 %
        (ours(100), ours(105, spread=0.1), None),  # the old median lies within the new quartiles
        (ours(100, spread=0.1), ours(105), None),  # and the new one within the old
    ],
)
def test_a_change_counts_beyond_both_spreads_and_three_percent(before, after, word):
    lines, regressions = outcome(changed(before), changed(after))
    assert [line.split(":")[0] for line in regressions] == (["slower"] if word == "slower" else [])
    assert any("faster: encoder: encoder-B1: moebert_kernels 1.43x -> 1.5x" in line for line in lines) == (
        word == "faster"
    )


def test_a_machine_that_is_slower_as_a_whole_is_no_regression():
    def twice(one):
        for name, numbers in one["providers"].items():
            one["providers"][name] = numbers | {q: 2 * numbers[q] for q in ("q1_ms", "median_ms", "q3_ms")}

    assert outcome(encoder_case(), changed(twice))[1] == []


def test_a_slower_peer_is_listed_and_is_no_regression():
    slower = changed(lambda one: one["providers"].update(original=entry(200, 0.75)))
    lines, regressions = outcome(encoder_case(), slower)
    assert regressions == []
    assert lines[0] == "slower: encoder: encoder-B1: original 1.25x -> 0.75x of the baseline's speed (-40.0%)"


def test_times_count_where_there_is_no_ratio():
    def alone(ms):
        return changed(lambda one: one.update(providers={"moebert_kernels": entry(ms)}, baseline="moebert_kernels"))

    assert outcome(alone(100), alone(110))[1] == [
        "slower: encoder: encoder-B1: moebert_kernels 100 -> 110 ms (-9.1% speed)"
    ]


class KnownTimes:
    how, not_captured, calls = None, "", 1

    def __init__(self, ms):
        self.ms = ms

    def warm_ms(self):
        return [self.ms]

    def cold_ms(self):
        return []

    def replayed(self):
        return None


@pytest.fixture
def measured(monkeypatch):
    """A case as the suites write it, with `moebert_kernels` as its baseline, from given times."""

    def measured(**ms):
        ones = torch.ones(2)
        providers = {name: Provider(lambda name=name: (ones, name)[:1], lambda dtype: (ones.to(dtype),)) for name in ms}
        times = {provider.run: ms[name] for name, provider in providers.items()}
        monkeypatch.setattr(clocks, "timer", lambda run, *_: KnownTimes(times[run]))
        one = Case("peers", {"T": 2}, tuple(ms), lambda: providers, "moebert_kernels", seconds=0.0)
        return run_case(one, Target.of("cpu"), {}, seconds=0.0, min_rounds=3)

    return measured


def test_ours_as_the_baseline_is_compared_with_the_fastest_other(measured):
    before = measured(moebert_kernels=2.0, liger=4.0, megablocks=8.0)
    assert before["providers"]["moebert_kernels"]["speed_over_baseline"]["median"] == 1.0
    assert outcome(before, measured(moebert_kernels=6.0, liger=4.0, megablocks=8.0))[1] == [
        "slower: encoder: peers: moebert_kernels 2x -> 0.667x of liger's speed (-66.7%)"
    ]
    lines, regressions = outcome(before, measured(moebert_kernels=1.0, liger=4.0, megablocks=8.0))
    assert regressions == [] and "faster: encoder: peers: moebert_kernels 2x -> 4x of liger's speed (+100.0%)" in lines
    assert outcome(before, measured(moebert_kernels=6.0, liger=12.0, megablocks=24.0))[1] == []  # a slower machine
    assert outcome(before, measured(moebert_kernels=6.0, megablocks=8.0))[1] == [
        "slower: encoder: peers: moebert_kernels 4x -> 1.33x of megablocks's speed (-66.7%)"
    ]


def test_ours_alone_is_compared_by_time(measured):
    assert outcome(measured(moebert_kernels=2.0), measured(moebert_kernels=6.0))[1] == [
        "slower: encoder: peers: moebert_kernels 2 -> 6 ms (-66.7% speed)"
    ]


def test_another_baseline_is_listed_by_time():
    slower = changed(lambda one: one["providers"].update(dense=entry(300, 1.0)))
    lines, regressions = outcome(encoder_case(), slower)
    assert regressions == [] and lines[0] == "slower: encoder: encoder-B1: dense 150 -> 300 ms (-50.0% speed)"


def test_what_was_timed_once_is_only_listed():
    once = [changed(ours(ms, spread=0, rounds=1)) for ms in (100, 200)]
    lines, regressions = outcome(*once)
    assert regressions == [] and lines[0].startswith("timed once: encoder: encoder-B1: moebert_kernels 1.5x -> 0.75x")


def test_ours_refused_or_missing_is_a_regression():
    refused = changed(lambda one: one["providers"].update(moebert_kernels={"refused": "output 0: nan"}))
    assert outcome(encoder_case(), refused)[1] == ["refused: encoder: encoder-B1: moebert_kernels output 0: nan"]
    assert outcome(refused, refused)[1] == []
    missing = changed(lambda one: one["providers"].pop("moebert_kernels"))
    assert outcome(encoder_case(), missing)[1] == ["missing: encoder: encoder-B1: moebert_kernels"]
    lines, regressions = outcome(missing, encoder_case())
    assert regressions == [] and lines[0] == "new: encoder: encoder-B1: moebert_kernels"


def test_a_requirement_that_held_and_is_missed_is_a_regression():
    held, missed = (
        changed(lambda one, speed=speed: one.update(requirements=[requirement("moebert_kernels", "dense", 1.5, speed)]))
        for speed in (1.5, 1.49)
    )
    assert outcome(held, missed)[1] == [
        "missed: encoder: encoder-B1: FAIL: moebert_kernels 1.49x [1.49, 1.49] dense, wanted >= 1.5x"
    ]
    assert outcome(missed, missed)[1] == outcome(missed, held)[1] == []


def test_other_cases_are_listed_not_compared():
    renamed = encoder_case("encoder-B2")
    lines, _ = outcome(encoder_case(), renamed)
    assert lines[:2] == ["missing: encoder: encoder-B1", "new: encoder: encoder-B2"]
    longer = changed(lambda one: one.update(parameters={"model": "bert-base", "T": 512}))
    assert outcome(encoder_case(), longer)[0][0] == "another case of the same name: encoder: encoder-B1"


def test_command_takes_files_and_folders(tmp_path, capsys):
    before = write(tmp_path / "before", some_results())
    slow = some_results()
    slow[1]["cases"][0]["providers"]["moebert_kernels"] = entry(120.0, 1.25)
    after = write(tmp_path / "after", slow)
    assert main(["compare", str(before), str(before)]) == 0
    assert main(["compare", str(before), str(after)]) == 1
    assert "REGRESSION: slower: encoder: encoder-B1: moebert_kernels 1.5x -> 1.25x" in capsys.readouterr().out
    assert main(["compare", str(before / "encoder.json"), str(after / "encoder.json")]) == 1
    assert main(["compare", str(before / "ffn.json"), str(after)]) == 0


@pytest.mark.parametrize(
    "change,message,forced",
    [
        ({"environment": ENVIRONMENT | {"cpu": "another"}}, "encoder: expected the same cpu, got Intel(R)", 0),
        ({"environment": ENVIRONMENT | {"threads": 1}}, "encoder: expected the same threads, got 2 and 1", 0),
        ({"settings": {"min_rounds": 3}}, "encoder: expected the same settings, got", 0),
        ({"smoke": True}, "encoder: expected shapes that count, got those of --smoke", 2),
        ({"what": "other"}, "expected a suite in both, got encoder and other", 2),
        ({"format_version": 1}, "got 1", 2),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, change, message, forced):
    before = write(tmp_path / "before", [result("encoder", [encoder_case()])])
    after = write(tmp_path / "after", [result("encoder", [encoder_case()]) | change])
    assert main(["compare", str(before), str(after)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare: ") and message in error and error.count("\n") == 1
    assert main(["compare", str(before), str(after), "--force"]) == forced


@pytest.mark.parametrize("content", [None, "no json", json.dumps([1])])
def test_no_results(tmp_path, capsys, content):
    path = tmp_path / "encoder.json"
    if content is not None:
        path.write_text(content)
    assert main(["compare", str(path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("compare: ")
