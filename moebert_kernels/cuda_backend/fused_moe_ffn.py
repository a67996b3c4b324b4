"""The expert feed-forward as two launches; backward, and what neither of the two forms takes, is Triton's.

Few tokens of one expert each are `tiny_ffn`'s in inference, on any GPU, from a `Grouping` or straight from expert ids.
More are Hopper's expert GEMM: h = act(x[token] @ w1[e].T + b1[e]) with the pre-activations beside it in training, then
y = p * (h @ w2[e].T + b2[e]) scattered to token order. Triton takes top-k, dropout, more tokens than `tiny_ffn` does on
other GPUs and, of more tokens, gated activations, relu2 and what `expert_gemm.applies` refuses.
"""

from __future__ import annotations

from torch import Tensor

from moebert_kernels.activation import is_gated
from moebert_kernels.cuda_backend import tiny_ffn
from moebert_kernels.cuda_backend.expert_gemm import applies, expert_gemm, runs_on
from moebert_kernels.grouping import Grouping
from moebert_kernels.triton_backend import fused_moe_ffn as in_triton
from moebert_kernels.triton_backend.fused_moe_ffn import backward

__all__ = ["backward", "forward", "from_ids", "hidden_rows"]


def hidden_rows(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """Activations (num_rows, I) and, if `save`, the pre-activations (num_rows, I), in row order."""
    h = x.new_empty(grouping.num_rows, w1.shape[1])
    h_pre = x.new_empty(grouping.num_rows if save else 0, w1.shape[1])
    expert_gemm(
        x, w1, h, grouping, bias=b1, activation=activation, pre=h_pre if save else None, gather=True
    )  # fmt: skip
    return h, h_pre


def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    routing_weights: Tensor | None, activation: str, hidden_dropout_p: float, seed: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (T, H) and, if `save`, the pre-activations in row order."""
    drops = hidden_dropout_p > 0 and seed is not None
    if not save and not drops and tiny_ffn.applies(x, grouping.top_k, w1):
        return tiny_ffn.ffn(x, grouping, w1, b1, w2, b2, routing_weights, activation), x.new_empty(0, w1.shape[1])
    fits = runs_on(x) and applies(w1) and applies(w2)
    if drops or grouping.top_k > 1 or is_gated(activation) or activation == "relu2" or not fits:
        return in_triton.forward(
            x, grouping, w1, b1, w2, b2, routing_weights, activation, hidden_dropout_p, seed, save
        )  # fmt: skip
    h, h_pre = hidden_rows(x, grouping, w1, b1, activation, save)
    y = x.new_empty(grouping.num_tokens, w2.shape[1])
    weights = None if routing_weights is None else routing_weights.contiguous()
    expert_gemm(h, w2, y, grouping, bias=b2, weights=weights, scatter=True)
    return y, h_pre


def from_ids(
    x: Tensor, ids: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    routing_weights: Tensor | None, activation: str,
) -> Tensor | None:  # fmt: skip
    """y (T, H) of expert ids (T, top_k) that nobody grouped; None where a Grouping is needed."""
    if not tiny_ffn.applies(x, ids.shape[1], w1):
        return None
    return tiny_ffn.ffn(x, ids, w1, b1, w2, b2, routing_weights, activation)
