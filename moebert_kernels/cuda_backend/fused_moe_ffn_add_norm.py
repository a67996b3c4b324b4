"""The MoEBERT expert. Each form is asked whether it applies, the best one first:

1. `tiny_ffn`: few tokens in inference, two launches for everything, also straight from expert ids;
2. Hopper's expert GEMM, and one that adds the residual and normalises whole rows, in inference and in any order;
3. Hopper's expert GEMM, twice, then Triton's pass that un-permutes, adds the residual and normalises;
4. Triton's kernels, which take everything and run every backward.
"""

from __future__ import annotations

from torch import Tensor

from moebert_kernels.cuda_backend import expert_gemm_norm, tiny_ffn
from moebert_kernels.cuda_backend.fused_moe_ffn import gemms, gemms_apply, hidden_rows, reads
from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.fused_moe_ffn_add_norm import add_norm
from moebert_kernels.triton_backend import fused_moe_ffn_add_norm as in_triton
from moebert_kernels.triton_backend.fused_moe_ffn import contiguous
from moebert_kernels.triton_backend.fused_moe_ffn_add_norm import backward

__all__ = ["backward", "forward", "from_ids"]


def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, routing_weights: Tensor | None, eps: float, activation: str,
    dropout_p: float, hidden_dropout_p: float, seed: Tensor | None, save: bool, in_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (T, H) in x's dtype and, if `save`, the pre-activations and the feed-forward's outputs, both in row order."""
    drops = seed is not None and (dropout_p > 0 or hidden_dropout_p > 0)
    known_weights = reads(x, routing_weights)
    if known_weights and not save and not drops and not in_order and tiny_ffn.applies(x, grouping.top_k, w1):
        y = tiny_ffn.add_norm(
            x, grouping, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation
        )  # fmt: skip
        return y, w1.new_empty(0, w1.shape[1]), w1.new_empty(0, x.shape[1])
    gemms_take_it = gemms_apply(x, grouping, w1, w2, activation, hidden_dropout_p, seed)
    if gemms_take_it and known_weights and not save and not drops and expert_gemm_norm.applies(x, w2):
        h, h_pre = hidden_rows(x, grouping, w1, b1, activation, False, gather=not in_order)
        y = x.new_empty(x.shape)
        expert_gemm_norm.expert_gemm_norm(
            h, w2, x, y, grouping, norm_weight, norm_bias, eps, bias=b2, weights=routing_weights, x_by_row=in_order,
            after_previous=True,
        )  # fmt: skip
        return y, h_pre, w1.new_empty(0, x.shape[1])
    if in_order or not gemms_take_it:
        return in_triton.forward(
            x, grouping, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation,
            dropout_p, hidden_dropout_p, seed, save, in_order,
        )  # fmt: skip
    ffn, h_pre = gemms(x.to(w1.dtype), grouping, w1, b1, w2, b2, None, activation, save, scatter=False)
    y = x.new_empty(x.shape)
    add_norm(x, ffn, norm_weight, norm_bias, contiguous(routing_weights), y, grouping, eps, dropout_p, seed)
    return y, h_pre, ffn if save else ffn.new_empty(0, ffn.shape[1])


def from_ids(
    x: Tensor, ids: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, routing_weights: Tensor | None, eps: float, activation: str,
) -> Tensor | None:  # fmt: skip
    """y (T, H) of expert ids (T, 1) that nobody grouped; None where a Grouping is needed."""
    if not (reads(x, routing_weights) and tiny_ffn.applies(x, ids.shape[1], w1)):
        return None
    return tiny_ffn.add_norm(x, ids, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation)
