"""The project for the Hub's kernel-builder: it imports under any name, twice in a process, without this package."""

import os
import re
import shutil
import subprocess
import sys

import pytest

import build_hub

# what kernel-builder writes for a kernel without native code
OPS = """
import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name):
    return f"{name}::{{op_name}}"
"""
PROGRAM = """
import sys, torch

sys.modules["moebert_kernels"] = None  # whoever imports it fails
import first, second

ids = torch.tensor([0, 1, 1, -1, 0])
for package in (first, second):
    w = [torch.randn(shape, requires_grad=True) for shape in ((2, 6, 4), (2, 6), (2, 4, 6), (2, 4))]
    x = torch.randn(5, 4)
    y = package.fused_moe_ffn(x, ids, *w)
    y.sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in w)
    compiled = torch.compile(package.fused_moe_ffn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, package.group_tokens(ids, 2), *w), y)
    assert [choice.backend for choice in package.backend.explain()] == ["torch"] * 7
    names = dir(getattr(torch.ops, package.__name__))
    assert {"fused_moe_ffn", "fused_moe_ffn_backward", "group_tokens"} <= set(names), names
from first.kernels.config import _occupancy
assert sys.modules["triton"] and _occupancy()
"""


@pytest.fixture
def package(tmp_path):
    return build_hub.write(tmp_path / "hub")


def test_no_module_imports_by_the_packages_own_name(package):
    for path in package.rglob("*.py"):
        text = path.read_text()
        compile(text, path, "exec")
        assert not re.search(r"^\s*(from|import) moebert_kernels", text, re.MULTILINE), path
        assert not re.search(r"moebert_kernels::|ops\.moebert_kernels|[\"']moebert_kernels\.", text), path


def test_the_project_has_what_kernel_builder_reads(package):
    project = package.parents[1]
    assert {path.name for path in project.iterdir()} == {"build.toml", "CARD.md", "LICENSE", "torch-ext"}
    assert (package / "kernels/occupancy.json").exists()
    assert not (package / "_C.json").exists()


@pytest.mark.slow
def test_two_versions_run_in_one_process_without_this_package(package, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(package, tmp_path / "path" / name)
        (tmp_path / "path" / name / "_ops.py").write_text(OPS.format(name=name))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MOEBERT", "TRITON_INTERPRET"))}
    env["PYTHONPATH"] = str(tmp_path / "path")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
