"""The report always comes, names what would run and why, and fails if an op is wrong."""

import json
import subprocess
import sys

import pytest
import torch

import moebert_kernels
from moebert_kernels import backend, doctor
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def report():
    return doctor.collect()


def test_every_op_is_tested_and_agrees(report):
    assert set(report["self_test"]) == set(moebert_kernels.__all__) - {"Grouping"}
    assert all(result["ok"] for result in report["self_test"].values()), report["self_test"]
    assert report["ok"]


def test_report_says_what_runs_and_why(report):
    assert set(report["backends"]) == set(backend.OPS)
    for choice in report["backends"].values():
        assert choice["backend"] in backend.BACKENDS
        assert choice["reason"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["native"]["built"] or report["native"]["reason"]


def test_text_and_json_hold_the_same(report, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "collect", lambda: report)
    assert doctor.run(as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert doctor.run() == 0
    text = capsys.readouterr().out
    for word in (*backend.OPS, report["versions"]["torch"], report["native"]["reason"], "every op agrees"):
        assert word in text


def test_wrong_op_is_found_by_name(monkeypatch, capsys):
    honest = moebert_kernels.fused_moe_ffn
    monkeypatch.setattr(moebert_kernels, "fused_moe_ffn", lambda *args: honest(*args) * 1.0001)
    assert doctor.run(as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert [op for op, result in report["self_test"].items() if not result["ok"]] == ["fused_moe_ffn"]
    assert "output: expected an error of at most" in report["self_test"]["fused_moe_ffn"]["message"]


def test_wrong_gradient_is_found(monkeypatch):
    honest = moebert_kernels.expert_gemm

    def forgets_the_weight(x, w, grouping, bias):
        return honest(x, w.detach(), grouping, bias) + 0 * w.sum()

    monkeypatch.setattr(moebert_kernels, "expert_gemm", forgets_the_weight)
    result = doctor.self_test()["expert_gemm"]
    assert not result["ok"]
    assert "gradient of argument 2" in result["message"]


def test_a_crash_and_a_bad_probe_do_not_end_the_report(monkeypatch, capsys):
    def crash(*args):
        raise RuntimeError("no kernel image\nsecond line")

    monkeypatch.setattr(moebert_kernels, "group_tokens", crash)
    monkeypatch.setattr(doctor, "_cpu_name", crash)
    monkeypatch.setattr(backend, "explain", crash)
    assert doctor.run() == 1
    text = capsys.readouterr().out
    assert "RuntimeError: no kernel image" in text
    assert "second line" not in text
    assert "AN OP DISAGREES WITH ITS REFERENCE" in text


def test_bad_preference_is_reported(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cudnn")
    report = doctor.collect()
    assert not report["ok"]
    assert "MOEBERT_KERNELS_BACKEND: expected one of cuda, triton, torch, got 'cudnn'" in report["backends"]


def test_leaves_the_random_state_alone(report):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    doctor.self_test()
    assert torch.equal(torch.rand(3), expected)


def test_runs_as_a_module():
    command = [sys.executable, "-m", "moebert_kernels.doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
