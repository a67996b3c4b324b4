"""`moebert bench`: two checkpoints of one's own side by side."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import moebert_kernels
from moebert_kernels.bench.tables import aligned, millions
from moebert_kernels.bench.timing import compare_models
from moebert_kernels.convert import mpoe_report, parameter_counts
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_layers
from moebert_kernels.layers.config import SPLITS

DTYPES = ("float32", "bfloat16", "float16")


def chosen_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """
    Raises:
        UserError: none of DTYPES.
    """
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {name}")
    return getattr(torch, name)


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where the times are from."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moebert_kernels": moebert_kernels.__version__,
    }


def sizes_of(model: Any) -> dict[str, Any]:
    """Parameters, in all and those that one token meets, and the memory they take.

    Of a model whose experts are whole feed-forwards also `mpoe_report`.
    """
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    sizes: dict[str, Any] = parameter_counts(model) | {"weights_mib": size / 2**20}
    if moe_layers(model) and model.config.quantization_config.experts not in SPLITS:
        report = mpoe_report(model)
        sizes["mpoe"] = report.as_dict() | {"text": str(report)}
    return sizes


def compare(models: Mapping[str, nn.Module], ids: Tensor, mask: Tensor, rounds: int) -> dict[str, Any]:
    """One batch of a result: its shape, and of each model what `compare_models` measures."""
    B, T = ids.shape
    shape = {"batch_size": B, "length": T, "real_tokens": int(mask.sum())}
    return shape | {"providers": compare_models(models, ids, mask, rounds)}


def text_table(result: Mapping[str, Any]) -> str:
    """What is printed: the models, then a row for each batch and model."""
    sizes = [("", "parameters", "active", "weights MiB")]
    for name, model in result["models"].items():
        counts = (millions(model[f"{kind}_parameters"]) for kind in ("total", "active"))
        sizes.append((name, *counts, f"{model['weights_mib']:.1f}"))
    rows = [("", "", "model ms", "speed-up", "FFN ms", "speed-up", "tokens/s", "peak MiB")]
    for case in result["cases"]:
        first = f"B={case['batch_size']} T={case['length']}, {case['real_tokens']} real tokens"
        for name, entry in case["providers"].items():
            speeds = (_spread(entry[f"{part}_speed"], 2) if name == "model" else "" for part in ("model", "ffn"))
            model_speed, ffn_speed = speeds
            peak = "" if entry["peak_mib"] is None else f"{entry['peak_mib']:.1f}"
            label = name + (", not captured in a graph" if entry["how"] == "eager" else "")
            rows.append((first, label, _spread(entry["model_ms"]), model_speed, _spread(entry["ffn_ms"]), ffn_speed,
                         f"{entry['tokens_per_s']:,.0f}", peak))  # fmt: skip
            first = ""
    reports = [f"{name}: {model['mpoe']['text']}" for name, model in result["models"].items() if "mpoe" in model]
    where = result["environment"]
    last = f"median [quartiles] of {result['rounds']} rounds in turns, {where['dtype']}, {where['device']}"
    return "\n".join((aligned(sizes), *reports, "", aligned(rows), last))


def _spread(values: Mapping[str, float], digits: int = 3) -> str:
    def text(value: float) -> str:
        return f"{value:.{digits}f}" if value < 10 else f"{value:.1f}"

    return f"{text(values['median'])} [{text(values['q1'])}, {text(values['q3'])}]"
