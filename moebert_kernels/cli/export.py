"""`moebert export`: an ONNX file that any server with ONNX Runtime runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import already_written, call_of, tokenizer_of, write_files


def export(
    ctx: typer.Context,
    model: o.ModelName,
    output: o.OutputFolder,
    dtype: str = "float32",
    experts: str = "matrices",
    force: o.Force = False,
) -> None:
    """Write an encoder or a causal language model, dense or MoE, as model.onnx, with its configuration and tokenizer.

    Args:
        dtype: float32, or int8: with ONNX Runtime's dynamic quantisation.
        experts: matrices: standard operators alone, and padding costs nothing; operator: one com.microsoft.MoE for each
            layer, in float32.
    """
    from moebert_kernels.distill.loading import load_as_saved
    from moebert_kernels.serve import export_onnx

    inputs.check_models(model=model)
    identity = call_of(ctx)
    if already_written(output, identity, force, model):
        return
    loaded = load_as_saved(model)

    def save(folder: Path) -> None:
        export_onnx(loaded, folder / "model.onnx", dtype=dtype, experts=experts)
        if loaded.can_generate():
            loaded.generation_config.save_pretrained(folder)

    write_files(output, save, identity, tokenizer_of(model), _plain(loaded.config))
    print(f"{(output / 'model.onnx').stat().st_size / 2**20:,.0f} MiB; saved in {output}")


def _plain(config: Any) -> Any:
    """The configuration of the family: what reads it beside an ONNX file knows of no mixtures."""
    plain = copy.deepcopy(config)
    vars(plain).pop("quantization_config", None)
    return plain
