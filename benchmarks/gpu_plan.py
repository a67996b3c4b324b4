"""What `make gpu` does, most valuable first, with estimates in seconds; and the times of ops that a model predicts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

# Packages and tools: what a step cannot do without, and what changes what it measures.
TRITON, MODELS, TESTS = ("torch", "triton"), ("torch", "triton", "transformers", "accelerate"), ("torch", "pytest")
PEERS = ("scattermoe", "megablocks", "sonicmoe", "liger_kernel")
BUILD_TOOLS, NATIVE, SANITIZER = ("setuptools", "pybind11", "cmake", "ninja", "nvcc"), "_C", "compute-sanitizer"
CUTLASS = "cutlass_library"  # from nvidia-cutlass: headers without which an op is left out of the build
DESCRIPTORS, CUDA_FORMS = "MOEBERT_KERNELS_DESCRIPTORS", "MOEBERT_KERNELS_BENCH_CUDA"  # 0 leaves these kernels out
AT_ONCE = 6  # commands at the same time, of 16 cores
PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib -ra", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Step:
    """One piece of work, done once.

    Attributes:
        name: "part/what"; unique.
        seconds: on an H100 with 16 cores, by estimate; of a command, beside others like it.
        task: for the worker, one process that all such steps share: a function of `gpu_worker.TASKS` and its arguments.
        command: otherwise, a process of its own.
        rehearsal: the command where there is no GPU.
        needs: without these it is skipped.
        uses: it is done again when one of these has come, gone or changed.
        after_build: it waits for the end of the build, good or bad.
        guards: an environment variable that is 0 for the steps behind it where it fails: what it tried is left out.
    """

    name: str
    seconds: float
    task: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()
    needs: tuple[str, ...] = TRITON
    uses: tuple[str, ...] = ()
    after_build: bool = False
    guards: str = ""


BUILD = Step("build", 100, command=(PYTHON, "setup.py", "build_native", "--inplace"),
             rehearsal=(PYTHON, "setup.py", "--version"), needs=BUILD_TOOLS, uses=(CUTLASS,))  # fmt: skip

F, FB, FFN, EXPERT = "forward", "forward_backward", "fused_moe_ffn", "fused_moe_ffn_add_norm"
CHECKED = {"triton": 30, "tiles": 15, "cuda": 10}  # kernels of the tiles are those of the headline
# Suite, case, seconds. Compiled dense layers take 10 s each at 16,384 tokens, a compiled encoder 20 s.
HEADLINE = [
    ("ffn", f"{FFN}-{F}-T16384", 16), ("ffn", f"{FFN}-{F}-T4096", 5), ("ffn", f"{FFN}-{F}-T65536", 7),
    ("ffn_backward", f"{FFN}-{FB}-T16384", 15), ("ffn_backward", f"{FFN}-{FB}-T4096", 6),
    ("ffn_backward", f"{FFN}-{FB}-T65536", 9),
    *(("ffn", f"{FFN}-{F}-T{T}", 5) for T in (256, 1024, 128)),
    *(("ffn_backward", f"{FFN}-{FB}-T{T}", 5) for T in (256, 1024, 128)),
]  # fmt: skip
WITH_NATIVE = [
    ("ffn_add_norm", f"{EXPERT}-{F}-T16384", 15), ("tiny", f"{EXPERT}-{F}-T1", 6), ("tiny", f"{EXPERT}-{F}-T128", 5),
    ("routing", "routing-T16384", 4), ("routing", "routing-T128", 4),
    ("ffn_add_norm", f"{EXPERT}-{FB}-T16384", 16),
    *(("ffn", f"{FFN}-{F}-T{T}-cuda", 4) for T in (16384, 4096, 65536)),
    *(("ffn_add_norm", f"{EXPERT}-{F}-T{T}", 5) for T in (4096, 65536, 1024, 256)),
    *(("ffn_add_norm", f"{EXPERT}-{FB}-T{T}", 6) for T in (4096, 65536, 1024)),
    *(("ffn_add_norm", f"add_norm_in_order-{F}-T{T}", 3) for T in (16384, 4096, 65536, 1024)),
    *(("ffn_add_norm", f"add_norm_in_order-{FB}-T{T}", 3) for T in (16384, 4096)),
    *(("tiny", f"{EXPERT}-{F}-T{T}", 5) for T in (8, 32)),
    ("routing", "routing-T4096", 3),
    *(("expert_gemm", f"expert_gemm-T{T}", 4) for T in (16384, 65536, 4096, 256)),
    ("expert_gemm", "expert_gemm-T32768-E8-K768-N2048", 4),
]  # fmt: skip
ANCHORS = [
    *(("ffn", f"{FFN}-{F}-T{T}-E8-H1024", 5) for T in (16384, 4096)),
    ("ffn", f"{FFN}-{F}-T4096-E128-top4-H640", 6),
]  # fmt: skip
WITH_PEERS = [
    ("peers", f"peers-{kind}-{direction}-T{T}", 4)
    for T in (16384, 4096) for direction in (F, FB) for kind in ("gelu-biases", "gelu", "swiglu")
]  # fmt: skip
WHOLE_MODELS = [
    ("encoder", "encoder-bert-base-B32-T128", 65), ("distill", "distill-bert-base-B32-T128", 15),
    ("encoder", "encoder-bert-base-B128-T128-in_order", 8),
    ("encoder", "encoder-bert-base-B1-T128", 9), ("encoder", "encoder-bert-base-B32-40_of_128", 8),
    ("encoder", "encoder-bert-base-B32-padded", 9), ("encoder", "encoder-bert-base-B32-sorted_by_length", 9),
    ("distill", "distill-bert-base-B32-padded", 10),
]  # fmt: skip
SHARED_CENTRE = [
    ("mpo", "mpo_expert_weights-forward", 4), ("mpo", "mpo_experts-forward_backward-T32768", 6),
    ("mpo", "mpo_expert_weights-forward_backward", 3), ("mpo", "mpo_experts-shared_fold-4xT4096", 5),
]  # fmt: skip
# Files of tests; each is compiled and run by a process of its own. Plain torch has no kernels of ours: CI runs it.
OTHER_TESTS = """ops/test_expert_gemm ops/test_group_tokens ops/test_hash_route+ops/test_integers+ops/test_checked_once
ops/test_mpo_expert_weights+ops/test_add_norm_in_order ops/test_any_shape ops/test_autocast+ops/test_derivatives
kernels/test_cuda_gpu kernels/test_tiny_ffn+kernels/test_expert_gemm_cuda
kernels/test_dropout+ops/test_hostile_arguments+test_native"""
TESTED = {"ops/test_fused_moe_ffn": 90, "ops/test_fused_moe_ffn_add_norm": 80, "kernels/test_gpu": 60}
TESTED |= dict.fromkeys(OTHER_TESTS.split(), 35)


def steps() -> list[Step]:
    """All of them but the build, which goes on beside them from the start."""
    return list(_steps())


def _steps() -> Iterator[Step]:
    yield Step("check/triton", CHECKED["triton"], ("check", "triton"))
    yield Step("check/tiles", CHECKED["tiles"], ("check", "tiles"), guards=DESCRIPTORS)
    for what, case, seconds in HEADLINE:
        yield Step(f"{what}/{case}", seconds, ("suite", what, case))
    cuda = {"needs": (*TRITON, NATIVE), "uses": (NATIVE,), "after_build": True}
    yield Step("check/cuda", CHECKED["cuda"], ("check", "cuda"), guards=CUDA_FORMS, **cuda)
    for what, case, seconds in WITH_NATIVE:
        more = cuda if case.endswith("-cuda") else cuda | {"needs": TRITON}
        yield Step(f"{what}/{case}", seconds, ("suite", what, case), **more)
    for what, case, seconds in ANCHORS:
        yield Step(f"{what}/{case}", seconds, ("suite", what, case))
    for what, case, seconds in WITH_PEERS:
        yield Step(f"{what}/{case}", seconds, ("suite", what, case), needs=MODELS, uses=PEERS)
    for what, case, seconds in WHOLE_MODELS:
        yield Step(f"{what}/{case}", seconds, ("suite", what, case), needs=MODELS)
    for what, case, seconds in SHARED_CENTRE:
        yield Step(f"{what}/{case}", seconds, ("suite", what, case))
    for kind in ("half-rows", "half-weights"):
        yield Step(f"tune/{kind}", 8, ("tune", kind))
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        words = (SANITIZER, "--tool", tool, "--error-exitcode", "9", PYTHON, "-m", "moebert_kernels.doctor")
        yield Step(f"sanitize/{tool}", 120, command=words, rehearsal=(PYTHON, "-c", "import benchmarks"),
                   **cuda | {"needs": (*TRITON, SANITIZER)})  # fmt: skip
    for name, seconds in TESTED.items():
        words = (*PYTEST, *(f"tests/{file}.py" for file in name.split("+")), "-k", "not torch-")
        yield Step(f"test/{name}", seconds, command=words, rehearsal=(*words, "--collect-only"), uses=(NATIVE,),
                   needs=(*TESTS, "hypothesis") if "any_shape" in name else TESTS, after_build=True)  # fmt: skip


def cases_of(what: str) -> list[str]:
    """Of one suite, in order."""
    return [step.task[2] for step in steps() if step.task[:2] == ("suite", what)]


def estimate() -> dict[str, float]:
    """Seconds by part, of both calls together: commands go several at a time, and the build beside the others."""
    parts = {"start of both calls: look around, unpack wheels, import torch": 40.0}
    for step in steps():
        part = step.name.partition("/")[0]
        parts[part] = parts.get(part, 0.0) + step.seconds / (AT_ONCE if step.command else 1)
    return parts


# Microseconds in bfloat16, E = 4, H = I = 768: those of benchmarks/README.md, which a test compares.
PREDICTED_BY = "model of 2026-11-29"
PREDICTED_US: dict[tuple[str, str], dict[int, float]] = {
    (FFN, F): {128: 6, 256: 7, 1024: 13, 4096: 27, 16384: 78, 65536: 310},
    (EXPERT, F): {128: 7, 256: 8, 1024: 15, 4096: 34, 16384: 104, 65536: 412},
    (FFN, FB): {128: 30, 256: 34, 1024: 50, 4096: 95, 16384: 260, 65536: 946},
}
