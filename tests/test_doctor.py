"""The report always comes, names what would run and why, and fails if an op is wrong."""

import json
import subprocess
import sys

import pytest
import torch

import moebert_kernels
from moebert_kernels import backend, doctor, native, reference
from moebert_kernels.cuda_backend import expert_gemm, expert_gemm_norm, tiny_ffn
from moebert_kernels.cuda_backend import group_tokens as cuda_groups
from moebert_kernels.doctor_text import render
from moebert_kernels.torch_backend import group_tokens as by_sorting
from moebert_kernels.torch_backend import hash_route as by_table
from tests.helpers import ROOT
from tests.kernels.cuda_stand_in import StandIn


@pytest.fixture(scope="module")
def report():
    return doctor.collect()


def test_every_op_is_tested_and_agrees(report):
    assert set(report["self_test"]) == set(moebert_kernels.__all__) - {"Grouping", "warmup"}
    assert all(result["ok"] for result in report["self_test"].values()), report["self_test"]
    assert report["ok"]


def test_report_says_what_runs_and_why(report):
    assert set(report["backends"]) == set(backend.OPS)
    for choice in report["backends"].values():
        assert choice["backend"] in backend.BACKENDS
        assert choice["reason"]
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # PyPI's names no CUDA
    assert report["native"]["built"] or report["native"]["reason"]


def test_text_and_json_hold_the_same(report, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "collect", lambda: report)
    assert doctor.run(as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert doctor.run() == 0
    text = capsys.readouterr().out
    for word in (
        *backend.OPS,
        report["versions"]["torch"],
        report["native"]["reason"],
        "Every op runs here and agrees",
    ):
        assert word in text


def meant(report, **changes):
    """The sentences at the end of a report that differs in these parts."""
    return render(report | changes).partition("what this means\n  ")[2].split("\n  ")


def test_the_end_says_what_matters_and_what_to_do(report):
    cpu = {
        **report["machine"],
        "gpus": [],
        "serving on the cpu": {"int8 instructions": True, "bfloat16 instructions": True},
    }
    good, text = meant(report, machine=cpu), render(report | {"machine": cpu})
    assert good[:2] == [
        "Every op runs here and agrees with its reference.",
        "There is no GPU that torch can use, so the ops run on the CPU. Nothing is missing for that.",
    ]
    assert "plain torch, since Triton's and CUDA's kernels need a GPU" in text and "needs a CUDA device" not in text
    slow = {**cpu, "serving on the cpu": {"int8 instructions": False, "bfloat16 instructions": True}}
    assert "This CPU has no instructions for int8: a model that is prepared in it gains less time." in meant(
        report, machine=slow
    )
    gpu = {**cpu, "gpus": ["H100, sm_90, 80 GiB"]}
    by_triton = meant(report, machine=gpu, triton={"usable": True, "reason": "GPU", "interpreter": False})
    assert by_triton[1] == "The ops run on the GPU, in Triton's kernels. The CUDA kernels are optional."
    for broken in ("RuntimeError: no driver", {"usable": False, "reason": "not installed", "interpreter": False}):
        assert "Triton's kernels do not run, for the reason above" in meant(report, machine=gpu, triton=broken)[1]
    bare = report["versions"] | {"transformers": "not installed", "datasets": "not installed"}
    assert meant(report, versions=bare)[-1] == (
        "The ops alone are installed: converting and training need transformers, datasets; run"
        " `pip install -e '.[train]'` in a clone, or `pip install 'WHEEL[train]'`"
    )


def test_a_failed_op_is_named_at_the_end(report):
    tests = {**report["self_test"], "expert_gemm": {"ok": False, "message": "wrong"}}
    assert meant(report, self_test=tests, ok=False)[0] == (
        "AN OP FAILED (expert_gemm): do not trust it, and report it with `moebert doctor --json`."
    )
    probes = {name: "RuntimeError: broken" for name in ("machine", "triton", "native", "backends")}
    assert render(
        report | probes | {"machine": {**report["machine"], "gpus": "broken", "serving on the cpu": "broken"}}
    )


def test_wrong_op_is_found_by_name(monkeypatch, capsys):
    honest = moebert_kernels.fused_moe_ffn
    monkeypatch.setattr(moebert_kernels, "fused_moe_ffn", lambda *args: honest(*args) * 1.0001)
    assert doctor.run(as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert [op for op, result in report["self_test"].items() if not result["ok"]] == ["fused_moe_ffn"]
    assert "output: expected an error of at most" in report["self_test"]["fused_moe_ffn"]["message"]


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A CPU whose `_C` has all kernels: two as their references, the GEMMs by a stand-in."""
    kernels = StandIn()
    kernels.tiny_ffn_max_tokens, kernels.tiny_ffn_max_experts = 256, 1024

    def add_norm(x, ids, w1, b1, w2, b2, norm_weight, norm_bias, weights, eps, activation):
        if norm_weight is None:
            return reference.fused_moe_ffn(x, ids, w1, b1, w2, b2)
        return reference.fused_moe_ffn_add_norm(x, ids, w1, b1, w2, b2, norm_weight, norm_bias, eps=eps)

    def forward(expert_ids, num_experts):
        return by_sorting.forward(expert_ids, num_experts)

    monkeypatch.setattr(native, "module", lambda: kernels)
    monkeypatch.setattr(tiny_ffn, "add_norm", add_norm)
    monkeypatch.setattr(expert_gemm_norm, "LEAST_TOKENS", doctor.MANY_TOKENS)
    for form in (expert_gemm, expert_gemm_norm):
        monkeypatch.setattr(form, "stream_of", lambda tensor: 0)
    monkeypatch.setattr(cuda_groups, "forward", forward)
    monkeypatch.setattr(cuda_groups, "by_hash", lambda *a: forward(by_table.forward(*a[:3]), a[3]))
    monkeypatch.setattr(backend, "kernel_unavailable", lambda *_: None)
    backend.unavailable.cache_clear()
    yield kernels
    backend.unavailable.cache_clear()


def test_each_cuda_form_is_tested_where_a_gpu_can_run_it(pretended_gpu, monkeypatch):
    results = doctor.cuda_self_test(torch.device("cpu"))
    assert all(result["ok"] for result in results.values()), results
    assert set(results) == {f"{op}: {kernel}" for op, kernel in doctor._CUDA_SELF_TESTS}
    forms = {(op, kernel) for op, kernels in backend._CUDA_FORMS.items() for kernel in kernels}
    assert forms <= set(doctor._CUDA_SELF_TESTS)
    assert pretended_gpu.calls == [False, False, True, False, True, False, True]
    assert pretended_gpu.normed == [False]

    honest = pretended_gpu.expert_gemm
    monkeypatch.setattr(pretended_gpu, "expert_gemm", lambda **k: honest(**{**k, "bias": 0}))
    wrong = [name for name, result in doctor.cuda_self_test(torch.device("cpu")).items() if not result["ok"]]
    assert wrong == [name for name in results if name.endswith(": expert_gemm")]
    monkeypatch.setattr(pretended_gpu, "expert_gemm", honest)
    normed = pretended_gpu.expert_gemm_norm
    monkeypatch.setattr(pretended_gpu, "expert_gemm_norm", lambda **k: normed(**{**k, "norm_bias": k["norm_weight"]}))
    wrong = [name for name, result in doctor.cuda_self_test(torch.device("cpu")).items() if not result["ok"]]
    assert wrong == ["fused_moe_ffn_add_norm: expert_gemm_norm"]
    monkeypatch.setattr(backend, "kernel_unavailable", lambda kernel, *_: None if kernel == "group_tokens" else "none")
    assert set(doctor.cuda_self_test(torch.device("cpu"))) == {name for name in results if "group" in name}


def test_a_wrong_cuda_form_is_reported(report, monkeypatch, capsys):
    wrong = {"expert_gemm: expert_gemm": {"ok": False, "message": "AssertionError: output is not finite"}}
    monkeypatch.setattr(doctor, "self_test", lambda: report["self_test"])
    monkeypatch.setattr(doctor, "cuda_self_test", lambda: wrong)
    assert doctor.run() == 1
    assert "expert_gemm: expert_gemm  FAILED   AssertionError: output is not finite" in capsys.readouterr().out


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
    assert "AN OP FAILED (group_tokens" in text


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
