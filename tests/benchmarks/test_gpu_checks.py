"""What `make gpu` leaves out where one of its checks fails, and a `_C` that is none of this Python's."""

import json

import pytest
import torch

from benchmarks import gpu, gpu_plan, gpu_worker, layers
from benchmarks.measuring import Skipped, Target
from moebert_kernels import doctor
from moebert_kernels.kernels.config import Device
from tests.benchmarks.gpu_fakes import FakeMachine
from tests.benchmarks.test_gpu import ALL, STEPS, WHO

HOPPER = Device(90, 132)
GUARDS = {step.name: step.guards for step in STEPS if step.guards}


@pytest.mark.parametrize("name", GUARDS)
def test_what_a_failed_check_tried_is_left_out_from_then_on(name, tmp_path):
    steps = [step for step in STEPS if step.name in (name, "tiny/fused_moe_ffn_add_norm-forward-T8")]
    record, said = gpu.Record(tmp_path, WHO), []
    for left in (steps, steps, steps[1:]):  # also in calls after it, with the check or without
        machine = FakeMachine(steps, outcomes={name: {"status": "failed", "note": "no"}})
        gpu.go_on(record, machine, lambda: ALL, end=500, steps=left, build=None, say=said.append)
        assert machine.withheld == [GUARDS[name]]
    assert f"no; what follows runs with {GUARDS[name]}=0" in said[0]


def test_a_check_that_is_good_leaves_nothing_out(tmp_path):
    machine = FakeMachine(STEPS)
    gpu.go_on(gpu.Record(tmp_path, WHO), machine, lambda: ALL, end=500, steps=STEPS[:3], build=None, say=print)
    assert machine.withheld == []


def test_wrong_forms_of_the_cuda_check_are_named_and_the_others_measured(tmp_path, monkeypatch):
    found = {"a: x": {"ok": False, "message": "no"}, "b: y": {"ok": True, "message": "yes"}}
    monkeypatch.setattr(doctor, "cuda_self_test", lambda: found)
    outcome = gpu_worker.check(Target.of("cpu", smoke=True), tmp_path, "cuda")
    assert outcome == {"status": "ok", "note": "1 of 2 right", "missed": ["a: x: no"]}
    assert json.loads((tmp_path / "gpu-checks.json").read_text())["cuda"] == found


def test_tiles_are_checked_at_sizes_that_large_layers_have(tmp_path):
    outcome = gpu_worker.check(Target.of("cpu", smoke=True), tmp_path, "tiles")
    assert outcome == {"status": "ok", "note": "4 of 4 right"}
    few = doctor.tiles_self_test((doctor.FEW_TILES,))
    assert {entry["ok"] for entry in few.values()} == {True}


def test_variables_leave_out_descriptors_and_cuda_forms(monkeypatch):
    pytest.importorskip("triton")
    from moebert_kernels.kernels import expert_gemm
    from moebert_kernels.kernels.config import candidates

    tile = candidates("descriptors", "half", HOPPER.arch)[0]
    a, w = torch.empty(4096, 768, dtype=torch.bfloat16), torch.empty(4, 768, 768, dtype=torch.bfloat16)
    assert expert_gemm.can_be_described(a, w, tile, HOPPER)
    assert not expert_gemm.can_be_described(a[:1].expand(4096, 768), w, tile, HOPPER)
    assert not expert_gemm.can_be_described(a, w[:1].expand(4, 768, 768), tile, HOPPER)
    monkeypatch.setenv(gpu_plan.DESCRIPTORS, "0")
    assert not expert_gemm.can_be_described(a, w, tile, HOPPER)
    monkeypatch.setenv(gpu_plan.CUDA_FORMS, "0")
    assert layers.cuda_or_skipped("expert_gemm", a) == Skipped("MOEBERT_KERNELS_BENCH_CUDA=0")


def test_a_carried_module_of_another_python_ends_the_call(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "FOLDER", tmp_path / "gpu")
    monkeypatch.setattr(gpu, "look", lambda names: {name: None if name == gpu_plan.NATIVE else "1" for name in names})
    monkeypatch.setattr(gpu, "gpu_of_this_machine", lambda: WHO["gpu"])
    monkeypatch.setattr(gpu, "set_up", lambda rehearse: None)
    assert gpu.main(["--carried"]) == 2
    assert "--carried: expected moebert_kernels/_C." in capsys.readouterr().err
