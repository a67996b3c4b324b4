"""Which products of an int8 model need a scale for each token: measured with the float model on a little text.

With one scale for all rows of a call, a token whose values are many times the others' leaves these few of the 255
steps. Some products of a model have such tokens; the others need no more than the one scale, which is faster.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.convert.batches import reading, tensors_of
from moebert_kernels.convert.sample_loss import unread_labels
from moebert_kernels.errors import UserError
from moebert_kernels.serve.modules import products_of
from moebert_kernels.serve.packed import Packed, rounded_activation

# Of a product's output, relative, for the median token (docs/experiments.md, 2026-11-29).
MOST_ERROR = 0.05
MOST_TOKENS = 2048  # of the text


def products_needing_token_scales(model: Any, batches: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of the products whose outputs one scale for all rows of a call makes too inexact.

    The error of a token is |W round(x) - W x| / |W x|, with x rounded as a call of int8 does it. Named is a product
    whose median over the tokens is above `MOST_ERROR`, if a scale for each token at least halves it; and one that the
    text does not reach. Padding counts where it decides the scale, and nowhere else. What the weights' rounding does is
    left out, since no scale of x changes it.

    Args:
        model: with packed modules in float32, in the engine "plain"; it is used up.
        batches: as for `prepare`; reading ends at `MOST_TOKENS`.

    Raises:
        UserError: batches that are none, or that the model cannot read.
    """
    products, recorders = products_of(model), {}
    mask: list[Any] = [None]
    for name, packed in products.items():
        assert isinstance(packed, Packed)
        recorders[name] = _Recorder(packed, mask)
        packed.linear = recorders[name]
    accepted = set(inspect.signature(model.forward).parameters)
    accepted -= set(unread_labels(model))  # nothing that a product sees depends on them
    if not isinstance(batches, Iterable):
        raise UserError(f"batches: expected a list of mappings with input_ids, got {type(batches).__name__}")
    for batch in tensors_of(batches, torch.device("cpu")):
        given = {name: value for name, value in batch.items() if name in accepted}
        if not given:
            raise UserError(f"batches: expected tensors that the model takes, got {', '.join(batch)}")
        mask[0] = given.get("attention_mask")
        _run(model, given)
        if max(recorder.count for recorder in recorders.values()) >= MOST_TOKENS:
            break
    if not any(recorder.count for recorder in recorders.values()):
        raise UserError("batches: expected text to calibrate by, got no tokens")
    return [name for name, recorder in recorders.items() if recorder.needs_token_scales()]


def _run(model: Any, batch: dict[str, Tensor]) -> None:
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False), reading(model, batch):
            model(**batch)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        got = ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in batch.items())
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"batches: expected what the model's forward takes, got {got} ({reason})") from error


class _Recorder:
    """The linear layer of a product, which keeps the errors of its rows, padding excepted."""

    def __init__(self, packed: Packed, mask: list[Any]) -> None:
        self.linear: Callable[[Tensor], Tensor] = packed.linear
        self.bias, self.mask = packed.weights().bias, mask
        self.errors: list[Tensor] = []
        self.errors_of_tokens: list[Tensor] = []
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        size = (y if self.bias is None else y - self.bias).norm(dim=-1)
        mask = self.mask[0]
        is_text = size > 0
        if mask is not None and mask.shape == size.shape:
            is_text &= mask != 0

        def errors(dtype: str) -> Tensor:
            return ((self.linear(rounded_activation(x, dtype)) - y).norm(dim=-1) / size)[is_text]

        found = errors("int8")
        self.errors.append(found)
        self.errors_of_tokens.append(errors("int8-token"))
        self.count += len(found)
        return y

    def needs_token_scales(self) -> bool:
        if not self.count:
            return True
        error = torch.cat(self.errors).median()
        return bool(error > MOST_ERROR and 2 * torch.cat(self.errors_of_tokens).median() <= error)
