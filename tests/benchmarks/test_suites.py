"""Every case at its smoke shapes: the committed baselines are what their references say, and the driver reports it."""

import subprocess
import sys

import pytest
import torch

from benchmarks import bench_layers, suites
from benchmarks.__main__ import main
from benchmarks.gate import check
from benchmarks.layers import layer_case
from benchmarks.measuring import Target
from tests.helpers import ROOT


@pytest.mark.parametrize("what", suites.ALL)
def test_every_provider_passes_its_gate(what):
    for case in suites.cases(what, Target.of("cpu", smoke=True)):
        providers = case.build()
        assert set(providers) == set(case.providers)
        assert case.baseline in providers
        checked = check(providers)
        assert checked.refused == {}


def test_a_layer_with_several_experts_for_each_token_passes_its_gate():
    """As privacy-filter's, which only a GPU gets at its size."""
    names = bench_layers.ANCHORS["-E128-top4-H640"][1]
    shape = {"H": 16, "I": 24, "E": 6, "D": 48, "top_k": 2}
    case = layer_case("fused_moe_ffn", "forward", 9, Target.of("cpu"), names, suffix="-top2", shape=shape)
    checked = check(case.build())
    assert checked.refused == {} and set(checked.passed) == set(names)
    assert case.parameters["top_k"] == 2 and case.cost.flops == 9 * 2 * 2 * 2 * 16 * 24


def test_suites_of_ops_import_nothing_heavy():
    """`make gpu` has seconds: the libraries of models come with the first case that needs them (mpo's: Triton)."""
    code = "\n".join((
        "import sys",
        "from benchmarks import bench_mpo, suites",
        "from benchmarks.measuring import Target",
        "for what in set(suites.OPS) - {'mpo'}: suites.cases(what, Target.of('cpu', smoke=True))",
        "print([name for name in ('transformers', 'accelerate', 'triton', 'matplotlib') if name in sys.modules])",
    ))  # fmt: skip
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("what", suites.ALL)
def test_names_and_requirements_are_consistent(what):
    gpu = Target(torch.device("cuda"), torch.bfloat16)
    for target in (Target.of("cpu", True), Target.of("cpu"), gpu):
        cases = suites.cases(what, target)
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            over = [getattr(requirement, "over", ()) for requirement in case.requires]
            named = {name for names in over for name in ((names,) if isinstance(names, str) else names)}
            assert named | {case.baseline, *(r.provider for r in case.requires)} <= set(case.providers)


@pytest.mark.slow
def test_benchmarks_are_collected_without_a_timeout_plugin():
    pytest.importorskip("pytest_benchmark")
    words = (sys.executable, "-m", "pytest", "benchmarks", "-k", "routing", "-p", "no:timeout", "--smoke",
             "--collect-only", "-q")  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "test_case[routing-T16-original]" in done.stdout, done.stdout + done.stderr


def test_driver_writes_only_where_told(tmp_path, capsys):
    assert main(["run", "--what", "routing", "--smoke", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["routing.json"]
    assert "every provider agrees with its reference" in capsys.readouterr().out
