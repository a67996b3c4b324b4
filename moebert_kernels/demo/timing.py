"""How long models take on the same input, measured in turns so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3


@torch.inference_mode()
def interleaved_medians(
    models: Mapping[str, nn.Module], input_ids: Tensor, attention_mask: Tensor, rounds: int = 21
) -> dict[str, dict[str, float]]:
    """Median times of whole models and of their feed-forward layers, in milliseconds.

    Args:
        models: BERT-style models of transformers or MoEBERTs, on one device.
        input_ids, attention_mask: (B, T) int64.
        rounds: each of them runs every model once.

    Returns:
        name -> `model_ms`, and `ffn_ms`: everything from a layer's attention to its output, summed over the layers,
        with the grouping of the tokens.
    """
    device: Any = next(iter(models.values())).device
    batch = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    times: dict[str, dict[str, list[float]]] = {name: {"model_ms": [], "ffn_ms": []} for name in models}
    with ExitStack() as stack:
        clocks = {name: stack.enter_context(_FfnClock(model, device)) for name, model in models.items()}
        for model in models.values():
            stack.callback(model.train, model.training)
            model.eval()
        for number in range(-WARM_UP, rounds):
            for name, model in models.items():
                clocks[name].reset()
                start = _now(device)
                model(**batch)
                whole = _now(device) - start
                if number >= 0:
                    times[name]["model_ms"].append(1e3 * whole)
                    times[name]["ffn_ms"].append(1e3 * (clocks[name].seconds + _grouping_time(model, batch, device)))
    return {
        name: {unit: statistics.median(values) for unit, values in measured.items()} for name, measured in times.items()
    }


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """All parameters of a model, and those that one token meets: of every layer `top_k` experts, or one."""
    total = sum(parameter.numel() for parameter in model.parameters())
    config: Any = model.config
    E, top_k = getattr(config, "num_experts", 1), getattr(config, "top_k", 1)
    # a norm around all experts is no expert's own
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.ndim > 1)
    return {"total_parameters": total, "active_parameters": total - experts * (E - top_k) // E}


def random_inputs(vocab_size: int, B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """B sequences of T random token ids, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(1000, vocab_size // 2), vocab_size, (B, T), generator=generator)
    return ids, torch.ones_like(ids)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _layers(model: Any) -> nn.ModuleList:
    return getattr(model, "base_model", model).encoder.layer


def _grouping_time(model: Any, batch: Mapping[str, Tensor], device: torch.device) -> float:
    """Of all layers' tokens, which the model groups outside its layers."""
    if not getattr(model.config, "is_hash_routed", False):
        return 0.0
    start = _now(device)
    getattr(model, "base_model", model).encoder.group_tokens(batch["input_ids"], batch["attention_mask"])
    return _now(device) - start


class _FfnClock:
    """While entered, adds up the time that a model spends in its feed-forward layers."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device = model, device
        self.seconds = 0.0
        self._start = 0.0

    def reset(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> _FfnClock:
        self._handles = []
        for layer in _layers(self._model):
            modules = (
                (layer.experts, layer.experts) if hasattr(layer, "experts") else (layer.intermediate, layer.output)
            )
            self._handles.append(modules[0].register_forward_pre_hook(self._begin))
            self._handles.append(modules[1].register_forward_hook(self._end))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: object) -> None:
        self._start = _now(self._device)

    def _end(self, *_: object) -> None:
        self.seconds += _now(self._device) - self._start
