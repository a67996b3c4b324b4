"""What `pick_config` reads of the table of resources: registers and shared memory of every tile, by kind of kernel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebert_kernels.kernels import config as configs

FILE = Path(configs.__file__).parent / "occupancy.json"  # what of it `pick_config` reads
KINDS: dict[str, configs.Kind] = {  # of the kernels that the table has, by the beginnings of their names
    "expert_gemm.rows": "rows", "expert_gemm.scatter": "rows", "expert_gemm.dx_add_norm": "residual",
    "expert_gemm.descriptors": "descriptors", "hidden_backward.descriptors": "backward_descriptors",
    "hidden.descriptors": "hidden_descriptors",
    "hidden.gelu": "hidden", "hidden.swiglu": "gated", "hidden_backward.gelu": "backward",
    "hidden_backward.swiglu": "gated_backward", "expert_gemm_weights": "weights",
}  # fmt: skip


def of_table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, list[int]]]]:
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


def text(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The file: a line for each kind of kernel."""
    archs = [
        f' "{arch}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kinds.items()) + "\n }"
        for arch, kinds in of_table(rows).items()
    ]
    return "{\n" + ",\n".join(archs) + "\n}\n"
