"""The GPU's clock on a pretended GPU: what is captured, what lies between the events, what a lost device ends."""

from dataclasses import replace

import pytest
import torch

from benchmarks import clocks, gate, results
from benchmarks.measuring import Case, Provider, Requirement, Target
from moebert_kernels.bench import clocks as package_clocks

CUDA = torch.device("cuda")


class Device:
    """Notes what is asked of it, in order; an event's time is the number of notes before it."""

    def __init__(self, monkeypatch):
        self.notes, self.lost, self.capturing = [], False, False
        self.sync_debug_mode = 0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.notes.append("event")
                self.time = len(device.notes)

            def elapsed_time(self, end):
                return float(end.time - self.time)

        class Graph:
            def replay(self):
                device.notes.append("replay")

        class Stream:
            def wait_stream(self, other):
                pass

        class Within:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, device.stream = device.stream, self.stream

            def __exit__(self, *_):
                device.stream = self.before

        class Capture(Within):
            """One that fails stays on its stream, as torch 2.11's does."""

            def __init__(self, graph, pool=None, capture_error_mode="global"):
                super().__init__(Stream())

            def __enter__(self):
                super().__enter__()
                device.notes.append("capture")
                device.capturing = True

            def __exit__(self, kind, *_):
                device.capturing = False
                if kind is not None:
                    raise RuntimeError("operation failed due to a previous error during capture")
                super().__exit__()

        self.stream = self.caller = Stream()
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream, "stream": Within,
            "current_stream": lambda: self.stream, "synchronize": self.synchronize, "is_initialized": lambda: True,
            "is_available": lambda: True, "is_current_stream_capturing": lambda: self.capturing,
            "get_sync_debug_mode": lambda: self.sync_debug_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_debug_mode", mode),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setitem(package_clocks._BUFFERS, CUDA, self)

    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        self.notes.append("wait")

    def zero_(self):
        self.notes.append("flush")

    def run(self):
        self.notes.append("call")

    def run_waiting(self):
        if self.sync_debug_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.run_waiting_unnoticed()

    def run_that_asks(self):
        if torch.cuda.is_current_stream_capturing():
            self.run()
        else:
            self.run_waiting()

    def run_waiting_unnoticed(self):
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.run()


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_replays_of_a_graph_are_timed_warm_and_cold(device):
    timer = clocks.timer(device.run, CUDA)
    assert (timer.how, timer.not_captured) == ("graph", "")
    assert (device.sync_debug_mode, device.stream) == (0, device.caller)
    device.notes.clear()
    assert timer.warm_ms() == [2.0] * package_clocks.CALLS
    # work ahead keeps the device busy, one replay fills the caches, then nothing but replays between events
    ahead = ["flush"] * package_clocks.DELAYS + ["replay"]
    assert device.notes == ahead + ["event", "replay", "event"] * package_clocks.CALLS + ["wait"]
    device.notes.clear()
    timer.cold_ms()
    assert device.notes == ["flush", "event", "replay", "event"] * package_clocks.CALLS + ["wait"]


def test_short_calls_are_timed_many_in_a_row(device):
    timer = clocks.timer(device.run, CUDA, calls=20)
    assert (timer.how, timer.calls) == ("graph", 20)
    assert device.notes.count("capture") == 2 and device.notes[-20:] == ["call"] * 20
    assert timer.warm_ms() == [2.0 / 20] * package_clocks.CALLS
    assert timer.cold_ms() == [2.0] * package_clocks.CALLS  # of one call: the others would find their operands
    waiting = clocks.timer(device.run_waiting, CUDA, calls=20)
    assert (waiting.how, waiting.calls, waiting.warm_ms()) == ("eager", 1, [2.0] * package_clocks.CALLS)


@pytest.mark.parametrize("parameters,calls", [
    ({"op": "fused_moe_ffn", "T": 256}, 20), ({"op": "fused_moe_ffn", "T": 257}, 1), ({"model": "bert", "T": 128}, 1),
    ({"op": "group_tokens_by_hash", "T": 16384}, 20), ({"op": "mpo_expert_weights"}, 1),
])  # fmt: skip
def test_ops_of_microseconds_are_the_short_ones(parameters, calls):
    assert Case("a", parameters, (), dict, "a").calls_per_replay == calls


def test_what_cannot_be_captured_is_timed_eagerly_and_says_so(device):
    device.sync_debug_mode = 1  # a caller's own
    timer = clocks.timer(device.run_waiting, CUDA)
    assert timer.how == "eager"
    assert timer.not_captured == "RuntimeError: called a synchronizing CUDA operation"
    assert "capture" not in device.notes  # which would fail, and not without a trace
    assert (device.sync_debug_mode, device.stream) == (1, device.caller)
    device.notes.clear()
    assert timer.warm_ms() == [2.0] * package_clocks.CALLS
    assert device.notes[-4:] == ["event", "call", "event", "wait"]


def test_what_waits_only_where_it_is_not_captured_is_captured(device):
    assert clocks.timer(device.run_that_asks, CUDA).how == "graph"
    assert not torch.cuda.is_current_stream_capturing()


def test_a_capture_that_fails_leaves_the_stream_as_it_was(device):
    timer = clocks.timer(device.run_waiting_unnoticed, CUDA)
    assert timer.how == "eager" and "capture" in device.notes
    assert timer.not_captured == "RuntimeError: operation failed due to a previous error during capture"
    assert (device.sync_debug_mode, device.stream) == (0, device.caller)


def test_without_capture_the_wall_clock_waits_for_the_end(device):
    timer = clocks.timer(device.run, CUDA, capture=False)
    assert timer.how == "eager" and timer.not_captured == ""
    device.notes.clear()
    assert len(timer.warm_ms()) == 1 and timer.cold_ms() == []
    assert device.notes == ["call", "wait"]


def test_peak_memory_is_that_of_a_later_call(device, monkeypatch):
    held = {"now": 2**20, "peak": 0}

    def step():
        state = 0 if held["peak"] else 2**22  # allocated by the first call, and kept
        held["now"] += state
        held["peak"] = max(held["peak"], held["now"] + 2**21)

    for name, value in {
        "memory_allocated": lambda: held["now"], "max_memory_allocated": lambda: held["peak"],
        "reset_peak_memory_stats": lambda: held.update(peak=held["now"]),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    assert clocks.peak_mib(step, CUDA) == 2.0


def test_results_of_a_pretended_gpu_say_how_they_were_timed(device, monkeypatch):
    monkeypatch.setattr(clocks, "peak_mib", lambda run, device: 1.25)
    monkeypatch.setattr(clocks, "roof", lambda *_: {"tflops": 1.0, "gbytes_per_s": 1.0})
    ones = torch.ones(2)

    def provider(run, **options):
        return Provider(lambda: (run(), (ones,))[1], lambda dtype: (ones.to(dtype),), **options)

    made = {"graph": provider(device.run), "waiting": provider(device.run_waiting),
            "eager": provider(device.run, capture=False)}  # fmt: skip
    case = Case("ones", {}, tuple(made), lambda: made, "graph", seconds=0.0)
    target = Target(CUDA, torch.bfloat16)
    entries = results.run_case(case, target, {}, seconds=0.0, min_rounds=25)["providers"]
    assert {name: entry["how"] for name, entry in entries.items()} == {
        "graph": "graph",
        "waiting": "eager",
        "eager": "eager",
    }
    assert set(entries["waiting"]) - set(entries["graph"]) == {"not_captured"}
    assert set(entries["graph"]["cold"]) == {"median_ms", "q1_ms", "q3_ms"} and entries["graph"]["peak_mib"] == 1.2
    assert {"p50_ms", "p99_ms"} <= set(entries["graph"])  # 25 rounds of 5 calls
    assert "cold" not in entries["eager"]


@pytest.mark.parametrize("eager", [False, True])
def test_replays_and_eager_calls_are_compared_only_where_asked(device, monkeypatch, eager):
    monkeypatch.setattr(clocks, "peak_mib", lambda run, device: None)
    ones = torch.ones(2)
    made = {name: Provider(lambda run=run: (run(), (ones,))[1], lambda dtype: (ones.to(dtype),))
            for name, run in (("ours", device.run), ("loop", device.run_waiting), ("same", device.run))}  # fmt: skip
    requires = (Requirement("ours", "loop", 0.01, eager=eager), Requirement("ours", "same", 0.01))
    one = Case("ones", {}, tuple(made), lambda: made, "ours", requires, seconds=0.0)
    over_loop, over_same = results.run_case(one, Target(CUDA, torch.bfloat16), {}, seconds=0.0, min_rounds=1)[
        "requirements"
    ]
    assert over_loop["passed"] is eager and over_same["passed"]
    assert results.requirement_text(over_loop).endswith("timed differently: ours graph, loop eager")
    assert "notes" not in over_same


def test_what_the_graph_computes_is_checked_after_it_was_timed(device, monkeypatch):
    monkeypatch.setattr(clocks, "peak_mib", lambda run, device: 1.25)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: wrong.zero_())
    right, wrong = torch.ones(2), torch.ones(2)
    made = {name: Provider(lambda outputs=outputs: (outputs,),
                           lambda dtype: (torch.ones(2, dtype=dtype),)) for name, outputs in
            {"sound": right, "wrong": wrong}.items()}  # fmt: skip
    case = Case("ones", {}, tuple(made), lambda: made, "sound", seconds=0.0)
    entries = results.run_case(case, Target(CUDA, torch.float32), {}, seconds=0.0, min_rounds=1)["providers"]
    assert entries["sound"]["how"] == "graph"
    assert set(entries["wrong"]) == {"refused"} and entries["wrong"]["refused"].startswith("once captured: output 0")


def test_a_lost_device_ends_the_suite_and_keeps_what_it_has(device, monkeypatch, tmp_path):
    monkeypatch.setattr(clocks, "roof", lambda *_: {})
    ones = torch.ones(2)
    good = Provider(lambda: (ones,), lambda dtype: (ones.to(dtype),))

    def lose():
        device.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cases = [Case(name, {}, ("a",), lambda run=run: {"a": replace(good, run=run)}, "a", seconds=0.0)
             for name, run in (("first", good.run), ("second", lose), ("third", good.run))]  # fmt: skip

    def run():
        return results.run_suite("ones", cases, Target.of("cpu"), min_rounds=1, threads=1, folder=tmp_path)

    result = run()
    assert [case["name"] for case in result["cases"]] == ["first"] and result["not_run"] == ["third"]
    assert result["broken"]["second"].startswith("RuntimeError: CUDA error: an illegal memory access")
    device.lost = False
    after = run()  # in a new process, after all
    assert [case["name"] for case in after["cases"]] == ["first", "third"] and after["not_run"] == []
    assert after["broken"] == result["broken"]


def test_a_refusal_on_a_healthy_device_is_only_a_refusal(device):
    def broken():
        raise RuntimeError("no kernel for this shape")

    checked = gate.check({"a": Provider(broken, lambda dtype: ())})
    assert checked.refused == {"a": "RuntimeError: no kernel for this shape"}
