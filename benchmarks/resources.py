"""Registers, shared memory and spills of every Triton kernel in every configuration, compiled without a GPU.

    python -m benchmarks.resources            # compiles all, writes results/triton-resources.json and occupancy.json
    python -m benchmarks.resources --check    # compares with these files instead, and compiles only if sources changed

The launchers themselves run, on tensors that are never touched; what they would launch is compiled for each
architecture with the specialisation that Triton's own launcher would choose (divisibility by 16, ones, None). The table
is of the newest Triton that wrote it; of an older one it notes that all kernels compiled without complaints.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.launches import TYPES, Launch, recorded
from benchmarks.sources import digest
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
DTYPES: dict[configs.Precision, torch.dtype] = {
    "half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32
}  # fmt: skip


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


def compiled_from() -> str:
    """What a table is of: the kernels' sources, and every launch that is compiled."""
    kernels = Path(expert_gemm.__file__).parent.glob("*.py")
    return digest(kernels, *(f"{arch} {launch}" for arch in ARCHS for launch in launches(arch)))


def write(found: Mapping[str, Mapping[str, Any]], committed: Mapping[str, Any]) -> None:
    """The rows, if no newer Triton wrote the table; that this one compiled them, in any case."""
    compiled = committed["compiled"] | {triton.__version__: compiled_from()}
    versions = sorted(compiled, key=version)
    newest = versions[-1] == triton.__version__
    rows = found if newest else committed["resources"]
    noted = json.dumps({name: compiled[name] for name in versions})
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text(f'{{"compiled": {noted}, "resources": {{\n{lines}\n}}}}\n')
    OCCUPANCY.write_text(occupancy(rows))


def version(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))


def differences(found: Mapping[str, Mapping[str, Any]], committed: Mapping[str, Any]) -> list[str]:
    """Between the committed table and what was compiled just now."""
    rows = committed["resources"]
    wrong = [f"{TABLE.name}: is of other sources; write it anew (make resources)"]
    if max(committed["compiled"], key=version) == triton.__version__:
        wrong += [
            f"{name}: the table has {rows.get(name)}, got {row}" for name, row in found.items() if rows.get(name) != row
        ]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed table; write nothing")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected it unset, got 1: the interpreter compiles nothing")
    committed = json.loads(TABLE.read_text()) if TABLE.exists() else {"compiled": {}, "resources": {}}
    known = committed["compiled"].get(triton.__version__)
    if options.check and known == compiled_from():
        found, wrong, when = committed["resources"], [], "when the table was written"
    else:
        found = table()
        wrong, when = complaints(found), "just now"
        if not options.check:
            write(found, committed)
        elif known is not None:
            wrong += differences(found, committed)
    if options.check and OCCUPANCY.read_text() != occupancy(committed["resources"]):
        wrong.append(f"{OCCUPANCY.name}: is not what the table says")
    for line in wrong:
        print(line)
    print(f"{len(found)} kernels compiled by Triton {triton.__version__} {when}, {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
