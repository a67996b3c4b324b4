"""Batches that a model cannot read are one clear error, instead of torch's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


@contextmanager
def reading(model: Any, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Around a forward of the model: raise a UserError for token ids outside its vocabulary or texts that are too long.

    Rotary positions reach beyond the configuration's, so the length is looked at only where the forward has failed.
    """
    for name in ("input_ids", "decoder_input_ids"):
        ids = batch.get(name)
        if ids is not None and ids.numel() and hasattr(model, "get_input_embeddings"):
            V, low, high = model.get_input_embeddings().weight.shape[0], int(ids.min()), int(ids.max())
            if low < 0 or high >= V:
                raise UserError(
                    f"batches: expected {name} from 0 to {V - 1}, the model's vocabulary, got {low} to {high}; use the "
                    "model's own tokenizer"
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
