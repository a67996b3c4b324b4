"""The tests of the kernels are themselves tested: a kernel broken in one place must make them fail."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytest.importorskip("triton")
pytestmark = pytest.mark.slow  # each starts a process that imports torch and interprets kernels

FFN = "tests/ops/test_fused_moe_ffn.py"
ADD_NORM = "tests/ops/test_fused_moe_ffn_add_norm.py"
MPO = "tests/ops/test_mpo_expert_weights.py"
# what breaks: file, what stands there, what takes its place, the tests that must notice
MUTATIONS = {
    "mask": ("expert_gemm.py", "mask_m = row < end\n", "mask_m = row < end - 1\n", FFN, "skewed and float32"),
    "bias": ("fused_moe_ffn.py", "acc += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]",
             "acc += 0.0", FFN, "even and float32"),
    "store": ("fused_moe_ffn_backward.py", "tl.store(dpre_ptrs + I, (dh * gate_h)", "tl.store(dpre_ptrs, (dh * gate_h)",
              FFN, "activations and swiglu and True"),
    "run": ("expert_gemm_weights.py", "slot = 2 * program + (step == 0).to(tl.int64)", "slot = 2 * program", FFN,
            "skewed and float32"),
    "offset": ("tiles.py", "first - (before_next - tiles) * BLOCK, 0), 0) + tile * BLOCK",
               "first - (before_next - tiles) * BLOCK, 0), 0)", FFN, "all_to_one and float32"),
    "scale": ("fused_moe_ffn_add_norm.py", "ffn = tl.where(keep, ffn * scale, 0.0)", "ffn = tl.where(keep, ffn, 0.0)",
              ADD_NORM, "dropout and False"),
    "product": ("mpo_expert_weights.py", "for k in range(0, D_NEXT, BLOCK_K)", "for k in range(0, BLOCK_K, BLOCK_K)",
                MPO, "matches_reference and float32 and one_empty"),
    "place": ("mpo_expert_weights.py", "a % J * MIDDLE_COLUMNS + x % MIDDLE_COLUMNS", "a % J * MIDDLE_COLUMNS",
              MPO, "shapes and off_centre"),
    "predicate": ("mpo_expert_weights.py", "tl.load(Offsets + expert + 1) >", "tl.load(Offsets + expert + 1) >=",
                  MPO, "matches_reference and float32 and one_empty"),
}  # fmt: skip


def run_tests(folder, file, keywords):
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        file,
        "-k",
        f"triton and {keywords}",
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package and the tests of the ops, in a folder of their own."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "golden", "*.so")
    for name in ("moebert_kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_fails(copy, name):
    file, right, wrong, tests, keywords = MUTATIONS[name]
    path = copy / "moebert_kernels" / "kernels" / file
    source = path.read_text()
    assert right in source, f"{file} no longer has the line that this mutation breaks"
    path.write_text(source.replace(right, wrong))
    try:
        done = run_tests(copy, tests, keywords)
    finally:
        path.write_text(source)
    assert done.returncode == 1 and "1 failed" in done.stdout, f"nobody noticed:\n{done.stdout[-2000:]}"


def test_the_unbroken_copy_passes(copy):
    done = run_tests(copy, FFN, "skewed and float32")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:]
