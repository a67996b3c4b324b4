"""The build backend's decisions: whether to build, for which GPUs, and what a failure says. Nothing is compiled."""

import shutil
import subprocess
import sys

import pytest

import build_native
from tests.helpers import ROOT


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """PATH holds only the programs that a test writes: name, and what it prints."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", build_native.BUILD_CUDA, build_native.CUDA_ARCHS):
        monkeypatch.delenv(name, raising=False)

    def write(name, prints=""):
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '{prints}'\n")
        (tmp_path / name).chmod(0o755)

    return write


def test_nothing_is_built_that_nothing_uses(programs):
    programs("nvcc")
    programs("nvidia-smi", "9.0\\n")
    assert build_native.why_not_tried() == (
        "no op uses them unless it is asked to; MOEBERT_KERNELS_BUILD_CUDA=1 builds them"
    )
    assert build_native.build_tools() == []


def test_auto_builds_where_there_are_nvcc_and_a_gpu(programs, monkeypatch):
    monkeypatch.setenv(build_native.BUILD_CUDA, "auto")
    assert build_native.why_not_tried() == "nvcc was not found, neither under CUDA_HOME nor on PATH"
    assert build_native.build_tools() == []
    programs("nvcc")
    assert "nvcc and no NVIDIA GPU; MOEBERT_KERNELS_BUILD_CUDA=1 builds all the same" in build_native.why_not_tried()
    programs("nvidia-smi", "No devices were found\\n")
    assert "no NVIDIA GPU" in build_native.why_not_tried()
    programs("nvidia-smi", "9.0\\n9.0\\n8.6\\n")
    assert build_native.why_not_tried() is None
    assert "pybind11>=3" in build_native.build_tools()


def test_the_mode_decides_before_the_machine(programs, monkeypatch):
    monkeypatch.setenv(build_native.BUILD_CUDA, "1")
    assert build_native.why_not_tried() is None
    programs("nvcc")
    programs("nvidia-smi", "9.0\\n")
    monkeypatch.setenv(build_native.BUILD_CUDA, "0")
    assert build_native.why_not_tried() == "MOEBERT_KERNELS_BUILD_CUDA was 0 when this package was built"
    monkeypatch.setenv(build_native.BUILD_CUDA, "yes")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1, got 'yes'"):
        build_native.why_not_tried()


@pytest.mark.parametrize(
    ("given", "archs"),
    [
        ("", ""),
        ("80;90a", "80;90a"),
        ("80,90a", "80;90a"),
        ("8.0;9.0", "80;90a"),
        ("8.0 8.6 9.0+PTX", "80;86;90a"),
        ("sm_90", "90a"),
        ("compute_80", "80"),
        ("100f", "100f"),
        ("12.0", "120a"),
        ("90;90a", "90a"),
        ("native", "80;90a"),
    ],
)
def test_architectures_in_every_usual_spelling(programs, monkeypatch, given, archs):
    programs("nvidia-smi", "9.0\\n8.0\\n9.0\\n")
    monkeypatch.setenv(build_native.CUDA_ARCHS, given)
    assert build_native.cuda_archs() == archs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hopper", "expected numbers such as 80;90a or native, got 'hopper' in 'hopper'"),
        ("80;9", "got '9' in '80;9'"),
        ("90b", "got '90b' in '90b'"),
        ("native", "nvidia-smi names no GPU; give numbers such as 80;90a"),
    ],
)
def test_architectures_that_are_none(programs, monkeypatch, given, message):
    monkeypatch.setenv(build_native.CUDA_ARCHS, given)
    with pytest.raises(build_native.NotBuilt, match=message):
        build_native.cuda_archs()


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (["-- ok", "x.cu(3): error: no such name", "2 errors detected"], "x.cu(3): error: no such name"),
        (
            [
                "CMake Error at cmake/kernels.cmake:22 (message):",
                "  MBK_CUDA_ARCHS: expected numbers,",
                "  got x",
                "",
                "-- y",
            ],
            "MBK_CUDA_ARCHS: expected numbers, got x",
        ),
        (["ninja: stopped"], "ninja: stopped"),
    ],
)
def test_a_failed_build_names_its_first_error(log, line):
    assert build_native.first_error(log) == line


def test_other_platforms_than_linux_build_nothing(programs, monkeypatch, tmp_path):
    programs("nvcc")
    programs("nvidia-smi", "9.0\\n")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv(build_native.BUILD_CUDA, "auto")
    assert build_native.why_not_tried() == "the CUDA kernels are built on Linux alone, and this is win32"
    with pytest.raises(build_native.NotBuilt, match="built on Linux alone"):
        build_native.configure_and_build(tmp_path, [])


# A build in a folder that holds what setuptools reads, whose CMake is replaced.
WHEEL = """
import build_native

def configure_and_build(work, log):
    if {fails}:
        raise build_native.NotBuilt("the build failed: broken on purpose")
    work.mkdir(parents=True)
    (work / "_C.json").write_text("{{}}")
    (work / "_C.abi3.so").touch()
    return work / "_C.abi3.so"

build_native.why_not_tried = lambda: None
build_native.configure_and_build = configure_and_build
print(build_native.build_wheel("dist"))
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_wheel_is_for_one_platform_only_if_the_module_was_built(fails, tmp_path):
    for name in ("setup.py", "build_native.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "moebert_kernels").mkdir()
    shutil.copy(ROOT / "moebert_kernels/__init__.py", tmp_path / "moebert_kernels")
    command = [sys.executable, "-c", WHEEL.format(fails=fails)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = done.stdout.splitlines()[-1]
    assert name.endswith("-py3-none-any.whl") == fails
    assert fails or f"-cp{sys.version_info.major}{sys.version_info.minor}-" in name


def test_the_manifest_has_every_native_source():
    """setuptools packs the Python files; MANIFEST.in names the rest that a build reads."""
    rules = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    patterns = {folder: set(endings) for rule, folder, *endings in rules if rule == "recursive-include"}
    listed = subprocess.run(["git", "ls-files", "csrc", "python", "cmake"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        folder, _, file = name.partition("/")
        assert f"*.{file.rpartition('.')[2]}" in patterns[folder], f"{name} is not in the source distribution"
