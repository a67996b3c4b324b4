"""How `AutoModel*.from_pretrained` loads a converted model: transformers calls us before it loads the weights.

transformers lets a package replace modules between building a model and loading its weights by the name of a
quantisation method, which it finds in `config.json`. Importing this module registers ours. Nothing is quantised: after
loading the marks of a quantised model are taken off, so that it trains, casts and moves as any other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from moebert_kernels.convert.replace import replace_feed_forwards
from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import METHOD, MoEConfig
from moebert_kernels.layers.feed_forward import MoEFeedForward
from moebert_kernels.nn.hash_router import checked_table

_TABLE = ".router.table"


class MoELoader(HfQuantizer):
    """Replaces the dense feed-forwards of a model that is being loaded by its configured mixtures of experts."""

    requires_calibration = True  # weights of a dense model are converted, not loaded

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> Any:
        replace_feed_forwards(model, self.quantization_config)  # type: ignore[arg-type]
        self.found = check_files(model, checkpoint_files or ())
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, tensor in model.state_dict().items():  # transformers before 5.23 compares none if there is a loader
            if tensor.shape != (wanted := self.shapes.get(name, tensor.shape)):
                raise UserError(
                    f"{name}: expected shape {tuple(wanted)}, got {tuple(tensor.shape)}; a head of another size needs"
                    " ignore_mismatched_sizes=True and transformers 5.23 or newer"
                )
        check_loaded(model, self.found)
        self._take_marks_off(model)
        return model

    def _take_marks_off(self, model: Any) -> None:
        for name in ("hf_quantizer", "quantization_method"):
            if hasattr(model, name):
                delattr(model, name)
        model.is_quantized = False
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_is_quantized"):
                config._is_quantized = False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def check_files(model: Any, files: Sequence[str]) -> set[str]:
    """Check the tensors of safetensors files before transformers casts them or draws missing ones.

    Returns:
        The names, in the model, of the tensors that are in the files.

    Raises:
        UserError: the files are in several folders, a file is damaged, a tensor has another kind of numbers, a layer's
            tensor has another shape, or a table names an expert that does not exist.
    """
    folders = {os.path.dirname(os.path.abspath(file)) for file in files}
    if len(folders) > 1:
        raise UserError(f"checkpoint: expected files of one folder in its index, got {', '.join(sorted(folders))}")
    ours, found = _tensors(model), set()
    tensors = model.state_dict()
    num_experts = model.config.quantization_config.num_experts
    for key, stored in stored_tensors(files):
        name = name_in(model, key, tensors)
        if name is None:
            continue
        found.add(name)
        if tensors[name].is_floating_point() and not _holds_reals(stored):
            raise UserError(f"{key}: expected floating-point numbers, got {_dtype_of(stored)}")
        if name not in ours:
            continue
        wanted = tuple(ours[name].shape)
        shape = tuple(stored.shape if isinstance(stored, Tensor) else stored.get_shape())
        if shape != wanted:
            entries = ", one entry per token of the vocabulary" if key.endswith(_TABLE) else ""
            raise UserError(f"{key}: expected shape {wanted}{entries}, got {shape}")
        if isinstance(stored, Tensor):
            checked_table(stored, num_experts, name=key)
    return found


def check_loaded(model: Any, found: Collection[str]) -> None:
    """Raise a UserError unless every tensor came from the checkpoint, but for new heads, and every table fits.

    transformers draws missing tensors at random and only warns.

    Args:
        found: what `check_files` gave, for tensors that stay on a disk or may have another shape.
    """
    ours = _tensors(model)
    has_other_names = ours.keys().isdisjoint(found)
    for name, tensor in ours.items():
        on_disk = tensor.is_meta and (name in found or has_other_names)
        if not _is_loaded(tensor) and not on_disk:
            raise UserError(f"checkpoint: expected a tensor {name}, got none")
        if name.endswith(_TABLE):
            checked_table(tensor, model.config.quantization_config.num_experts, name=name)
    tied, may_be_missing = model.all_tied_weights_keys, model._keys_to_ignore_on_load_missing or ()
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    missing = {name for name, tensor in tensors.items() if not _is_loaded(tensor) and not tensor.is_meta}
    present = tensors.keys() - missing
    known = {_head_of(model, name) for name in present} | {None}
    for name in sorted(missing - set(found)):  # of another shape transformers has its own option and error
        if any(re.search(pattern, name) for pattern in may_be_missing) or _is_other_heads(model, name, present):
            continue
        if _head_of(model, name) in known:
            raise UserError(f"checkpoint: expected a tensor {name}, got none")


def _is_loaded(tensor: Tensor) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)


def _head_of(model: Any, name: str) -> str | None:
    """The head of a tensor of this name, which may be new; None for a tensor that every model of the family has."""
    first, _, rest = name.partition(".")
    if hasattr(model, model.base_model_prefix):
        if first != model.base_model_prefix:
            return first
        first = rest.partition(".")[0]
    return first if first in ("lm_head", "pooler", "qa_outputs") else None


def _is_other_heads(model: Any, name: str, present: Collection[str]) -> bool:
    """Whether a tensor may be new since the checkpoint is of another class, whose head has fewer modules or no bias."""
    if type(model).__name__ in (model.config.architectures or (type(model).__name__,)):
        return False
    module, _, leaf = name.rpartition(".")
    head = _head_of(model, name)
    if head is None:
        return leaf == "mask_token"  # of images, which only models for masked ones have
    return (leaf == "bias" and head != "pooler") or not any(other.startswith(f"{module}.") for other in present)


def name_in(model: Any, key: str, tensors: Collection[str]) -> str | None:
    """Which of the model's tensors has this key in a file, which may be of the model with a head, or without one."""
    base = f"{model.base_model_prefix}."
    return next((name for name in (key, base + key, key.removeprefix(base)) if name in tensors), None)


def stored_tensors(files: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Keys of safetensors files with their slices; with the tensors themselves for hash tables."""
    for file in files:
        if file.endswith(".safetensors"):
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in list(opened.keys()):
                        yield key, opened.get_tensor(key) if key.endswith(_TABLE) else opened.get_slice(key)
            except SafetensorError as error:
                raise UserError(
                    f"checkpoint: expected a whole safetensors file, got a damaged {file} ({error})"
                ) from error


def _dtype_of(tensor: Any) -> str:
    """The name of its dtype."""
    return str(tensor.dtype) if isinstance(tensor, Tensor) else tensor.get_dtype()


def _holds_reals(tensor: Any) -> bool:
    """Whether a tensor, or a slice of a safetensors file, is of floating-point numbers."""
    return tensor.is_floating_point() if isinstance(tensor, Tensor) else tensor.get_dtype().startswith(("F", "BF"))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of all layers, by their names in the model."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, layer in model.named_modules()
        if isinstance(layer, MoEFeedForward)
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }


register_quantization_config(METHOD)(MoEConfig)
register_quantizer(METHOD)(MoELoader)
