"""The mixture-of-experts feed-forward layer with its residual and LayerNorm, in each expert or around all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_kernels.activation import is_gated
from moebert_kernels.errors import UserError
from moebert_kernels.grouping import Grouping
from moebert_kernels.nn.mpo_weight import MPOWeight
from moebert_kernels.ops.fused_moe_ffn import fused_moe_ffn
from moebert_kernels.ops.fused_moe_ffn_add_norm import fused_moe_ffn_add_norm

Factors = Sequence[Sequence[int]]


class MoEFeedForward(nn.Module):
    """The experts, FFN_e(x) = w2_e act(w1_e x + b1_e) + b2_e, and what a post-norm encoder has around them.

    With a norm per expert, MoEBERT's form: y = p * LayerNorm_e(x + dropout(FFN_e(x))), one expert per token; y = x
    where skipped. With one norm per layer: y = LayerNorm(x + dropout(sum_j p_j FFN_ej(x))), any number of experts per
    token; y = LayerNorm(x) where skipped.

    Args:
        hidden_size: H.
        expert_size: I.
        num_experts: E.
        activation: one of the ops' names; see `fused_moe_ffn_add_norm`. Gated ones double the rows of `w1`.
        eps: of the LayerNorms.
        dropout: probability, applied to the output of the second matrix in training.
        norm: "expert" or "layer".
        w1_factors, w2_factors: row and column factors of w1 (I, H) and w2 (H, I): both are an `MPOWeight`, whose
            experts share a central tensor. None: experts with weights of their own.
        max_bond: as for `MPOWeight`.

    Parameters: w1 (E, I, H), b1 (E, I), w2 (E, H, I), b2 (E, H), norm_weight and norm_bias (E, H), or (H,) with one
    norm per layer.

    Raises:
        UserError: another `norm`; factors that do not multiply to the shapes, and what `MPOWeight` raises.
    """

    def __init__(
        self, hidden_size: int, expert_size: int, num_experts: int, *,
        activation: str = "gelu", eps: float = 1e-12, dropout: float = 0.0, norm: str = "expert",
        w1_factors: Factors | None = None, w2_factors: Factors | None = None,
        max_bond: int | Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if norm not in ("expert", "layer"):
            raise UserError(f"norm: expected 'expert' or 'layer', got {norm!r}")
        self.norm = norm
        self.activation = activation
        self.eps = eps
        self.dropout = dropout
        rows = 2 * expert_size if is_gated(activation) else expert_size
        self.w1 = _make_weight("w1", num_experts, rows, hidden_size, w1_factors, max_bond)
        self.b1 = nn.Parameter(torch.empty(num_experts, rows))
        self.w2 = _make_weight("w2", num_experts, hidden_size, expert_size, w2_factors, max_bond)
        self.b2 = nn.Parameter(torch.empty(num_experts, hidden_size))
        norm_shape = (num_experts, hidden_size) if norm == "expert" else (hidden_size,)
        self.norm_weight = nn.Parameter(torch.empty(norm_shape))
        self.norm_bias = nn.Parameter(torch.empty(norm_shape))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialise as BERT does: weights normal(0, std), biases 0, norms 1."""
        for weight in (self.w1, self.w2):
            if isinstance(weight, MPOWeight):
                weight.reset_parameters(std)
            else:
                nn.init.normal_(weight, std=std)
        for bias in (self.b1, self.b2, self.norm_bias):
            nn.init.zeros_(bias)
        nn.init.ones_(self.norm_weight)

    def weights(self) -> tuple[Tensor, Tensor]:
        """w1 (E, I, H) and w2 (E, H, I); shared tensors are multiplied out."""
        w1, w2 = (weight() if isinstance(weight, MPOWeight) else weight for weight in (self.w1, self.w2))
        return w1, w2

    def forward(self, x: Tensor, routing: Grouping | Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """Apply to each token its experts.

        Args:
            x: (..., H) float.
            routing: a Grouping of the flattened tokens, or expert ids of shape (...), or (..., top_k) with one norm
                per layer.
            routing_weights: p, the shape of the ids and the dtype of x; None means 1.

        Returns:
            (..., H), dtype of x (float32 under autocast).
        """
        w1, w2 = self.weights()
        if self.norm == "layer":
            y = fused_moe_ffn(
                x, routing, w1, self.b1, w2, self.b2,
                routing_weights=routing_weights, activation=self.activation,
            )  # fmt: skip
            y = x + F.dropout(y, self.dropout, self.training)
            return F.layer_norm(y, self.norm_weight.shape, self.norm_weight, self.norm_bias, self.eps)
        return fused_moe_ffn_add_norm(
            x, routing, w1, self.b1, w2, self.b2, self.norm_weight, self.norm_bias,
            routing_weights=routing_weights, eps=self.eps, activation=self.activation,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def extra_repr(self) -> str:
        num_experts, hidden_size, expert_size = tuple(self.w2.shape)
        return (
            f"hidden_size={hidden_size}, expert_size={expert_size}, num_experts={num_experts}, "
            f"activation={self.activation!r}, eps={self.eps}, dropout={self.dropout}, norm={self.norm!r}"
        )


def _make_weight(
    name: str, num_experts: int, rows: int, columns: int, factors: Factors | None, max_bond: int | Sequence[int] | None
) -> nn.Parameter | MPOWeight:
    if factors is None:
        return nn.Parameter(torch.empty(num_experts, rows, columns))
    row_factors, col_factors = factors
    products = (math.prod(row_factors), math.prod(col_factors))
    if products != (rows, columns):
        raise UserError(f"{name}_factors: expected products {(rows, columns)}, got {products}")
    return MPOWeight(num_experts, row_factors, col_factors, max_bond)
