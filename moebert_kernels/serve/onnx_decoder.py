"""ONNX of a decoder that generates: keys and values of earlier tokens are inputs and outputs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moebert_kernels.errors import UserError

PAST, PRESENT = "past_key_values.", "present."  # what other packages call them


class CachedDecoder(nn.Module):
    """A causal language model with inputs by position and a tuple of outputs.

    Args:
        model: of transformers.
        inputs: the names of the first inputs; behind them come the keys and values of earlier tokens, layer by layer,
            each (B, heads, P, head size) with P >= 0. `attention_mask` is (B, P + T).
    """

    def __init__(self, model: Any, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, T, V), then keys and values of all P + T tokens, layer by layer."""
        given, past = dict(zip(self.inputs, inputs, strict=False)), inputs[len(self.inputs) :]
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # `update` would put an empty tensor before them
            cache.layers.append(layer)
        found = self.model(**given, **{name_of_cache(self.model): cache}, use_cache=True, return_dict=True)
        return (found.logits, *keys_and_values(cache))


def name_of_cache(model: Any) -> str:
    """What `forward` calls the keys and values of earlier tokens; transformers 5.24 renamed it. Empty: nothing."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), "")


def keys_and_values(cache: Any) -> list[Tensor]:
    """Of each layer its keys and its values, each (B, heads, P, head size)."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def example_of_decoder(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` for tokens behind three earlier ones, with the keys and values of these.

    Args:
        inputs: by name, each (B, T); among them `attention_mask`.

    Raises:
        UserError: the model keeps something else than keys and values of all earlier tokens.
    """
    cache, name, kept = DynamicCache(), name_of_cache(model), False
    if name:
        with torch.no_grad():
            earlier = {key: tensor[:, :3] for key, tensor in inputs.items()}
            found = model(**earlier, **{name: cache}, use_cache=True, return_dict=True)
        kept = found.get(name) is cache and all(
            type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers
        )
    if not kept:
        raise UserError(
            f"model: expected a decoder that keeps keys and values of earlier tokens, got {type(model).__name__}"
        )
    behind = dict(inputs)
    behind["attention_mask"] = torch.ones(len(inputs["input_ids"]), 3 + inputs["input_ids"].shape[1], dtype=torch.int64)
    if "position_ids" in behind:
        behind["position_ids"] = inputs["position_ids"] + 3
    names = [f"{PAST}{k}.{part}" for k in range(len(cache.layers)) for part in ("key", "value")]
    return behind | dict(zip(names, keys_and_values(cache), strict=True))
