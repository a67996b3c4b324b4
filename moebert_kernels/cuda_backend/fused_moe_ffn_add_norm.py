"""The MoEBERT expert: the grouped GEMMs of the Triton backend, then one CUDA pass forward and one backward.

At most 512 tokens in inference are `tiny_ffn`'s: two launches for everything, also straight from expert ids.

Experts wider than `_C.max_norm_columns` run as in the Triton backend: rows would not fit a block's registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from moebert_kernels import dropout, native
from moebert_kernels.cuda_backend import tiny_ffn
from moebert_kernels.cuda_backend._arguments import FLOATS, pointer, stream_of
from moebert_kernels.grouping import Grouping
from moebert_kernels.triton_backend import fused_moe_ffn_add_norm as in_triton
from moebert_kernels.triton_backend.fused_moe_ffn import contiguous


def _inputs(
    kernels: ModuleType, x: Tensor, ffn: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: Tensor | None,
    grouping: Grouping, eps: float, dropout_p: float, seed: Tensor | None,
):  # fmt: skip
    """What both directions read. Norms and weights have the dtype of x: the op sees to it."""
    (tokens, columns), drops = x.shape, dropout_p > 0 and seed is not None
    return kernels.AddNormInputs(
        x.data_ptr(), *x.stride(), ffn.data_ptr(),
        norm_weight.data_ptr(), *norm_weight.stride(), norm_bias.data_ptr(), *norm_bias.stride(),
        pointer(weights), pointer(seed) if drops else 0, grouping.offsets.data_ptr(),
        tokens, columns, grouping.num_experts, eps, dropout.threshold(dropout_p), dropout.scale(dropout_p),
        FLOATS[x.dtype], FLOATS[ffn.dtype],
    )  # fmt: skip


def forward(
    x: Tensor, grouping: Grouping, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, routing_weights: Tensor | None, eps: float, activation: str,
    dropout_p: float, hidden_dropout_p: float, seed: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (T, H) in x's dtype and, if `save`, the pre-activations and the feed-forward's outputs, both in row order."""
    drops = seed is not None and (dropout_p > 0 or hidden_dropout_p > 0)
    if not save and not drops and tiny_ffn.applies(x, grouping.top_k, w1):
        y = tiny_ffn.add_norm(
            x, grouping, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation
        )  # fmt: skip
        return y, w1.new_empty(0, w1.shape[1]), w1.new_empty(0, x.shape[1])
    kernels = native.module()
    if x.shape[1] > kernels.max_norm_columns:
        return in_triton.forward(
            x, grouping, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation,
            dropout_p, hidden_dropout_p, seed, save,
        )  # fmt: skip
    ffn, h_pre = in_triton.ffn_rows(x, grouping, w1, b1, w2, b2, activation, hidden_dropout_p, seed, save)
    y = x.new_empty(x.shape)
    weights = contiguous(routing_weights)
    inputs = _inputs(kernels, x, ffn, norm_weight, norm_bias, weights, grouping, eps, dropout_p, seed)
    kernels.add_norm(inputs, grouping.assignment_to_row.data_ptr(), y.data_ptr(), stream_of(x))
    return y, h_pre, ffn if save else ffn.new_empty(0, ffn.shape[1])


def from_ids(
    x: Tensor, ids: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, routing_weights: Tensor | None, eps: float, activation: str,
) -> Tensor | None:  # fmt: skip
    """y (T, H) of expert ids (T, 1) that nobody grouped; None where a Grouping is needed."""
    if not tiny_ffn.applies(x, ids.shape[1], w1):
        return None
    return tiny_ffn.add_norm(x, ids, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation)


def backward(
    dy: Tensor, x: Tensor, h_pre: Tensor, ffn: Tensor, grouping: Grouping,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    routing_weights: Tensor | None, eps: float, activation: str, dropout_p: float, hidden_dropout_p: float,
    seed: Tensor | None, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, drouting_weights], None where `needs` is false."""
    kernels = native.module()
    if x.shape[1] > kernels.max_norm_columns:
        return in_triton.backward(
            dy, x, h_pre, ffn, grouping, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights, eps, activation,
            dropout_p, hidden_dropout_p, seed, needs,
        )  # fmt: skip
    need_dnorm_weight, need_dnorm_bias, need_dweights = needs[5:]
    rows, columns = grouping.num_rows, x.shape[1]
    if ffn.shape[0] < rows:
        ffn, h_pre = in_triton.ffn_rows(x, grouping, w1, b1, w2, b2, activation, hidden_dropout_p, seed, save=True)
    dz = x.new_empty(rows, columns)
    apart = (dropout_p > 0 and seed is not None) or x.dtype != w1.dtype
    dffn = w1.new_empty(rows, columns) if apart else dz
    partials = x.new_empty(2, kernels.norm_chunks(rows, grouping.num_experts), columns, dtype=torch.float32)
    dnorm_weight = x.new_empty(norm_weight.shape) if need_dnorm_weight else None
    dnorm_bias = x.new_empty(norm_bias.shape) if need_dnorm_bias else None
    dweights = x.new_zeros(grouping.num_tokens, 1) if need_dweights else None
    weights = contiguous(routing_weights)
    inputs = _inputs(kernels, x, ffn, norm_weight, norm_bias, weights, grouping, eps, dropout_p, seed)
    kernels.add_norm_backward(
        inputs, dy.data_ptr(), *dy.stride(), grouping.row_to_assignment.data_ptr(),
        dz.data_ptr(), dffn.data_ptr() if apart else 0, partials[0].data_ptr(), partials[1].data_ptr(),
        pointer(dnorm_weight), pointer(dnorm_bias), pointer(dweights), stream_of(x),
    )  # fmt: skip
    grads = in_triton.ffn_gradients(
        dffn, dz, dy, x, h_pre, grouping, w1, b1, w2, b2, activation, hidden_dropout_p, seed, needs[:5]
    )  # fmt: skip
    return [*grads, dnorm_weight, dnorm_bias, dweights]
