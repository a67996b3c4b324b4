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
from moebert_kernels.nn.hash_router import checked_table
from moebert_kernels.nn.mpo_weight import site_shapes

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@contextmanager
def one_line_errors(path: str | os.PathLike | None, kind: str = "MoEBERT") -> Iterator[None]:
    """Turn the errors of reading a checkpoint of this kind at `path` into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0].strip("'\"")
        raise UserError(f"checkpoint: expected a readable {kind} checkpoint, got {path} ({reason})") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"checkpoint: expected tensors of the configuration's shapes, got others in {path}; "
            "ignore_mismatched_sizes=True would initialise them anew"
        ) from error


def read_config(path: str | os.PathLike, given: Any, options: dict[str, Any]) -> MoEBertConfig:
    """The configuration that a model at `path` (a folder or a Hub name) will be loaded with.

    Args:
        path: of the checkpoint.
        given: a MoEBertConfig, the path of one, or None for the checkpoint's own.
        options: keyword arguments of `from_pretrained`; those that name a field override the checkpoint's own.

    Raises:
        UserError: the checkpoint, or `given`, is not a MoEBERT's.
    """
    if isinstance(given, PreTrainedConfig) and not isinstance(given, MoEBertConfig):
        raise UserError(f"config: expected a MoEBertConfig, got a {type(given).__name__}")
    found = read_config_dict(path, options)
    model_type = found.get("model_type")
    if model_type != MoEBertConfig.model_type:
        raise UserError(
            f"checkpoint: expected model_type 'moebert', got {model_type!r} in {path}: not a MoE checkpoint; "
            "to make one of a dense model, use convert"
        )
    if given is None:
        return MoEBertConfig.from_dict(found | {name: options[name] for name in options if name in found})
    return given if isinstance(given, MoEBertConfig) else MoEBertConfig.from_pretrained(given)


def read_config_dict(path: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """What the configuration file at `path` (a folder or a Hub name) says.

    Raises:
        UserError: a folder that does not exist, or one without such a file.
    """
    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    if not hub.get("subfolder"):
        _check_folder(path)
    return PreTrainedConfig.get_config_dict(path, **hub)[0]


def check_tensors(folder: str | os.PathLike, config: MoEBertConfig) -> None:
    """Check the routers' and experts' tensors in a local folder's safetensors files; a Hub name has none yet.

    Only headers and hash tables are read.

    Raises:
        UserError: a damaged file, a missing tensor, one of another shape than `config` says, or a table with values
            that are not experts.
    """
    tables: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in list(opened.keys()):
                    shapes[key] = tuple(opened.get_slice(key).get_shape())
                    if key.endswith(".router.table"):
                        tables[key] = opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint: expected a whole safetensors file, got a damaged {file} ({error})") from error
    if not shapes:
        return
    prefix = "moebert." if any(key.startswith("moebert.") for key in shapes) else ""
    for layer in range(config.num_hidden_layers):
        for name, shape in expected_shapes(config).items():
            key = f"{prefix}encoder.layer.{layer}.{name}"
            if key not in shapes:
                raise UserError(f"checkpoint: expected a tensor {key}, got none in {folder}")
            if key in tables:
                checked_table(tables[key], config.num_experts, config.vocab_size, key)
            elif shapes[key] != shape:
                raise UserError(f"{key}: expected shape {shape}, got {shapes[key]}")


def expected_shapes(config: MoEBertConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a MoE layer has in place of a dense feed-forward layer, by their key in the layer."""
    E, I, H = config.num_experts, config.expert_size, config.hidden_size
    router: dict[str, tuple[int, ...]]
    if config.is_hash_routed:
        router = {"router.table": (config.vocab_size,)}
    elif config.is_task_routed:
        router = {"router.logits": (len(config.tasks or ()), E)}
    else:
        router = {"router.gate.weight": (E, H)}
    norm = (H,) if config.norm == "layer" else (E, H)
    return {
        **router,
        **_weight_shapes("experts.w1", config.w1_factors, config.max_bond, (E, I, H)),
        "experts.b1": (E, I),
        **_weight_shapes("experts.w2", config.w2_factors, config.max_bond, (E, H, I)),
        "experts.b2": (E, H),
        "experts.norm_weight": norm,
        "experts.norm_bias": norm,
    }


def _weight_shapes(name: str, factors: Any, max_bond: Any, dense: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of experts with weights of their own, or of one `MPOWeight`."""
    if factors is None:
        return {name: dense}
    row_factors, col_factors = factors
    sites = site_shapes(row_factors, col_factors, max_bond)
    middle = (len(sites) - 1) // 2
    aux = {f"{name}.aux.{k}": (dense[0], *site) for k, site in enumerate(sites[:middle] + sites[middle + 1 :])}
    return {f"{name}.central": sites[middle], **aux}


def _check_folder(path: str | os.PathLike) -> None:
    """A Hub name is `name` or `owner/name`; anything else, and whatever exists here, is a folder."""
    text = os.fspath(path)
    if os.path.isdir(text):
        if not os.path.isfile(os.path.join(text, "config.json")):
            raise UserError(f"checkpoint: expected a folder with a config.json, got {text} without one")
    elif os.path.exists(text) or os.path.isabs(text) or text.startswith(".") or text.count("/") > 1:
        raise UserError(f"checkpoint: expected a folder with a model, got {text}, which is not a folder")
