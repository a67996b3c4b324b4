"""Residual, dropout and LayerNorm by token, and its rows in the order of the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels import dropout
from moebert_kernels.grouping import Grouping
from moebert_kernels.torch_backend.fused_moe_ffn_add_norm import output_keep, sums


def forward(
    residual: Tensor, added: Tensor, norm_weight: Tensor, norm_bias: Tensor, grouping: Grouping, eps: float,
    dropout_p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Rows (T, H) of residual and `added` (T, H) by token, in the dtype of the residual."""
    z = sums(residual, added, _tokens(residual), dropout_p, seed)
    normed = torch.layer_norm(z, z.shape[1:], norm_weight.to(z.dtype), norm_bias.to(z.dtype), eps)
    return normed.to(residual.dtype).index_select(0, grouping.row_to_assignment)


def backward(
    drows: Tensor, residual: Tensor, added: Tensor, norm_weight: Tensor, norm_bias: Tensor, grouping: Grouping,
    eps: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dresidual, dadded, dnorm_weight, dnorm_bias); the first two by token, and perhaps one tensor."""
    tokens = _tokens(residual)
    z = sums(residual, added, tokens, dropout_p, seed)
    dy = drows.index_select(0, grouping.assignment_to_row).to(z.dtype)
    weight, bias = norm_weight.to(z.dtype), norm_bias.to(z.dtype)
    _, mean, rstd = torch.native_layer_norm(z, z.shape[1:], weight, bias, eps)
    dz, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, z, z.shape[1:], mean, rstd, weight, bias, [True, True, True]
    )
    keep = output_keep(seed, tokens, z.shape[1], dropout_p)
    dadded = dz if keep is None else (dz * keep).mul_(dropout.scale(dropout_p))
    dresidual = dz.to(residual.dtype)
    dadded = dresidual if keep is None and added.dtype == residual.dtype else dadded.to(added.dtype)
    return dresidual, dadded, dweight.to(norm_weight.dtype), dbias.to(norm_bias.dtype)


def _tokens(residual: Tensor) -> Tensor:
    return torch.arange(residual.shape[0], device=residual.device)
