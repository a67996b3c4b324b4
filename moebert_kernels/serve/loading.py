"""How `AutoModel*.from_pretrained` loads a prepared model, by the same hook of transformers as a converted one.

The modules are empty until the weights are loaded; then engines are chosen anew, for the machine that loads.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.quantizers import register_quantization_config, register_quantizer

from moebert_kernels.convert.loading import MoELoader, check_files, check_loaded, name_in, stored_tensors
from moebert_kernels.convert.replace import replace_feed_forwards, set_config
from moebert_kernels.cpu import warn_if_slow
from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import MoEConfig
from moebert_kernels.serve.config import METHOD, PreparedConfig
from moebert_kernels.serve.dtypes import input_dtype
from moebert_kernels.serve.modules import PackedModule
from moebert_kernels.serve.preparation import finish, replace_modules, token_scales_in, untie


class PreparedLoader(MoELoader):
    """Replaces the modules of a model that is being loaded, and packs their weights behind that."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of the checkpoint, whatever the caller asked for."""
        return self._dtype

    @property
    def _dtype(self) -> torch.dtype:
        return input_dtype(self.quantization_config.dtype)  # type: ignore[attr-defined]

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> Any:
        config: Any = self.quantization_config
        self.moe = None if config.moe is None else MoEConfig.from_dict(config.moe)
        if self.moe is not None:
            replace_feed_forwards(model, self.moe)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        files, tensors = checkpoint_files or (), model.state_dict()
        keys = [key for key, _ in stored_tensors(files)]
        leave_out_pooler(model, keys)
        replace_modules(model, config.dtype, stored={name_in(model, key, tensors) or key for key in keys})
        untie(model)
        self.found = set() if self.moe is None else check_files(model, files)
        model.initialize_weights = functools.partial(_checked_initialize_weights, model, model.initialize_weights)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config: Any = self.quantization_config
        vars(model).pop("initialize_weights", None)
        if self.moe is not None:
            set_config(model, self.moe)
            check_loaded(model, self.found)
        else:
            vars(model.config).pop("quantization_config", None)
        check_packed(model)
        self._take_marks_off(model)
        warn_if_slow(config.dtype)
        model.eval()
        finish(model, replace(config, token_scales=token_scales_in(model, config.token_scales)))
        return model

    @property
    def is_trainable(self) -> bool:
        return False


def leave_out_pooler(model: Any, keys: Sequence[str]) -> None:
    """Take the pooler off a model that can be without, if files of these keys have none: a drawn one is of no use."""
    optional = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    stored = any(re.search(r"(^|\.)pooler\.", key) for key in keys)
    if keys and not stored and optional and getattr(model, "pooler", None) is not None:
        model.pooler = None
        message = "checkpoint: it has no pooler, so the model gets none, and its pooler_output is None"
        warnings.warn(message, stacklevel=2)


def _checked_initialize_weights(model: Any, initialize_weights: Callable[[], None]) -> None:
    """transformers draws what no file had, and some models draw the weights of layers that they know, int8 or not."""
    check_packed(model)
    initialize_weights()


def check_packed(model: Any) -> None:
    """Raise a UserError unless every tensor that is to be packed came from the checkpoint, on the CPU."""
    for prefix, module in model.named_modules():
        if isinstance(module, PackedModule):
            shared = () if module.source is None else (("weight", module.source.weight),)
            for name, tensor in (*module.named_buffers(), *shared):
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise UserError(f"checkpoint: expected a tensor {prefix}.{name}, got none")
                if tensor.device.type != "cpu":
                    raise UserError(
                        f"device_map: expected a prepared model on the CPU, got {prefix} on {tensor.device}"
                    )


register_quantization_config(METHOD)(PreparedConfig)
register_quantizer(METHOD)(PreparedLoader)
