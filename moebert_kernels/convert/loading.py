"""How `AutoModel*.from_pretrained` loads a converted model: transformers calls us before it loads the weights.

transformers lets a package replace modules between building a model and loading its weights by the name of a
quantisation method, which it finds in `config.json`. Importing this module registers ours. Nothing is quantised: after
loading the marks of a quantised model are taken off, so that it trains, casts and moves as any other.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from moebert_kernels.convert.replace import replace_feed_forwards
from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import METHOD, MoEConfig
from moebert_kernels.layers.routing import moe_layers
from moebert_kernels.nn import HashRouter


class MoELoader(HfQuantizer):
    """Replaces the dense feed-forwards of a model that is being loaded by those of its configuration."""

    requires_calibration = True  # weights of a dense model are converted, not loaded

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        replace_feed_forwards(model, self.quantization_config)  # type: ignore[arg-type]
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        check_loaded(model)
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


def check_loaded(model: nn.Module) -> None:
    """Raise a UserError unless every tensor of every layer came from the checkpoint, and every table fits.

    transformers draws missing tensors at random and only warns.
    """
    names = {module: name for name, module in model.named_modules()}
    for layer in moe_layers(model):
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if not getattr(tensor, "_is_hf_initialized", False):
                raise UserError(f"checkpoint: expected a tensor {names[layer]}.{name}, got none")
        if isinstance(layer.router, HashRouter):
            layer.router.validate(name=f"{names[layer]}.router.table")


register_quantization_config(METHOD)(MoEConfig)
register_quantizer(METHOD)(MoELoader)
