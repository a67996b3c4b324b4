"""How long models take on the same input, measured in turns so that a busy machine slows all of them alike."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moebert_kernels.bench.clocks import peak_mib, quartiles, timer
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.layers.routing import moe_layers, tokens_of
from moebert_kernels.nn.context import Call, current, entered

WARM_UP = 3
Name = TypeVar("Name")


def compare_models(
    models: Mapping[str, nn.Module], input_ids: Tensor, attention_mask: Tensor, rounds: int = 21
) -> dict[str, dict[str, Any]]:
    """Times of whole models and of their feed-forward layers, in milliseconds, with quartiles over rounds.

    Args:
        models: models of transformers, dense or MoE, on one device. A decoder behind an encoder gets the encoder's
            tokens. Ratios are over the last one.
        input_ids, attention_mask: (B, T) int64.
        rounds: each of them times every model and all its feed-forward layers, in an order that changes.

    Returns:
        name -> `model_ms`, `ffn_ms` and the ratios `model_speed`, `ffn_speed`, each {"q1", "median", "q3"};
        `tokens_per_s`, of real tokens; `peak_mib` of one call beyond what was there, None on a CPU; `how`, on a GPU
        "graph" or "eager". `ffn_ms` is everything from a layer's attention to its output, summed over the layers, with
        the grouping of the tokens, on the inputs that the model gives them; without norm and residual connection where
        these are not of the feed-forward's module, as in GPT-2 and T5, and of a dense model without the activation
        where no module has it, as in BART and OPT.
    """
    device: Any = next(iter(models.values())).device
    batch = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    with evaluating(models.values()), torch.inference_mode():
        timers = {}
        inputs = {name: batch | decoder_inputs(model, batch) for name, model in models.items()}
        for name, model in models.items():
            timers[name, "model"] = timer(partial(model, **inputs[name]), device)
            timers[name, "ffn"] = timer(feed_forwards(model, inputs[name]), device)
        times = interleaved({key: timer.warm_ms for key, timer in timers.items()}, rounds)
        peaks = {name: peak_mib(partial(model, **inputs[name]), device) for name, model in models.items()}
    *_, last = models
    real_tokens = int(attention_mask.sum())
    result: dict[str, dict[str, Any]] = {}
    for name in models:
        entry: dict[str, Any] = {}
        for part in ("model", "ffn"):
            entry[f"{part}_ms"] = quartiles(times[name, part])
            pairs = zip(times[last, part], times[name, part], strict=True)
            entry[f"{part}_speed"] = quartiles([theirs / ours for theirs, ours in pairs])
        entry["tokens_per_s"] = 1e3 * real_tokens / entry["model_ms"]["median"]
        result[name] = entry | {"peak_mib": peaks[name], "how": timers[name, "model"].how}
    return result


def interleaved(runs: Mapping[Name, Callable[[], list[float]]], rounds: int) -> dict[Name, list[float]]:
    """The milliseconds of each in each round, one after the other: what else runs on the machine slows all alike.

    Every round has another order, so that none always follows the same other one.

    Args:
        runs: by name what runs one for a round and gives the milliseconds of its calls, whose median counts, as a
            timer's `warm_ms` does.
        rounds: those that count; WARM_UP come before them.
    """
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for number in range(-WARM_UP, rounds):
        shuffle(order)
        for name in order:
            elapsed_ms = statistics.median(runs[name]())
            if number >= 0:
                times[name].append(elapsed_ms)
    return times


def random_inputs(vocab_size: int, B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """B sequences of T random token ids, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(1000, vocab_size // 2), vocab_size, (B, T), generator=generator)
    return ids, torch.ones_like(ids)


def feed_forwards(model: Any, batch: Mapping[str, Tensor]) -> Callable[[], Any]:
    """What runs all feed-forward layers on what the model gives them when it sees `batch`; returns the last output."""
    calls: list[tuple[Call, nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((current(), module, args, kwargs))

    base = getattr(model, "base_model", model)
    with ExitStack() as stack:
        for part in moe_layers(base) or [part for site in find_sites(base) for part in site.parts]:
            stack.callback(part.register_forward_pre_hook(record, with_kwargs=True).remove)
        model(**batch)
    stacks = [module for module in model.modules() if hasattr(module, "moe_layers")]

    def run() -> Any:
        for stack in stacks:
            tokens_of(stack, batch)
        y = None
        for call, module, args, kwargs in calls:
            with entered(call):
                y = module(*args, **kwargs)
        return y

    return run


def decoder_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model with a decoder needs beside the batch: the same tokens."""
    return {"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {}


@contextmanager
def evaluating(models: Any) -> Iterator[None]:
    """Dropout off while entered."""
    with ExitStack() as stack:
        for model in models:
            stack.callback(model.train, model.training)
            model.eval()
        yield
