"""The tests of the kernels are themselves tested: a kernel broken in one place must make them fail."""

import shutil

import pytest

from tests.forks import run_forked
from tests.helpers import ROOT

pytest.importorskip("triton")

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


PROGRAM = """
import os, sys, pathlib, pytest
path, right, wrong, tests, keywords = {arguments!r}
os.chdir({folder!r})
source = pathlib.Path(path).read_text()
assert right in source, f"{{path}} no longer has the line that this mutation breaks"
pathlib.Path(path).write_text(source.replace(right, wrong))
try:
    options = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain"]
    sys.exit(pytest.main([*options, tests, "-k", "triton and " + keywords]))
finally:
    pathlib.Path(path).write_text(source)
"""


@pytest.mark.slow
def test_broken_kernels_fail(tmp_path):
    """In a copy of the package and of the tests, which passes as long as nothing is broken."""
    folder, programs = tmp_path / "copy", tmp_path / "programs"
    for name in ("moebert_kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    programs.mkdir()
    unbroken = {"unbroken": ("expert_gemm.py", "", "", FFN, "skewed and float32")}
    texts = {
        name: PROGRAM.format(arguments=(f"moebert_kernels/kernels/{file}", *others), folder=str(folder))
        for name, (file, *others) in (MUTATIONS | unbroken).items()
    }
    ended = run_forked(texts, programs, ("torch", "triton", "pytest"), path=folder)
    status, printed = ended.pop("unbroken")
    assert status == 0 and "1 passed" in printed, printed
    for name, (status, printed) in ended.items():
        assert status == 1 and "1 failed" in printed, f"nobody noticed {name}:\n{printed[-2000:]}"
