"""Installations and wheels of a source distribution in fresh environments: with and without nvcc, or broken."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import moebert_kernels
from tests.helpers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
WITHOUT_PACKAGE = "import sys, importlib.util as u; s = u.spec_from_file_location('moebert_kernels._C', sys.argv[1])"
IMPORT = f"{WITHOUT_PACKAGE}; m = u.module_from_spec(s); s.loader.exec_module(m); print(repr(m.device_error(0)))"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc of the CUDA toolkit on PATH")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source distribution of what a clone would hold: it must have all that the build needs."""
    clone = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    build = "import build_native; print(build_native.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True, check=True)
    return clone / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture
def tree(archive, tmp_path):
    """The unpacked source distribution."""
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path / archive.name.removesuffix(".tar.gz")


@pytest.fixture
def python(tmp_path):
    """The interpreter of an empty environment, into which this one's pip installs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    return tmp_path / "venv/bin/python"


def pip(*words, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MOEBERT_KERNELS_")}
    command = [sys.executable, "-m", "pip", *words]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def install(python, tree, **environment):
    return pip("--python", python, "install", "-v", "--no-deps", "-e", tree, **environment)


def wheel(tree, **environment):
    """The path of the wheel that pip builds in an isolated environment."""
    status, output = pip("wheel", "--no-deps", "--wheel-dir", tree / "dist", tree, **environment)
    assert status == 0, output
    (built,) = (tree / "dist").glob("*.whl")
    return built


def record(tree):
    return json.loads((tree / "moebert_kernels/_C.json").read_text())


def path_without_nvcc():
    return os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())


def reasons(output):
    return [line for line in output.splitlines() if "no CUDA kernels" in line]


@needs_nvcc
def test_with_nvcc(python, tree):
    """It imports, links neither Torch nor the driver, and its machine code is that of the committed table.

    Of the architecture that takes seconds: that the table is of these sources says the same of the others, which take
    minutes (`make cuda-resources`).
    """
    environment = {"MOEBERT_KERNELS_CUDA_ARCHS": "80", "MOEBERT_KERNELS_WERROR": "1"}
    status, output = install(python, tree, MOEBERT_KERNELS_BUILD_CUDA="1", **environment)
    assert status == 0, output[-3000:]
    assert record(tree)["archs"] == ["sm_80"]
    assert record(tree)["ptx"] == "compute_80"
    assert record(tree)["left_out"].keys() == {"expert_gemm", "expert_gemm_norm"}  # of another architecture
    (module,) = (tree / "moebert_kernels").glob("_C.*.so")
    done = subprocess.run([python, "-c", IMPORT, module], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    linked = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in linked
    assert "torch" not in linked
    pytest.importorskip("triton")  # ships cuobjdump
    command = [sys.executable, "-m", "benchmarks.cuda_resources", "--check", "--package", tree / "moebert_kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_without_nvcc(python, tree):
    environment = {"PATH": path_without_nvcc(), "CUDA_HOME": "", "CUDA_PATH": ""}
    status, output = install(python, tree, MOEBERT_KERNELS_BUILD_CUDA="auto", **environment)
    assert status == 0, output[-3000:]
    assert not list((tree / "moebert_kernels").glob("_C.*.so"))
    assert len(reasons(output)) == 1
    assert "nvcc was not found, neither under CUDA_HOME nor on PATH" in reasons(output)[0]
    assert record(tree)["reason"] in reasons(output)[0]
    status, output = install(python, tree, MOEBERT_KERNELS_BUILD_CUDA="1", **environment)
    assert status != 0
    assert "MOEBERT_KERNELS_BUILD_CUDA=1: nvcc was not found" in output


@needs_nvcc
def test_broken_source(python, tree, tmp_path):
    with (tree / "csrc/device_error.cu").open("a") as source:
        source.write('#error "broken on purpose"\n')
    environment = {"MOEBERT_KERNELS_CUDA_ARCHS": "80", "CMAKE_BUILD_PARALLEL_LEVEL": "1"}
    status, output = install(python, tree, MOEBERT_KERNELS_BUILD_CUDA="1", **environment)
    assert status != 0
    assert "MOEBERT_KERNELS_BUILD_CUDA=1: the build failed" in output
    gpu = tmp_path / "bin/nvidia-smi"  # with a GPU, auto builds too
    gpu.parent.mkdir()
    gpu.write_text("#!/bin/sh\necho 9.0\n")
    gpu.chmod(0o755)
    environment["PATH"] = f"{gpu.parent}{os.pathsep}{os.environ['PATH']}"
    status, output = install(python, tree, MOEBERT_KERNELS_BUILD_CUDA="auto", **environment)
    assert status == 0, output[-3000:]
    assert len(reasons(output)) == 1
    assert "broken on purpose" in reasons(output)[0]
    assert "broken on purpose" in record(tree)["reason"]


def test_wrong_mode_and_no_build(python, tree):
    status, output = install(python, tree, MOEBERT_KERNELS_BUILD_CUDA="yes")
    assert status != 0
    assert "MOEBERT_KERNELS_BUILD_CUDA: expected auto, 0 or 1, got 'yes'" in output
    status, output = install(python, tree, MOEBERT_KERNELS_BUILD_CUDA="0")
    assert status == 0, output[-3000:]
    assert record(tree) == {
        "built": False, "reason": "MOEBERT_KERNELS_BUILD_CUDA was 0 when this package was built",
    }  # fmt: skip


def test_a_wheel_without_the_module_is_for_every_python_and_platform(python, tree, tmp_path):
    built = wheel(tree, MOEBERT_KERNELS_BUILD_CUDA="0")
    assert built.name == f"moebert_kernels-{moebert_kernels.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(built).namelist())
    packed = {str(path.relative_to(tree)) for path in (tree / "moebert_kernels").rglob("*") if path.is_file()}
    assert packed | {"moebert_kernels/_C.json"} <= names
    assert {"moebert_kernels/py.typed", "moebert_kernels/kernels/occupancy.json"} <= packed
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "build_"))]
    status, output = pip("--python", python, "install", "--no-deps", built)
    assert status == 0, output
    (site,) = (tmp_path / "venv/lib").glob("python3.*/site-packages")
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib"))  # torch and the others, without a download
    code = "import moebert_kernels, torch; print(moebert_kernels.__file__)"
    where = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(where.strip()).is_relative_to(site)
    command = [python.parent / "moebert", "--version"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert said == f"moebert_kernels {moebert_kernels.__version__}\n"


@needs_nvcc
def test_a_wheel_with_the_module_is_for_this_python_and_platform(tree):
    cmake = tree / "CMakeLists.txt"  # one small kernel: all of them take minutes
    lines = re.sub(r"\n  mbk_op\((?!device_error)[^)]*\)", "", cmake.read_text())
    cmake.write_text(lines)
    built = wheel(tree, MOEBERT_KERNELS_BUILD_CUDA="1", MOEBERT_KERNELS_CUDA_ARCHS="80")
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_")
    assert built.name == f"moebert_kernels-{moebert_kernels.__version__}-{version}-{version}-{platform}.whl"
    assert [name for name in zipfile.ZipFile(built).namelist() if name.startswith("moebert_kernels/_C.")]
