"""Registers, shared memory and spills of every Triton kernel in every configuration, compiled without a GPU.

    python -m benchmarks.resources            # compiles all, writes results/triton-resources.json and occupancy.json
    python -m benchmarks.resources --check    # compiles all and compares with these files instead

The launchers themselves run, on tensors that are never touched; what they would launch is compiled for each
architecture with the specialisation that Triton's own launcher would choose (divisibility by 16, ones, None).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels import (
    column_sums,
    expert_gemm,
    expert_gemm_weights,
    fused_moe_ffn,
    fused_moe_ffn_add_norm,
    fused_moe_ffn_backward,
    group_tokens,
    hash_route,
    mpo_expert_weights,
)

from moebert_kernels.kernels import config as configs  # isort: skip
from moebert_kernels.kernels import launch as launching  # isort: skip
from moebert_kernels.kernels.tiles import num_chunks, padded_experts

ARCHS = (80, 90, 100)
TABLE = Path(__file__).parent / "results" / "triton-resources.json"
OCCUPANCY = Path(configs.__file__).parent / "occupancy.json"  # what of it `pick_config` reads
KINDS: dict[str, configs.Kind] = {  # of the kernels that the table has, by the beginnings of their names
    "expert_gemm.rows": "rows", "expert_gemm.scatter": "rows", "expert_gemm.dx_add_norm": "residual",
    "expert_gemm.descriptors": "descriptors", "hidden_backward.descriptors": "backward_descriptors",
    "hidden.descriptors": "hidden_descriptors",
    "hidden.gelu": "hidden", "hidden.swiglu": "gated", "hidden_backward.gelu": "backward",
    "hidden_backward.swiglu": "gated_backward", "expert_gemm_weights": "weights",
}  # fmt: skip
T, H, I, E, LAYERS, VOCABULARY = 4096, 768, 768, 4, 12, 30522  # of BERT-base
FEW = ("expert_gemm.scatter", "hidden.gelu", "hidden_backward.gelu", "expert_gemm_weights.both", "fold")  # for float32
SECOND = ("group_tokens.place", "add_partials")  # come after another kernel
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
DTYPES: dict[configs.Precision, torch.dtype] = {
    "half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What one launch would compile."""

    name: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    def compile(self, arch: int) -> dict[str, Any]:
        """Registers, shared bytes, spilled bytes, whether the code uses wgmma, its length and asynchronous copies."""
        module = sys.modules[self.module]
        fn = getattr(module, self.kernel)
        position = {name: i for i, name in enumerate(fn.arg_names)}
        source = ASTSource(
            fn, dict(self.signature), {(position[name],): value for name, value in self.constants},
            {(position[name],): [["tt.divisibility", 16]] for name in self.divisible},
        )  # fmt: skip
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(self.options))
        cubin = compiled.asm["cubin"]
        usage = {
            k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _printed(cubin, "cuobjdump", "-res-usage"))
        }
        return {
            "registers": usage["REG"],
            "shared": compiled.metadata.shared,
            # a stack may also be that of a called function, such as an exact division
            "spilled": _spilled(compiled.asm["ptx"], arch) if usage["STACK"] + usage["LOCAL"] else 0,
            "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
            "instructions": len(re.findall(r"^\s*/\*[0-9a-f]+\*/", _printed(cubin, "nvdisasm", "-c"), re.MULTILINE)),
            # 16 bytes or a block at a time, from memory to shared memory: what a load that is not coalesced cannot be
            "async_copies": compiled.asm["ptx"].count("cp.async.cg.shared.global")
            + compiled.asm["ptx"].count("cp.async.bulk.tensor"),
        }


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _printed(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def _spilled(ptx: str, arch: int) -> int:
    """Bytes of spill stores, as the assembler counts them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", source.name]
        printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", printed))


def recorded(name: str, launch: Callable[[], None]) -> Launch:
    """The launch of the kernel that `launch` is about, without making it."""
    return all_recorded(name, launch)[1 if name.startswith(SECOND) else 0]


def all_recorded(name: str, run: Callable[[], None]) -> list[Launch]:
    """The launches that `run` makes, without making them."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    run_kernel = mock.patch.object(triton.runtime.jit.JITFunction, "run", lambda fn, *a, **k: seen.append((fn, a, k)))
    without_gpu = mock.patch.object(launching, "_INTERPRETED", True)  # which asks no driver
    with run_kernel, without_gpu:
        run()
    return [_launch(name, *call) for call in seen]


def _launch(name: str, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in kwargs}
    values = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = {}, {}, []
    for parameter in fn.params:
        value = values[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            divisible.append(parameter.name)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if specialized and value % 16 == 0:
                divisible.append(parameter.name)
    return Launch(
        name, fn.fn.__module__, fn.fn.__name__, tuple(signature.items()), tuple(constants.items()), tuple(divisible),
        tuple(options.items()),
    )  # fmt: skip


def gemm_launches(precision: configs.Precision, arch: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every GEMM kernel as the ops launch it, in every configuration of a precision."""
    dtype = DTYPES[precision]

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    integers = torch.empty(T, dtype=torch.int32)
    grouping = Grouping(torch.empty(E + 1, dtype=torch.int32), integers, integers)
    x, rows, p, seed = new(T, H), new(T, I), new(T, 1), torch.empty((), dtype=torch.int64)
    w1, b1, w2, b2, gated, b_gated = new(E, I, H), new(E, I), new(E, H, I), new(E, H), new(E, 2 * I, H), new(E, 2 * I)
    gemm, hidden, hidden_backward = (
        expert_gemm.expert_gemm,
        fused_moe_ffn.hidden,
        fused_moe_ffn_backward.hidden_backward,
    )
    down = partial(gemm, rows, w2, x, grouping, bias=b2)
    dx = partial(gemm, rows, w1.transpose(1, 2), x, grouping, residual=x, skipped=x, scatter=True)
    up = partial(hidden, x, w1, b1, rows, rows, grouping, "gelu", 0.0, None)
    dh = partial(hidden_backward, x, w2, rows, rows, rows, None, None, grouping, "gelu", 0.0, None)
    up_gated = partial(hidden, x, gated, b_gated, rows, new(T, 2 * I), grouping, "swiglu", 0.1, seed)
    dh_gated = partial(hidden_backward, x, w2, new(T, 2 * I), new(T, 2 * I), rows, p, new(T, 64, dtype=torch.float32),
                       grouping, "swiglu", 0.1, seed, gather=True)  # fmt: skip
    kinds: dict[configs.Kind, dict[str, Callable[..., None]]] = {
        "rows": {
            "expert_gemm.rows": down, "expert_gemm.scatter": partial(down, weights=p, scatter=True),
            "expert_gemm.dx_add_norm": dx, "hidden.gelu": up, "hidden_backward.gelu": partial(dh, gather=True),
        },
        "gated": {"hidden.swiglu.dropout": up_gated, "hidden_backward.swiglu.dropout.weights": dh_gated},
        "descriptors": {
            "expert_gemm.descriptors.rows": partial(down, descriptors=True),
            "expert_gemm.descriptors.dx_add_norm": partial(dx, descriptors=True),
            "hidden.descriptors": partial(up, gather=False, descriptors=True),
            "hidden_backward.descriptors": partial(dh, gather=False, descriptors=True),
        },
    }  # fmt: skip
    for kind, runs in kinds.items():
        for config in configs.candidates(kind, precision, arch):
            for name, run in runs.items():
                yield f"{name}/{config.name()}", partial(run, config=config)
    one = [expert_gemm_weights.Product(rows, x, new(E, I, H))]
    both = [one[0]._replace(gather_b=True), expert_gemm_weights.Product(x, rows, new(E, H, I))]
    dw = expert_gemm_weights.expert_gemm_weights
    for config in configs.candidates("weights", precision, arch):
        for name, products, used in (("one", one, config), ("both", both, config.gathering())):
            partials = new(2 * 132, config.BLOCK_M, config.BLOCK_N, dtype=torch.float32)
            yield f"expert_gemm_weights.{name}/{used.name()}", partial(dw, products, partials, grouping, config=used)


def fold_launches(precision: configs.Precision) -> Iterator[tuple[str, Callable[[], None]]]:
    """The weights of 8 experts of T5-base's wi: 192 and 384 rows of the auxiliary tensors' products."""
    dtype = DTYPES[precision]
    left, central, right = (torch.empty(s, dtype=dtype) for s in ((8, 192, 192), (192, 8, 4, 384), (8, 384, 384)))
    w, offsets = torch.empty(8, 3072, 768, dtype=dtype), torch.empty(9, dtype=torch.int32)
    config = mpo_expert_weights.pick_config(192, 384, precision)
    yield f"fold/{config.name()}", partial(mpo_expert_weights.fold, left, central, right, w, offsets, 12, 16, config)


def other_launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """The kernels without a configuration."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    fp32, i32, i64 = torch.float32, torch.int32, torch.int64
    integers, maps = new(T, dtype=i32), new(LAYERS, T, dtype=i32)
    grouping = Grouping(new(E + 1, dtype=i32), integers, integers)
    x, norm, p, seed = new(T, H), new(E, H, dtype=fp32), new(T, 1, dtype=fp32), new(dtype=i64)
    sums = new(num_chunks(T, E, column_sums.SUMS_CHUNK), 3 * H + I, dtype=fp32)
    tables = new(LAYERS, VOCABULARY, dtype=torch.uint8)
    yield "hash_route", partial(hash_route.hash_route, new(T, dtype=i64), tables, new(T, dtype=i64), maps)
    for experts in (E, 64, 1024):
        counts = new(LAYERS, group_tokens.num_spans(T), padded_experts(experts), dtype=i32)
        offsets = new(LAYERS, experts + 1, dtype=i32)
        place = partial(group_tokens.group_tokens, maps, experts, counts, offsets, maps, maps)
        yield f"group_tokens.place/E{experts}", place
    yield "combine", partial(fused_moe_ffn.combine, x, new(T // 2, H), 2)
    dweights = partial(
        fused_moe_ffn_backward.routing_weights_grad, new(T, 12, dtype=fp32), x, new(E, H), new(T, 1), grouping
    )
    yield "routing_weights_grad", dweights
    one, two = column_sums.Summand(x), column_sums.Summand(x, p, gather=True)
    yield "column_sums/one", partial(column_sums.column_sums, [one], sums, grouping)
    yield "column_sums/two", partial(column_sums.column_sums, [one, two], sums, grouping)
    added = [(new(E, H, dtype=fp32), H)] * 4
    yield "add_chunks", partial(column_sums.add_chunks, sums, added, grouping.offsets, column_sums.SUMS_CHUNK)
    product, large = expert_gemm_weights.Product(x, x, new(E, H, H)), configs.Config(128, 256, 64, 8, 4)
    partials = new(264, 128, 256, dtype=fp32)
    dw = expert_gemm_weights.expert_gemm_weights
    yield "add_partials", partial(dw, [product], partials, grouping, config=large)
    permute = mpo_expert_weights.permute
    w, permuted = new(8, 3072, 768), new(8, 6144, 384)
    yield "mpo_expert_weights.permute", partial(permute, w, permuted, new(9, dtype=i32), 8, 4, 12, 16)
    forward, backward = fused_moe_ffn_add_norm.add_norm, fused_moe_ffn_add_norm.add_norm_backward
    for dropout_p in (0.0, 0.1):
        for dtype in (torch.bfloat16, fp32):
            name = f"{TYPES[dtype]}{'.dropout' if dropout_p else ''}"
            z, last = new(T, H, dtype=dtype), (grouping, 1e-12, dropout_p, seed)
            yield f"add_norm/{name}", partial(forward, z, x, norm, norm, p, z, *last)
            summing = partial(backward, z, z, x, norm, norm, p, z, x, sums, p, *last, sum_dffn=True)
            yield f"add_norm_backward/{name}", summing
    in_order = {
        "before": (("y",), ("dy",)),
        "behind": (("x", "ffn"), ("x", "ffn", "dz")),
    }  # the experts: docs/design/0009
    for where, (by_row, by_row_backward) in in_order.items():
        last = grouping, 1e-12, 0.1, seed
        yield f"add_norm.{where}/bf16", partial(forward, x, x, norm, norm, None, x, *last, by_row=by_row)
        yield (
            f"add_norm_backward.{where}/bf16",
            partial(
                backward, x, x, x, norm, norm, None, x, x, sums, None, *last, sum_dffn=False, by_row=by_row_backward
            ),
        )


def launches(arch: int) -> Iterator[Launch]:
    """Everything that is compiled for an architecture."""
    for name, launch in other_launches():
        yield recorded(name, launch)
    for precision in configs.CANDIDATES:
        with mock.patch.object(configs, "precision_of", lambda _, p=precision: p):
            for module in (expert_gemm, expert_gemm_weights, mpo_expert_weights):
                module.precision_of = configs.precision_of
            for name, launch in (*gemm_launches(precision, arch), *fold_launches(precision)):
                if precision == "half" or name.partition("/")[0] in FEW:
                    yield recorded(f"{precision}/{name}", launch)
    for module in (expert_gemm, expert_gemm_weights, mpo_expert_weights):
        module.precision_of = configs.precision_of


def _compiled(job: tuple[Launch, int]) -> tuple[str, dict[str, Any]]:
    launch, arch = job
    return f"sm_{arch}/{launch.name}", launch.compile(arch)


def table(archs: tuple[int, ...] = ARCHS, processes: int | None = None) -> dict[str, dict[str, Any]]:
    """Name -> resources, for every launch and architecture."""
    jobs = [(launch, arch) for arch in archs for launch in launches(arch)]
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("fork")) as pool:
        return dict(sorted(pool.map(_compiled, jobs, chunksize=4)))


def complaints(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Spills; bf16 GEMMs without asynchronous copies, and with tiles of 64 rows and more without Hopper's wgmma."""
    wrong = [f"{name}: spills {row['spilled']} bytes" for name, row in found.items() if row["spilled"]]
    for name, row in found.items():
        if name.startswith("sm_90/half/") and int(name.rpartition("/")[2].split("x")[0]) >= 64 and not row["wgmma"]:
            wrong.append(f"{name}: no wgmma")
        if "/half/" in name and not row["async_copies"]:
            wrong.append(f"{name}: no asynchronous copies")
    return wrong


def _of_configurations(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, list[int]]]]:
    """Architecture -> precision and kind of kernel -> configuration -> [most registers, most shared bytes]."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name, row in rows.items():
        arch, *kernel, config = name.split("/")
        if len(kernel) != 2:  # without a configuration
            continue
        kind = next((kind for start, kind in KINDS.items() if kernel[1].startswith(start)), None)
        if kind:
            of_kind = found.setdefault(arch, {}).setdefault(f"{kernel[0]}-{kind}", {})
            registers, shared = of_kind.get(config, (0, 0))
            of_kind[config] = [max(registers, row["registers"]), max(shared, row["shared"])]
    return found


def occupancy(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What `pick_config` reads of the table, as its file: a line for each kind of kernel."""
    archs = [
        f' "{arch}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kinds.items()) + "\n }"
        for arch, kinds in _of_configurations(rows).items()
    ]
    return "{\n" + ",\n".join(archs) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed table; write nothing")
    parser.add_argument("--arch", type=int, choices=ARCHS, action="append", help="default: all")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected it unset, got 1: the interpreter compiles nothing")
    found = table(tuple(options.arch or ARCHS))
    wrong = complaints(found)
    committed = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None, "resources": {}}
    if not options.check:
        everything = committed["resources"] if options.arch else {}
        rows = dict(sorted((everything | found).items()))
        TABLE.write_text(
            f'{{"triton": "{triton.__version__}", "resources": {{\n'
            + ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
            + "\n}}\n"
        )
        OCCUPANCY.write_text(occupancy(rows))
    elif committed["triton"] == triton.__version__:
        if OCCUPANCY.read_text() != occupancy(committed["resources"]):
            wrong.append(f"{OCCUPANCY.name}: is not what the table says")
        for name, row in found.items():
            if committed["resources"].get(name) != row:
                wrong.append(f"{name}: the table has {committed['resources'].get(name)}, got {row}")
    for line in wrong:
        print(line)
    print(f"{len(found)} kernels compiled by Triton {triton.__version__}, {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
