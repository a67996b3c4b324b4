"""The dtypes of a prepared model, by the names that `prepare` knows."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Numbers(NamedTuple):
    """What a dtype means.

    Attributes:
        weights: of linear layers, experts and embeddings of words.
        activations: of what passes between modules, and of all other weights.
        token_scales: whether every library quantises activations with a scale for each token.
    """

    weights: torch.dtype
    activations: torch.dtype
    token_scales: bool = False


DTYPES = {
    "int8": Numbers(torch.int8, torch.float32),
    "int8-token": Numbers(torch.int8, torch.float32, token_scales=True),
    "int8-bfloat16": Numbers(torch.int8, torch.bfloat16, token_scales=True),
    "bfloat16": Numbers(torch.bfloat16, torch.bfloat16),
    "float32": Numbers(torch.float32, torch.float32),
}


def is_int8(dtype: str) -> bool:
    """Whether the weights are int8."""
    return DTYPES[dtype].weights == torch.int8


def input_dtype(dtype: str) -> torch.dtype:
    """Of activations."""
    return DTYPES[dtype].activations


def bias_dtype(dtype: str) -> torch.dtype:
    """Of biases and of experts' norms, which int8 products and their scales meet in float32."""
    return torch.float32 if is_int8(dtype) else input_dtype(dtype)
