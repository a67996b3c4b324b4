"""The host tests of the CUDA sources are themselves tested: a source broken in one place must make them fail."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from tests.helpers import ROOT

COMPILER = os.environ.get("CXX", "c++")
GEMM, NORM = "test_expert_gemm_pipeline", "test_expert_gemm_norm"
FEW_TOKENS, GROUPING = "test_tiny_ffn", "test_group_tokens"
WAIT = "      producer_acquire<Traits>(shared, slot);\n"
ARRIVED = "  hopper::wait_for_cluster(arrived, static_cast<uint32_t>(count / 2) & 1u);\n"
EMPTY = "kConsumerWarps * Traits::kGroups * Traits::kCluster);"
# what breaks: the program that must notice, the file, what stands there, what takes its place
MUTATIONS = {
    "full barrier, one arrival": (GEMM, "expert_gemm.cuh", "params.gather ? 1 + kProducerWarps : 1)", "1)"),
    "empty barrier, one arrival": (GEMM, "expert_gemm.cuh", EMPTY, "1);"),
    "proxy fence": (GEMM, "expert_gemm.cuh", "  hopper::fence_proxies();\n", ""),
    "wait for copies": (GEMM, "expert_gemm.cuh", "  hopper::wait_for_copies<kPending>();\n", ""),
    "turns of the consumers": (GEMM, "expert_gemm.cuh", "if (!is_first) hopper::sync_named(256, group);", ""),
    "groups of a shared tile": (GEMM, "expert_gemm.cuh", "kConsumerWarps * Traits::kGroups *", "kConsumerWarps *"),
    "rows of a shared tile": (GEMM, "expert_gemm.cuh", "tile.row0 += group * Traits::kGroupRows", "tile.row0 += 0"),
    "tail of the producer": (GEMM, "expert_gemm.cuh", "i < Traits::kStages; ++i, ++slot", "i < 0; ++i, ++slot"),
    "wait for the GEMM before": (GEMM, "expert_gemm.cuh", "  wait_for_previous_kernel();\n", ""),
    "wait of the producer": (GEMM, "expert_gemm.cuh", WAIT + "      load_weights", "      load_weights"),
    "wait of the gathering producer": (GEMM, "expert_gemm.cuh", WAIT + "      if (thread", "      if (thread"),
    "stage freed early": (GEMM, "expert_gemm.cuh", "    Product::template wait<1>(acc);\n", ""),
    "stage of the peer": (GEMM, "expert_gemm.cuh", "if (lane < ranks)", "if (lane < 1)"),
    "bytes expected": (GEMM, "expert_gemm.cuh", "Traits::kWeightsBytes + Traits::kRowsBytes", "Traits::kWeightsBytes"),
    "registers": (GEMM, "expert_gemm.cuh", "kBlockN == 128 ? 224 : 232", "kBlockN == 128 ? 232 : 240"),
    "wait for the parts": (NORM, "expert_gemm_norm.cuh", ARRIVED, ""),
    "parts of the same place": (NORM, "expert_gemm_norm.cuh", "&parts[hopper::rank_in_cluster()]", "&parts[to]"),
    "parts of another row": (NORM, "expert_gemm_norm.cuh", "theirs = hopper::received(&parts[from][lane])",
                             "theirs = hopper::received(&parts[from][lane ^ 1])"),
    "parts without the other's place": (NORM, "expert_gemm_norm.cuh", "shared.parts[group][count % 2]",
                                        "shared.parts[group][0]"),
    "eps": (NORM, "expert_gemm_norm.cuh", " + params.epilogue.eps", ""),
    "differences of the means": (NORM, "expert_gemm_norm.cuh", "share * (theirs.x - mean)", "0.0f * (theirs.x - mean)"),
    "rows for the cluster": (NORM, "expert_gemm_norm.cuh", "tile.row0 + rank * part);", "tile.row0);"),
    "stage of all peers": (NORM, "expert_gemm_norm.cuh", "acc, params.cluster);", "acc, 1);"),
    "wait for the rows": (NORM, "expert_gemm_norm.cuh", "  wait_for_previous_kernel();\n", ""),
    "wait for h": (FEW_TOKENS, "tiny_ffn.cuh", "    wait_for_previous_kernel();\n  };", "  };"),
    "wait without an expert": (FEW_TOKENS, "tiny_ffn.cuh", "    wait_for_previous_kernel();\n    for", "    for"),
    "sums published": (FEW_TOKENS, "tiny_ffn.cuh", "    __threadfence();  // with", "    // with"),
    "sums acquired": (FEW_TOKENS, "tiny_ffn.cuh", "    __threadfence();\n  }", "  }"),
    "ranks published": (GROUPING, "group_tokens.cuh", "      __threadfence();  // with", "      // with"),
    "ranks acquired": (GROUPING, "group_tokens.cuh", "  __threadfence();\n  __syncthreads();", "  __syncthreads();"),
}  # fmt: skip


def host_test_flags(name):
    """What CMakeLists.txt gives a host test to compile with: every program, and those that look at memory ordering."""
    lists = (ROOT / "CMakeLists.txt").read_text()
    shared = re.search(r"target_compile_options\(\$\{name\} PRIVATE ([^)]*)\)", lists)[1].split()
    ordered = re.search(rf"^  mbk_see_stores\({name}\)$", lists, re.MULTILINE)
    return shared + (["-fsanitize=thread"] if ordered else [])


def compile_and_run(name, csrc, folder):
    command = [COMPILER, "-std=c++17", "-O1", "-DMBK_EMULATION", *host_test_flags(name), f"-I{csrc}"]
    command += [f"-I{ROOT / 'tests/csrc'}", "-c", ROOT / f"tests/csrc/{name}.cpp", "-o", folder / f"{name}.o"]
    subprocess.run(command, check=True)
    subprocess.run([COMPILER, folder / f"{name}.o", "-o", folder / name], check=True)
    return subprocess.run([folder / name], capture_output=True, text=True, timeout=600)


def mutated(file, before, after):
    text = (ROOT / "csrc" / file).read_text()
    assert text.count(before) == 1, f"{file}: expected one {before!r}, got {text.count(before)}"
    return text.replace(before, after)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sources_still_have_the_place(mutation):
    _, file, before, after = MUTATIONS[mutation]
    assert mutated(file, before, after)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not on PATH")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_source_is_noticed(mutation, tmp_path):
    """By a wrong number, by the emulation, or at the page behind an array."""
    program, file, before, after = MUTATIONS[mutation]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "csrc" / file).write_text(mutated(file, before, after))
    done = compile_and_run(program, tmp_path / "csrc", tmp_path)
    assert done.returncode != 0, f"{program} passes: {done.stdout}"
    said = re.search(rf"{program}\.cpp:\d+:|_cases\.h:\d+:|emulation: ", done.stderr)
    assert said or done.returncode == -signal.SIGSEGV, done.stderr
