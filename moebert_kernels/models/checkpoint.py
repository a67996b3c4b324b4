"""Checks of a checkpoint before transformers loads it, so that what is wrong with it is said in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from moebert_kernels.errors import UserError
from moebert_kernels.models.configuration import MoEBertConfig

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@contextmanager
def one_line_errors(path: str | os.PathLike | None) -> Iterator[None]:
    """Turn the errors of reading a checkpoint at `path` into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"checkpoint: expected a readable MoEBERT checkpoint, got {path} ({reason[0] if reason else error!r})"
        ) from error


def check_model_type(path: str | os.PathLike, options: dict[str, Any]) -> None:
    """Raise a UserError unless the configuration at `path` (a folder or a Hub name) is a MoEBERT's."""
    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    found, _ = PreTrainedConfig.get_config_dict(path, **hub)
    model_type = found.get("model_type")
    if model_type != MoEBertConfig.model_type:
        raise UserError(
            f"checkpoint: expected model_type 'moebert', got {model_type!r} in {path}: not a MoE checkpoint; "
            "to make one of a dense model, use convert"
        )


def check_checkpoint(path: str | os.PathLike, config: Any) -> None:
    """Check the routers' and experts' tensors in the headers of a local folder's safetensors files.

    Raises:
        UserError: a damaged file, a missing tensor, or one of another shape than the configuration says.
    """
    folder = Path(path)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return
    if not isinstance(config, MoEBertConfig):
        config = MoEBertConfig.from_pretrained(folder if config is None else config)
    shapes = _shapes(files)
    prefix = "moebert." if any(key.startswith("moebert.") for key in shapes) else ""
    for layer in range(config.num_hidden_layers):
        for name, shape in expected_shapes(config).items():
            key = f"{prefix}encoder.layer.{layer}.{name}"
            if key not in shapes:
                raise UserError(f"checkpoint: expected a tensor {key}, got none in {folder}")
            if shapes[key] != shape:
                raise UserError(f"{key}: expected shape {shape}, got {shapes[key]} in {folder}")


def expected_shapes(config: MoEBertConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a MoE layer has in place of a dense feed-forward layer, by their key in the layer."""
    E, I, H = config.num_experts, config.expert_size, config.hidden_size
    router = (
        {"router.table": (config.vocab_size,)} if config.is_hash_routed else {"router.gate.weight": (E, H)}
    )
    return router | {
        "experts.w1": (E, I, H),
        "experts.b1": (E, I),
        "experts.w2": (E, H, I),
        "experts.b2": (E, H),
        "experts.norm_weight": (E, H),
        "experts.norm_bias": (E, H),
    }


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                shapes.update({key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()})
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint: expected a whole safetensors file, got a damaged {file} ({error})") from error
    return shapes
