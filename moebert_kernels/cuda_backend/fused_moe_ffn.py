"""The expert feed-forward as two launches. Each form is asked whether it applies, the best one first:

1. `tiny_ffn`: few tokens of one expert each, in inference, on any GPU, from a `Grouping` or straight from expert ids;
2. Hopper's expert GEMM, twice: h = act(x[token] @ w1[e].T + b1[e]), in training with the pre-activations beside it,
   then y = p * (h @ w2[e].T + b2[e]) scattered to token order;
3. Triton's kernels, which take everything and run every backward.
"""

from __future__ import annotations

from torch import Tensor

from moebert_kernels.activation import is_gated
from moebert_kernels.cuda_backend import expert_gemm, tiny_ffn
from moebert_kernels.grouping import Grouping
from moebert_kernels.triton_backend import fused_moe_ffn as in_triton
from moebert_kernels.triton_backend.fused_moe_ffn import backward, contiguous

__all__ = ["backward", "forward", "from_ids", "gemms", "gemms_apply", "reads"]


def reads(x: Tensor, routing_weights: Tensor | None) -> bool:
    """Whether these kernels can read the routing weights: they have x's dtype."""
    return routing_weights is None or routing_weights.dtype == x.dtype


def gemms_apply(
    x: Tensor, grouping: Grouping, w1: Tensor, w2: Tensor, activation: str, hidden_dropout_p: float, seed: Tensor | None
) -> bool:
    """Whether `gemms` can compute the layer."""
    drops = hidden_dropout_p > 0 and seed is not None
    known = not is_gated(activation) and activation != "relu2"
    return grouping.top_k == 1 and known and not drops and expert_gemm.applies(x, w1, w2)


def gemms(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    weights: Tensor | None, activation: str, save: bool, *, scatter: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """p * FFN_e (T, H) in row order, or with `scatter` in token order, and, if `save`, the pre-activations by row."""
    h, h_pre = hidden_rows(x, grouping, w1, b1, activation, save, gather=True)
    y = x.new_empty(grouping.num_rows, w2.shape[1])
    expert_gemm.expert_gemm(
        h, w2, y, grouping, bias=b2, weights=contiguous(weights), scatter=scatter, after_previous=True
    )  # fmt: skip
    return y, h_pre


def hidden_rows(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, activation: str, save: bool, *, gather: bool
) -> tuple[Tensor, Tensor]:
    """act(x @ w1[e].T + b1[e]) in row order, and what the activation is taken of, empty unless `save`."""
    h = x.new_empty(grouping.num_rows, w1.shape[1])
    h_pre = x.new_empty(grouping.num_rows if save else 0, w1.shape[1])
    expert_gemm.expert_gemm(
        x, w1, h, grouping, bias=b1, activation=activation, pre=h_pre if save else None, gather=gather
    )  # fmt: skip
    return h, h_pre


def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    routing_weights: Tensor | None, activation: str, hidden_dropout_p: float, seed: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (T, H) and, if `save`, the pre-activations in row order."""
    drops = hidden_dropout_p > 0 and seed is not None
    if not reads(x, routing_weights):
        return in_triton.forward(x, grouping, w1, b1, w2, b2, routing_weights, activation, hidden_dropout_p, seed, save)
    if not save and not drops and tiny_ffn.applies(x, grouping.top_k, w1):
        return tiny_ffn.ffn(x, grouping, w1, b1, w2, b2, routing_weights, activation), x.new_empty(0, w1.shape[1])
    if gemms_apply(x, grouping, w1, w2, activation, hidden_dropout_p, seed):
        return gemms(x, grouping, w1, b1, w2, b2, routing_weights, activation, save, scatter=True)
    return in_triton.forward(x, grouping, w1, b1, w2, b2, routing_weights, activation, hidden_dropout_p, seed, save)


def from_ids(
    x: Tensor, ids: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    routing_weights: Tensor | None, activation: str,
) -> Tensor | None:  # fmt: skip
    """y (T, H) of expert ids (T, top_k) that nobody grouped; None where a Grouping is needed."""
    if not (reads(x, routing_weights) and tiny_ffn.applies(x, ids.shape[1], w1)):
        return None
    return tiny_ffn.ffn(x, ids, w1, b1, w2, b2, routing_weights, activation)
