"""The embedding of a prepared model in int8."""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moebert_kernels.serve.dtypes import input_dtype
from moebert_kernels.serve.modules import Engines, PackedModule, as_weights


class PackedEmbedding(PackedModule):
    """nn.Embedding with int8 rows and a scale for each, times `embed_scale`; it gives the model's activations.

    Buffers: weight (V, H) int8, scale (V,) float32; of a tied one none.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, padding_idx: int | None, embed_scale: float = 1.0, dtype: str = "int8"
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.embed_scale = embed_scale
        self._fill({"weight": weight, "scale": scale})

    @classmethod
    def of(cls, module: Any, dtype: str) -> PackedEmbedding:
        weight, scale = as_weights(module.weight, None, dtype)[:2]
        assert scale is not None
        return cls(weight, scale, module.padding_idx, embed_scale_of(module) or 1.0, dtype)

    def pack(self, engines: Engines) -> None:
        """Nothing: it computes with its buffers."""

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight).float() * F.embedding(ids, self.scale.unsqueeze(1))
        rows = rows if self.embed_scale == 1.0 else rows * self.embed_scale
        return rows.to(input_dtype(self.dtype))

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, dtype={self.dtype}"


def embed_scale_of(embedding: nn.Module) -> float | None:
    """The factor on all rows of nn.Embedding, 1, or of transformers' scaled embeddings; None for other classes."""
    if type(embedding) is nn.Embedding:
        return 1.0
    # DiffusionGemma multiplies by the weight of its embedding
    if not re.fullmatch(r"(?!Diffusion)\w+ScaledWordEmbedding", type(embedding).__name__):
        return None
    if [name for name, _ in embedding.named_parameters()] != ["weight"]:  # T5Gemma 2 has a token of another table
        return None
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return scale if isinstance(scale, (int, float)) else None
