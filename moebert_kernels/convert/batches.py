"""Batches that a model cannot read are one clear error, instead of torch's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.errors import UserError

# these count positions from behind the padding's
_POSITIONS_BEHIND_PADDING = ("camembert", "data2vec-text", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")


def longest_input(config: Any) -> int | None:
    """Tokens that a model of this configuration has positions for; None: any number."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None:  # relative positions reach any length
        return None
    if config.model_type in _POSITIONS_BEHIND_PADDING:
        positions -= config.pad_token_id + 1
    return positions


def tensors_of(batches: Iterable[Mapping[str, Any]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The tensors of each batch, without gradients, on a device.

    Raises:
        UserError: one batch in place of several, or one that is no mapping or has no tensors.
    """
    if isinstance(batches, Mapping):
        raise UserError("batches: expected several in an iterable, got a single one; put it in a list")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise UserError(f"batches: expected mappings with input_ids, tokenized texts, got {type(batch).__name__}")
        found = {name: value.detach().to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        if not found:
            got = ", ".join(f"{name} ({type(value).__name__})" for name, value in batch.items()) or "an empty one"
            raise UserError(
                f"batches: expected tensors in each, got {got}; call the tokenizer with padding=True and"
                " return_tensors='pt'"
            )
        yield found


@contextmanager
def reading(model: Any, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Around a forward of the model: raise a UserError for a batch that it cannot read.

    Token ids may be of another shape or kind of numbers, outside the vocabulary, or more than the model has positions
    for; the mask may be of another shape. Rotary positions reach beyond the configuration's, so the length is looked at
    only where the forward has failed.
    """
    for name in ("input_ids", "decoder_input_ids"):
        ids = batch.get(name)
        if ids is not None and (ids.ndim < 2 or not ids.numel() or ids.is_floating_point()):
            raise UserError(
                f"batches: expected {name} as whole numbers (B, T), at least one, got {tuple(ids.shape)} of {ids.dtype}"
            )
        if ids is not None and hasattr(model, "get_input_embeddings"):
            V, low, high = model.get_input_embeddings().weight.shape[0], int(ids.min()), int(ids.max())
            if low < 0 or high >= V:
                raise UserError(
                    f"batches: expected {name} from 0 to {V - 1}, the model's vocabulary, got {low} to {high}; use the "
                    "model's own tokenizer"
                )
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is not None and mask is not None and mask.ndim == 2 and mask.shape != ids.shape:
        raise UserError(
            f"batches: expected an attention_mask of the input_ids' shape {tuple(ids.shape)}, got {tuple(mask.shape)}"
        )
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        longest = longest_input(getattr(model, "config", None))
        tokens = max((t.shape[-1] for name, t in batch.items() if name.endswith("input_ids") and t.ndim), default=0)
        if longest is None or tokens <= longest:
            raise
        raise UserError(
            f"batches: expected texts of at most {longest} tokens, for which the model has positions, got {tokens}; "
            f"call the tokenizer with truncation=True and max_length={longest}"
        ) from error
