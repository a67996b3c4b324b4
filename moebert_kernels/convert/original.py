"""Import checkpoints of the original MoEBERT code (SimiaoZuo/MoEBERT), which nothing else loads.

Their keys are `bert.encoder.layer.N.experts.experts.E.{fc1,fc2,LayerNorm}.*`, and `...experts.gate.weight` for a gate;
the files also hold the distillation teacher, which is dropped here. Hash tables are *not* in them.
"""

import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, PreTrainedConfig
from transformers.initialization import no_init_weights

from moebert_kernels.convert.plain_pickle import read_plain_pickle
from moebert_kernels.convert.replace import replace_feed_forwards, resolved
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.convert.state import router_states
from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import MoEConfig

_EXPERT = re.compile(r"bert\.encoder\.layer\.(\d+)\.experts\.experts\.(\d+)\.(fc1|fc2|LayerNorm)\.(weight|bias)")
_GATE = re.compile(r"bert\.encoder\.layer\.(\d+)\.experts\.gate\.weight")
_PARAMETERS = {
    "w1": "fc1.weight",
    "b1": "fc1.bias",
    "w2": "fc2.weight",
    "b2": "fc2.bias",
    "norm_weight": "LayerNorm.weight",
    "norm_bias": "LayerNorm.bias",
}
# fields of the original's configuration that say nothing of the model
_NOT_CARRIED = ("model_type", "architectures", "transformers_version", "use_cache", "quantization_config")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def from_original(
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor],
    config: Mapping[str, Any] | PreTrainedConfig | str | os.PathLike[str] | None = None,
    *,
    hash_tables: Any = None,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """Return a BERT with the experts of a checkpoint that the original code wrote.

    Args:
        checkpoint: its folder (`config.json` and `pytorch_model.bin` or `model.safetensors`, whole or in shards), one
            weights file, or a state dict.
        config: the original's configuration: a mapping, a config, or the path of a `config.json`. None: the folder's.
        hash_tables: (V,) or (L, V) integers, or the path of a pickled `balance_hash_bucket_*.pkl`. Without them
            "hash-random" draws new ones, with a warning: such a model computes something else than the trained one.
        seed: of new tables.
        changes: fields of MoEConfig over what the checkpoint says (`router`, `route_padding`, ...).

    Returns:
        A converted BertForSequenceClassification or BertForQuestionAnswering, in eval mode.

    Raises:
        UserError: no such checkpoint or a damaged one, a dense one, tables that do not fit or are missing for
            "hash-balance", keys that do not belong to the original's model.
    """
    state = dict(checkpoint) if isinstance(checkpoint, Mapping) else _read_weights(Path(checkpoint))
    state = {key: tensor for key, tensor in state.items() if not key.startswith("teacher.")}
    state.pop("bert.embeddings.position_ids", None)
    fields = _read_config(config, checkpoint)
    experts, gates = _collect(state)
    E, I = next(iter(experts.values()))["w1"].shape[:2]

    model_class, num_labels = _head(state)
    fields.setdefault("id2label", {i: f"LABEL_{i}" for i in range(num_labels)})
    if len(fields["id2label"]) != num_labels:
        raise UserError(f"config: expected {num_labels} labels as in the checkpoint, got {len(fields['id2label'])}")
    options = {
        "router": fields.get("moebert_route_method") or ("gate-token" if gates else "hash-random"),
        "expert_dropout": fields.get("moebert_expert_dropout"),
        "load_balance": (fields.get("moebert_load_balance") or 0.0) if gates else None,
        "num_shared_neurons": fields.get("moebert_share_importance", 0),
        **changes,
    }
    moe = MoEConfig(experts="split", num_experts=E, expert_size=I, norm="expert", **options)
    if moe.is_learned != bool(gates) or moe.is_task_routed:
        found = "gates" if gates else "no gates"
        raise UserError(f"router: expected one that fits a checkpoint with {found}, got {moe.router!r}")

    own = {name: value for name, value in fields.items() if not name.startswith("moebert") and name not in _NOT_CARRIED}
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model = model_class(BertConfig(**own))
    sites = find_sites(model)
    moe = resolved(moe, model, sites, sites[0].weights())
    for layer, tensors in experts.items():
        state |= {f"bert.encoder.layer.{layer}.output.experts.{name}": tensor for name, tensor in tensors.items()}
    for layer, gate in gates.items():
        state[f"bert.encoder.layer.{layer}.output.router.gate.weight"] = gate
    if not gates:
        tables, generator = _tables(hash_tables, moe), torch.Generator().manual_seed(seed)
        for site, router in zip(sites, router_states(model, moe, sites, generator, None, tables), strict=True):
            state |= {f"{site.name}.{name}": tensor for name, tensor in router.items()}
    replace_feed_forwards(model, moe)
    model.tie_weights()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"checkpoint: expected the weights of the original MoEBERT, got others: {reason}") from error
    return model.eval()


def _collect(state: dict[str, Tensor]) -> tuple[dict[int, dict[str, Tensor]], dict[int, Tensor]]:
    """Take the experts and gates out of `state`: layer -> stacked parameters, layer -> (E, H)."""
    single: dict[int, dict[str, dict[int, Tensor]]] = {}
    gates: dict[int, Tensor] = {}
    for key in list(state):
        if match := _EXPERT.fullmatch(key):
            layer, expert, module, kind = match.groups()
            single.setdefault(int(layer), {}).setdefault(f"{module}.{kind}", {})[int(expert)] = state.pop(key)
        elif match := _GATE.fullmatch(key):
            gates[int(match[1])] = state.pop(key)
    if not single:
        raise UserError("checkpoint: expected experts of the original MoEBERT, got none: a dense model is for convert")
    experts = {}
    for layer, found in sorted(single.items()):
        try:
            number = len(found["fc1.weight"])
            experts[layer] = {
                name: torch.stack([found[original][e] for e in range(number)]) for name, original in _PARAMETERS.items()
            }
        except (KeyError, RuntimeError) as error:
            raise UserError(f"checkpoint: expected whole, equal experts in layer {layer}, got {error}") from error
    if len({tensors["w1"].shape for tensors in experts.values()}) != 1:
        raise UserError("checkpoint: expected experts of one size in all layers, got several")
    return experts, gates


def _head(state: Mapping[str, Tensor]) -> tuple[Any, int]:
    for key, head in (
        ("classifier.weight", BertForSequenceClassification),
        ("qa_outputs.weight", BertForQuestionAnswering),
    ):
        if key in state:
            return head, state[key].shape[0]
    raise UserError("checkpoint: expected classifier.weight or qa_outputs.weight, got neither")


def _tables(given: Any, config: MoEConfig) -> Any:
    if isinstance(given, (str, os.PathLike)):
        return read_plain_pickle(Path(given))
    if given is None and config.router == "hash-balance":
        raise UserError("hash_tables: expected the table (balance_hash_bucket_*.pkl) of a hash-balance model, got none")
    if given is None:
        warnings.warn(
            "the original code does not save its random hash tables: new ones are drawn, and this model computes "
            "something else than the trained one until it is trained on",
            stacklevel=3,
        )
    return given


def _read_config(config: Any, checkpoint: Any) -> dict[str, Any]:
    if isinstance(config, PreTrainedConfig):
        return config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    if config is None:
        if isinstance(checkpoint, Mapping):
            raise UserError("config: expected the original's configuration with a state dict, got none")
        folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
        config = folder / "config.json"
    path = Path(config)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"config: expected the original's config.json, got {path} ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"config: expected an object in {path}, got {type(fields).__name__}")
    return fields


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read one weights file, or a folder of one or of shards, on the CPU and without running pickled code."""
    if path.is_file():
        return _read_weights_file(path)
    for name in _WEIGHT_FILES:
        if (path / name).is_file():
            return _read_weights_file(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            state: dict[str, Tensor] = {}
            for shard in sorted(set(_read_config(index, None)["weight_map"].values())):
                state |= _read_weights_file(path / Path(shard).name)
            return state
    raise UserError(f"checkpoint: expected a folder with one of {', '.join(_WEIGHT_FILES)}, got {path}")


def _read_weights_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint: expected a whole weights file, got {path} ({reason})") from error
