"""The expert feed-forward: two launches forward (three for top-k), four GEMMs and their ordered sums backward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels.column_sums import Summand
from moebert_kernels.kernels.fused_moe_ffn import hidden
from moebert_kernels.kernels.fused_moe_ffn_backward import (
    hidden_backward,
    hidden_backward_config,
    routing_weights_grad,
)
from moebert_kernels.kernels.launch import empty, made, recorded
from moebert_kernels.triton_backend.expert_gemm import (
    bias_gradients,
    rows_times_weights,
    weight_gradients,
)


@recorded
def hidden_rows(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, width: int, activation: str,
    hidden_dropout_p: float, seed: Tensor | None, save: bool, gather: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Activations (num_rows, I) and, if `save`, the pre-activations (num_rows, I or 2I), in row order."""
    h = empty(x, grouping.num_rows, width)
    h_pre = empty(x, grouping.num_rows if save else 0, w1.shape[1])
    hidden(x, w1, b1, h, h_pre if save else None, grouping, activation, hidden_dropout_p, seed, gather=gather)
    return h, h_pre


@recorded
def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    routing_weights: Tensor | None, activation: str, hidden_dropout_p: float, seed: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (T, H) and, if `save`, the pre-activations in row order."""
    h, h_pre = hidden_rows(x, grouping, w1, b1, w2.shape[2], activation, hidden_dropout_p, seed, save)
    return rows_times_weights(h, w2, grouping, b2, contiguous(routing_weights)), h_pre


@recorded
def backward(
    dy: Tensor, x: Tensor, h_pre: Tensor, grouping: Grouping,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, routing_weights: Tensor | None,
    activation: str, hidden_dropout_p: float, seed: Tensor | None, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dw1, db1, dw2, db2, drouting_weights], None where `needs` is false."""
    dh_pre, *weight_grads, dweights = hidden_gradients(
        dy, x, h_pre, grouping, w1, b1, w2, b2, contiguous(routing_weights), activation, hidden_dropout_p, seed,
        needs, gather=True,
    )  # fmt: skip
    dx = rows_times_weights(dh_pre, w1.transpose(1, 2), grouping) if needs[0] else None
    return [dx, *weight_grads, dweights]


def hidden_gradients(
    dy: Tensor, x: Tensor, h_pre: Tensor, grouping: Grouping,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, weights: Tensor | None,
    activation: str, hidden_dropout_p: float, seed: Tensor | None, needs: Sequence[bool],
    *, gather: bool, gather_x: bool = True, begun: Tensor | None = None,
    others: Sequence[tuple[Tensor | None, int]] = (),
) -> list[Tensor | None]:  # fmt: skip
    """[dh_pre, dw1, db1, dw2, db2, dweights]: every gradient but dx, which follows from dh_pre (num_rows, I or 2I).

    dy is (T, H), or (num_rows, H) in row order without `gather`; so is x without `gather_x`.
    An empty `h_pre` is recomputed. `begun` and `others`: see `bias_gradients`.
    """
    need_dx, need_dw1, need_db1, need_dw2, need_db2, need_dweights = needs
    need_pre = need_dx or need_dw1 or need_db1
    rows, width = grouping.num_rows, w2.shape[2]
    dh_pre = empty(dy, rows, w1.shape[1]) if need_pre else None
    a = empty(dy, rows, width) if need_dw2 else None
    parts = None
    if need_pre or need_dw2 or need_dweights:
        if h_pre.shape[0] < rows:
            h_pre = empty(x, rows, w1.shape[1])
            hidden(x, w1, b1, None, h_pre, grouping, activation, 0.0, None, gather=gather_x)
        config = hidden_backward_config(dy, w2, grouping, activation, hidden_dropout_p)
        if need_dweights:
            parts = empty(dy, rows, math.ceil(width / config.BLOCK_N), dtype=torch.float32)
        hidden_backward(
            dy, w2, h_pre, dh_pre, a, weights, parts, grouping, activation, hidden_dropout_p, seed,
            gather=gather, config=config,
        )  # fmt: skip
    dweights = None
    if parts is not None and weights is not None:
        dweights = empty(weights, grouping.num_tokens, grouping.top_k)
        routing_weights_grad(parts, dy, b2, dweights, grouping)
    pairs = []
    if need_dw1:
        pairs.append((dh_pre, x, False, gather_x))
    if need_dw2:
        pairs.append((dy, a, gather, False))
    products = iter(weight_gradients(pairs, grouping) if pairs else ())
    dw1 = next(products) if need_dw1 else None
    dw2 = next(products) if need_dw2 else None
    summands = [Summand(dh_pre)] if dh_pre is not None and need_db1 else []
    if need_db2:
        summands.append(Summand(dy, weights, gather))
    biases = iter(bias_gradients(summands, grouping, begun, others) if summands or others else ())
    db1 = next(biases) if need_db1 else None
    db2 = next(biases) if need_db2 else None
    return [dh_pre, dw1, db1, dw2, db2, dweights]


def contiguous(routing_weights: Tensor | None) -> Tensor | None:
    return None if routing_weights is None else made(Tensor.contiguous, routing_weights)
