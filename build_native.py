"""The build backend: setuptools, and `moebert_kernels/_C` by CMake. It imports no torch.

    MOEBERT_KERNELS_BUILD_CUDA=0           do not build (default: no op uses the CUDA kernels unless it is asked to)
    MOEBERT_KERNELS_BUILD_CUDA=1           build; a build that fails is an error
    MOEBERT_KERNELS_BUILD_CUDA=auto        build where there are nvcc and an NVIDIA GPU; a build that fails is one line,
                                           which `moebert doctor` repeats
    MOEBERT_KERNELS_CUDA_ARCHS="80;90a"    machine code for these GPUs; PTX of the first serves the others
    MOEBERT_KERNELS_CUDA_ARCHS=native      for the GPUs of this machine
    MOEBERT_KERNELS_CUTLASS=folder         with CUTLASS's headers, cutlass/ and cute/

pip calls this module as pyproject.toml says; setup.py gives `COMMANDS` and `NativeDistribution` to setuptools.
`python setup.py build_native --inplace` builds into this tree, without pip and without a network.
`_C.json` lies next to the module and records what is in it, or why there is none. A wheel that holds the module is for
this Python and platform; one without it is `py3-none-any`, also where a build was tried and failed.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from setuptools import Command, Distribution, build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent
BUILD_CUDA, CUDA_ARCHS = "MOEBERT_KERNELS_BUILD_CUDA", "MOEBERT_KERNELS_CUDA_ARCHS"
CUTLASS_HEADERS = "MOEBERT_KERNELS_CUTLASS"
OLDEST_CMAKE = (3, 22)
CUTLASS = "nvidia-cutlass~=4.2.0"  # its headers change from release to release; these are the ones compiled here
CUTLASS_INCLUDE = "cutlass_library/source/include"
IMPORT_CHECK = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("moebert_kernels._C", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


class NotBuilt(Exception):
    """Why there is no module, in one line."""


def mode() -> str:
    value = os.environ.get(BUILD_CUDA, "0")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{BUILD_CUDA}: expected auto, 0 or 1, got {value!r}")
    return value


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME if that is set, else the one on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=Path(home, "bin")) if home else shutil.which("nvcc")


def compute_capabilities() -> list[tuple[int, int]]:
    """Those of this machine's NVIDIA GPUs, sorted; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", printed, re.MULTILINE)})


def why_not_tried() -> str | None:
    """Why no build of the module is tried; None: it is. Without a GPU nothing could run what takes minutes to build."""
    if BUILD_CUDA not in os.environ:
        return f"no op uses them unless it is asked to; {BUILD_CUDA}=1 builds them"
    if mode() == "0":
        return f"{BUILD_CUDA} was 0 when this package was built"
    if mode() == "auto" and not sys.platform.startswith("linux"):
        return f"the CUDA kernels are built on Linux alone, and this is {sys.platform}"
    if mode() == "auto" and find_nvcc() is None:
        return "nvcc was not found, neither under CUDA_HOME nor on PATH"
    if mode() == "auto" and not compute_capabilities():
        return f"this machine has nvcc and no NVIDIA GPU; {BUILD_CUDA}=1 builds all the same"
    return None


def build_tools() -> list[str]:
    """What the build environment needs besides setuptools; pip fetches headers without their package's needs."""
    if why_not_tried():
        return []
    tools = ["pybind11>=3", "pip"]
    try:
        printed = subprocess.run(["cmake", "--version"], capture_output=True, text=True, check=True).stdout
        found = tuple(map(int, re.search(r"(\d+)\.(\d+)", printed).groups()))
    except (OSError, subprocess.CalledProcessError):
        found = (0, 0)
    if found < OLDEST_CMAKE:
        tools.append("cmake>={}.{}".format(*OLDEST_CMAKE))
    if shutil.which("ninja") is None:
        tools.append("ninja")
    return tools


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + build_tools()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + build_tools()


def run(*words: str | Path, log: list[str]) -> None:
    """Run a program, passing its output on and keeping it."""
    log.append("+ " + " ".join(map(str, words)))
    try:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise NotBuilt(f"{words[0]} does not run: {error.strerror}") from None
    for line in process.stdout:
        print(line, end="", flush=True)
        log.append(line.rstrip())
    if process.wait() != 0:
        raise NotBuilt(f"the build failed: {first_error(log)}")


def first_error(log: list[str]) -> str:
    """The first line of a log that names an error; of one by CMake, the text under its heading."""
    for index, line in enumerate(log):
        if line.startswith("CMake Error at"):
            return " ".join(line.strip() for line in itertools.takewhile(str.strip, log[index + 1 :]))
        if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE):
            return line.strip()
    return log[-1]


def cutlass_include() -> Path | None:
    """The given headers, else those of an installed nvidia-cutlass, else of its wheel, fetched alone; None: without."""
    if given := os.environ.get(CUTLASS_HEADERS):
        if not Path(given, "cutlass", "cutlass.h").is_file():
            raise NotBuilt(f"{CUTLASS_HEADERS}: expected a folder with cutlass/cutlass.h, got {given}")
        return Path(given).resolve()
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.submodule_search_locations:
        include = Path(spec.submodule_search_locations[0], "source/include")
        if include.is_dir():
            return include
    folder = ROOT / "build" / re.sub(r"\W+", "-", CUTLASS)
    if not (folder / CUTLASS_INCLUDE).is_dir():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
            fetched = subprocess.run([*command, "--dest", download, CUTLASS], stdout=subprocess.PIPE, text=True)
            wheels = list(Path(download).glob("*.whl"))
            if fetched.returncode != 0 or not wheels:
                return None
            shutil.rmtree(folder, ignore_errors=True)
            partial = Path(download, "unpacked")
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extractall(partial, [name for name in wheel.namelist() if name.startswith(CUTLASS_INCLUDE)])
            folder.parent.mkdir(exist_ok=True)
            shutil.move(partial, folder)  # last, so that an interrupted download is done again
    return folder / CUTLASS_INCLUDE


def cuda_archs() -> str:
    """What CMake gets as MBK_CUDA_ARCHS, such as 80;90a; empty: its own default.

    torch's spelling ("8.0 9.0+PTX"), sm_90 and commas are understood. From 90 on an arch gets the letter a: the kernels
    use instructions that only that GPU has.
    """
    chosen = os.environ.get(CUDA_ARCHS, "")
    if chosen == "native":
        found = [f"{major}{minor}" for major, minor in compute_capabilities()]
        if not found:
            raise NotBuilt(f"{CUDA_ARCHS}=native: nvidia-smi names no GPU; give numbers such as 80;90a")
    else:
        found = [word for word in re.split(r"[;,\s]+", chosen) if word]
    archs = []
    for word in found:
        match = re.fullmatch(r"(?:sm_|compute_)?(\d{1,2})\.?(\d)([af]?)(?:\+PTX)?", word)
        if match is None:
            raise NotBuilt(f"{CUDA_ARCHS}: expected numbers such as 80;90a or native, got {word!r} in {chosen!r}")
        major, minor, letter = match.groups()
        archs.append(f"{major}{minor}{letter or ('a' if int(major) >= 9 else '')}")
    return ";".join(dict.fromkeys(archs))


def configure_and_build(work: Path, log: list[str]) -> Path:
    """Compile what changed since the last time; the path of the module."""
    if not sys.platform.startswith("linux"):
        raise NotBuilt(f"the CUDA kernels are built on Linux alone, and this is {sys.platform}")
    nvcc = find_nvcc()
    if nvcc is None:
        raise NotBuilt("nvcc was not found, neither under CUDA_HOME nor on PATH")
    if importlib.util.find_spec("pybind11") is None:
        raise NotBuilt("pybind11 is not installed in the build environment")
    import pybind11

    wants_cutlass = re.search(r"^\s*mbk_op\([^)]*\bCUTLASS\b", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
    run(
        "cmake", "-S", ROOT, "-B", work, "-G", "Ninja", "-DMBK_KERNELS=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DMBK_CUDA_ARCHS={cuda_archs()}",
        f"-DMBK_CUTLASS_INCLUDE={(wants_cutlass and cutlass_include()) or ''}", log=log,
    )  # fmt: skip
    shutil.copy(work / "compile_commands.json", ROOT / "build")
    run("cmake", "--build", work, "--parallel", jobs, log=log)
    slow = [line for line in log if re.search(r"\(C75\d\d\)", line)]  # such as wgmma that ptxas serialises
    if slow:
        raise NotBuilt(f"the build failed: {slow[0]}")
    (module,) = work.glob("_C.*.so")
    run(sys.executable, "-c", IMPORT_CHECK, module, log=log)  # the linker lets a missing function pass
    return module


class BuildNative(Command):
    """Sub-command of `build` that makes `_C` and `_C.json`; in the source tree for an editable installation."""

    description = "build moebert_kernels._C where nvcc is found"
    user_options = [("inplace", "i", "into the source tree")]  # noqa: RUF012  setuptools' own form
    boolean_options = ["inplace"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.editable_mode = False
        self.inplace = False
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        in_tree = self.editable_mode or self.inplace
        target = (ROOT if in_tree else Path(self.build_lib)) / "moebert_kernels"
        target.mkdir(parents=True, exist_ok=True)
        for stale in (*target.glob("_C.*.so"), *target.glob("_C.json")):
            stale.unlink()
        work, log = ROOT / "build" / f"native-{sys.implementation.cache_tag}", []
        try:
            if reason := why_not_tried():
                raise NotBuilt(reason)
            module = configure_and_build(work, log)
        except NotBuilt as reason:
            if mode() == "1":
                raise SystemExit(f"{BUILD_CUDA}=1: {reason}") from None
            record = {"built": False, "reason": str(reason)}
            print(f"moebert_kernels: no CUDA kernels: {reason}; Triton and torch run everything", flush=True)
            (target / "_C.json").write_text(json.dumps(record, indent=1) + "\n")
            self.distribution.has_module = False
        else:
            self.distribution.has_module = True
            shutil.copy(module, target)
            shutil.copy(work / "_C.json", target)
        if log:
            (work / "build.log").write_text("\n".join(log) + "\n")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in has them


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


class BuildWheel(bdist_wheel):
    def run(self) -> None:
        """Build before the wheel gets its name: a build that failed leaves a wheel for every Python and platform."""
        if not self.skip_build:
            self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


class NativeDistribution(Distribution):
    has_module: bool | None = None  # None until `build_native` has run

    def has_ext_modules(self) -> bool:
        """Gives the wheel its platform; no Extension is declared, CMake knows the sources."""
        return why_not_tried() is None if self.has_module is None else self.has_module


COMMANDS = {"build": Build, "build_native": BuildNative, "bdist_wheel": BuildWheel}
