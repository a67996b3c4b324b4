"""Registers, shared memory, stack and local memory of every CUDA kernel, read from the machine code in `_C`.

    python -m benchmarks.cuda_resources            # writes results/cuda-resources.json
    python -m benchmarks.cuda_resources --check    # compares with that file instead

A module of any architectures is compared with its part of the table, and the sources with those that the table is of.
A spill is an instruction that loads from local memory or stores to it; spilled registers live in the stack frame, too.
`shared` is what a kernel declares, `dynamic_shared` the most that a launch adds: what the launchers say.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import build_native
from benchmarks.sources import ROOT, digest
from moebert_kernels import native

TABLE = Path(__file__).parent / "results" / "cuda-resources.json"
CODE = (".cu", ".cuh", ".h", ".cpp")
NEEDS_WGMMA = "expert_gemm"  # in the names of the kernels whose sm_90a code must hold HGMMA


def tool(name: str) -> str:
    """A program of the CUDA toolkit, else the copy that Triton ships."""
    found = shutil.which(name)
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)
    return found


def printed(*words: str | Path, **options: Any) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, **options).stdout


def by_function(text: str, line: str) -> dict[tuple[str, str], str]:
    """(arch, mangled name) -> what cuobjdump prints after the `line` that names a function."""
    parts = re.split(rf"^arch = (sm_\w+)$|^\s*{line}\s*:?\s*(\S+?):?$", text, flags=re.MULTILINE)
    found, arch = {}, ""
    for i in range(1, len(parts), 3):
        if parts[i]:
            arch = parts[i]
        else:
            found[arch, parts[i + 1]] = parts[i + 2]
    return found


def imported(module: Path) -> ModuleType:
    """The built module, also one that lies in another tree."""
    spec = importlib.util.spec_from_file_location(native.NAME, module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def table(module: Path) -> dict[str, dict[str, Any]]:
    """sm_<arch>/<kernel> -> resources, for all machine code in the module."""
    usage = by_function(printed(tool("cuobjdump"), "-res-usage", module), "Function")
    code = by_function(printed(tool("cuobjdump"), "-sass", module), "Function")
    names = printed("c++filt", input="\n".join(name for _, name in usage)).splitlines()
    added, rows = imported(module).most_shared_bytes, {}
    for (arch, mangled), name in zip(usage, names, strict=True):
        numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage[arch, mangled])}
        short = re.sub(r"mbk::|\(anonymous namespace\)::|^void |\(mbk::DType\)|\((?:int|bool)\)", "", name)
        short = re.sub(r"[(](?:[^()]|[(][^()]*[)])*[)]$", "", short)
        bare = short.rpartition("tiny::")[2]
        rows[f"{arch}/{short}"] = {
            "registers": numbers["REG"],
            "shared": numbers["SHARED"],
            "dynamic_shared": next((most for name, most in added.items() if re.fullmatch(name, bare)), 0),
            "stack": numbers["STACK"],
            "local": numbers["LOCAL"],
            "spill_loads": len(re.findall(r"\bLDL\b", code[arch, mangled])),
            "spill_stores": len(re.findall(r"\bSTL\b", code[arch, mangled])),
            "wgmma": "HGMMA" in code[arch, mangled],
        }
    if len(rows) != len(usage):
        raise ValueError(f"expected {len(usage)} different names, got {len(rows)}")
    return dict(sorted(rows.items()))


def complaints(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    spilling = ("stack", "local", "spill_loads", "spill_stores")
    wrong = [f"{name}: {', '.join(f'{column} {row[column]}' for column in spilling)}" for name, row in rows.items()
             if any(row[column] for column in spilling)]  # fmt: skip
    gemms = {name: row for name, row in rows.items() if name.startswith("sm_90a/") and NEEDS_WGMMA in name}
    return wrong + [f"{name}: no HGMMA" for name, row in gemms.items() if not row["wgmma"]]


def compiled_from() -> str:
    """What a table is of, see `benchmarks.sources`."""
    code = [path for name in ("csrc", "python") for path in (ROOT / name).iterdir() if path.suffix in CODE]
    flags = (ROOT / "CMakeLists.txt").read_text().partition("if(MBK_HOST_TESTS)")[0]
    return digest([*code, ROOT / "cmake/kernels.cmake"], flags, build_native.CUTLASS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_resources", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed table; write nothing")
    parser.add_argument("--package", type=Path, default=native.FOLDER, help="folder of a built moebert_kernels")
    options = parser.parse_args()
    record = native.record(options.package)
    if not record["built"]:
        parser.error(f"expected {native.NAME}, got none: {record['reason']}")
    (module,) = options.package.glob("_C.*.so")
    rows = table(module)
    nvcc = record["compilers"].partition(",")[0]
    wrong = complaints(rows)
    if not options.check:
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        TABLE.write_text(
            f'{{"compiler": "{nvcc}", "compiled_from": "{compiled_from()}", "resources": {{\n{lines}\n}}}}\n'
        )
    else:
        committed = json.loads(TABLE.read_text())
        if committed["compiled_from"] != compiled_from():
            wrong.append(f"{TABLE.name}: is of other sources; write it anew (make cuda-resources)")
        archs = set(record["archs"])
        expected = {name: row for name, row in committed["resources"].items() if name.partition("/")[0] in archs}
        if committed["compiler"] == nvcc:
            names = rows.keys() if record["left_out"] else expected.keys() | rows.keys()
            wrong += [
                f"{name}: the table has {expected.get(name)}, got {rows.get(name)}"
                for name in sorted(names)
                if expected.get(name) != rows.get(name)
            ]
    for line in wrong:
        print(line)
    print(f"{len(rows)} kernels compiled by {nvcc}, {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
