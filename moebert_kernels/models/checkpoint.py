"""Checks of a checkpoint around its loading by transformers: what is wrong with it is a UserError of one line.

Transformers initialises at random what a checkpoint lacks. Here that is an error, except for a head that the checkpoint
has nothing of. What counts is what transformers loaded, from the files that it chose.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moebert_kernels.errors import UserError
from moebert_kernels.models.card import write_card
from moebert_kernels.nn.hash_router import HashRouter, checked_table

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_TABLE = ".router.table"
# modules of a model without an encoder inside that are no part of the encoder
_HEADS = ("lm_head", "pooler", "qa_outputs")


class SavedModel:
    """To be a base of a model class, before transformers': what is loaded is checked, what is saved has a card."""

    config_class: Any
    _converter: str

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, config: Any = None, **options: Any
    ) -> Any:
        """As in transformers; a checkpoint of another kind of model, or not a whole one, is a UserError.

        A head (classifier, pooler, ...) of which the checkpoint has no tensor at all is new, as in transformers.
        """
        path = pretrained_model_name_or_path
        with one_line_errors(path):
            if isinstance(config, PreTrainedConfig) and not isinstance(config, cls.config_class):
                raise UserError(f"config: expected a {cls.config_class.__name__}, got a {type(config).__name__}")
            if path is not None:
                found, wanted = read_config_dict(path, options).get("model_type"), cls.config_class.model_type
                if found != wanted:
                    raise UserError(
                        f"checkpoint: expected model_type {wanted!r}, got {found!r} in {path}; to make one of "
                        f"a dense model, use {cls._converter}"
                    )
            loaded = super().from_pretrained(path, *args, config=config, **options)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, module in model.named_modules():
            if isinstance(module, HashRouter):
                module.validate(model.config.vocab_size, f"{name}.table")
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **options: Any
    ) -> None:
        """As in transformers, with a model card: see `moebert_kernels.models.card.write_card`."""
        super().save_pretrained(save_directory, is_main_process, *args, **options)  # type: ignore[misc]
        if is_main_process and os.path.isdir(save_directory):
            write_card(self, save_directory)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Transformers' step between reading the files and drawing what they lack, which could be of any size.
        path, ignoring = load_config.pretrained_model_name_or_path, load_config.ignore_mismatched_sizes
        _check_tensors(model, state_dict, checkpoint_files or (), path, ignoring)
        info, index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        check_loaded(model, info, path, ignoring)
        return info, index


def check_loaded(model: PreTrainedModel, info: Any, path: Any, ignore_mismatched_sizes: bool = False) -> None:
    """Check what transformers could not load.

    Args:
        model: whose keys are compared.
        info: with `missing_keys` and `mismatched_keys` (key, shape in the checkpoint, shape in the model).
        path: of the checkpoint, for messages.
        ignore_mismatched_sizes: whether tensors of another shape may be drawn anew.

    Raises:
        UserError: a tensor of another shape than the configuration says, or one that is missing and not of a new head.
    """
    if not ignore_mismatched_sizes:
        for key, got, wanted in sorted(info.mismatched_keys):
            raise UserError(
                f"{key}: expected shape {tuple(wanted)}, got {tuple(got)} in {path}; "
                "ignore_mismatched_sizes=True would initialise it anew"
            )
    missing = set(info.missing_keys)
    known = {head_of(model, key) for key in model.state_dict() if key not in missing}
    for key in sorted(missing):
        head = head_of(model, key)
        if (head is None or head in known) and not _may_be_missing(model, key, missing):
            raise UserError(f"checkpoint: expected a tensor {key}, got none in {path}")


def head_of(model: PreTrainedModel, key: str) -> str | None:
    """The head that a tensor of this key belongs to; None for what every model of the family has."""
    first, _, rest = key.partition(".")
    if hasattr(model, model.base_model_prefix):
        if first != model.base_model_prefix:
            return first
        first = rest.partition(".")[0]
    return first if first in _HEADS else None


def _may_be_missing(model: Any, key: str, missing: set[str]) -> bool:
    """Whether the tensor is tied to one that is there, or of no importance to the model."""
    tied = model.all_tied_weights_keys  # key -> the key of the tensor that it is
    source = tied.get(key, key)
    same = {source, *(other for other in tied if tied[other] == source)}
    ignored = model._keys_to_ignore_on_load_missing or ()
    return not same <= missing or any(re.search(pattern, key) for pattern in ignored)


def _check_tensors(
    model: Any, state_dict: Mapping[str, Tensor] | None, files: Sequence[str], path: Any, ignore_mismatched_sizes: bool
) -> None:
    """Check the files, the kinds of numbers, and the tables, which transformers would cast to the dtypes it wants.

    Only headers and tables are read. What lies in pickled files is not checked.
    """
    config = model.config
    vocab_size = None if ignore_mismatched_sizes else config.vocab_size
    kinds = {key: tensor.is_floating_point() for key, tensor in model.state_dict().items()}
    base = f"{model.base_model_prefix}."
    for key, tensor in stored_tensors(state_dict, files, path):
        known = next((name for name in (key, base + key, key.removeprefix(base)) if name in kinds), None)
        if known is None:
            continue
        if known.endswith(_TABLE):
            checked_table(tensor, config.num_experts, vocab_size, key)
        elif kinds[known] and not holds_reals(tensor):
            raise UserError(f"{key}: expected floating-point numbers, got {dtype_of(tensor)} in {path}")


def stored_tensors(
    state_dict: Mapping[str, Tensor] | None, files: Sequence[str], path: Any
) -> Iterator[tuple[str, Any]]:
    """Keys with tensors, or in place of what is no table, with slices of a safetensors file."""
    yield from (state_dict or {}).items()
    for file in files:
        if os.path.isdir(path or "") and not _is_inside(file, path):
            raise UserError(f"checkpoint: expected files inside {path}, got {file} in its index")
        if file.endswith(".safetensors"):
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in list(opened.keys()):
                        yield key, opened.get_tensor(key) if key.endswith(_TABLE) else opened.get_slice(key)
            except SafetensorError as error:
                raise UserError(
                    f"checkpoint: expected a whole safetensors file, got a damaged {file} ({error})"
                ) from error


def _is_inside(file: str, folder: str | os.PathLike) -> bool:
    return os.path.abspath(file).startswith(os.path.join(os.path.abspath(folder), ""))


def dtype_of(tensor: Any) -> str:
    """The name of its dtype."""
    return str(tensor.dtype) if isinstance(tensor, Tensor) else tensor.get_dtype()


def holds_reals(tensor: Any) -> bool:
    """Whether a tensor, or a slice of a safetensors file, is of floating-point numbers."""
    return tensor.is_floating_point() if isinstance(tensor, Tensor) else tensor.get_dtype().startswith(("F", "BF"))


@contextmanager
def one_line_errors(path: str | os.PathLike | None) -> Iterator[None]:
    """Turn the errors of reading a checkpoint at `path` into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, json.JSONDecodeError, pickle.UnpicklingError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0].strip("'\"")
        raise UserError(f"checkpoint: expected a readable one, got {path} ({reason})") from error


def read_config_dict(path: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """What the configuration file at `path` (a folder or a Hub name) says.

    Raises:
        UserError: a folder that does not exist, or one without such a file, or a file that holds something else.
    """
    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    if not hub.get("subfolder"):
        _check_folder(path)
    try:
        found = PreTrainedConfig.get_config_dict(path, **hub)[0]
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"checkpoint: expected a configuration in config.json of {path}, got something else")
    return found


def _check_folder(path: str | os.PathLike) -> None:
    """A Hub name is `name` or `owner/name`; anything else, and whatever exists here, is a folder."""
    text = os.fspath(path)
    if os.path.isdir(text):
        if not os.path.isfile(os.path.join(text, "config.json")):
            raise UserError(f"checkpoint: expected a folder with a config.json, got {text} without one")
    elif os.path.exists(text) or os.path.isabs(text) or text.startswith(".") or text.count("/") > 1:
        raise UserError(f"checkpoint: expected a folder with a model, got {text}, which is not a folder")
