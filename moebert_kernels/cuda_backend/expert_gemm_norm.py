"""Hopper's expert GEMM that adds a residual and normalises whole rows, held by a cluster: one launch, inference only.

What it cannot take runs as the expert GEMM and Triton's pass: see `fused_moe_ffn_add_norm`, and docs/design/0011.
"""

from __future__ import annotations

from torch import Tensor

from moebert_kernels import backend, native
from moebert_kernels.cuda_backend import expert_gemm
from moebert_kernels.cuda_backend._arguments import FLOATS, pointer, stream_of
from moebert_kernels.grouping import Grouping

LEAST_TOKENS = 8192  # fewer take longer than the GEMM and the pass, by the estimate in docs/design/0011
_BLOCK = 32  # columns that lie in one CTA's tile or in none


def applies(x: Tensor, w: Tensor) -> bool:
    """Whether x's GPU has the kernel, it can multiply by w (E, H, I) and add x (T, H), and T is enough for a gain."""
    return (
        backend.form_allowed("expert_gemm_norm")
        and x.dtype == w.dtype
        and x.shape[0] >= LEAST_TOKENS
        and w.shape[1] % _BLOCK == 0
        and backend.kernel_unavailable("expert_gemm_norm", x.device, x.dtype) is None
        and w.shape[1] <= native.module().expert_gemm_norm_max_columns
        and expert_gemm.applies(x, w)
    )


def expert_gemm_norm(
    h: Tensor, w: Tensor, x: Tensor, y: Tensor, grouping: Grouping, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    *, bias: Tensor | None = None, weights: Tensor | None = None, x_by_row: bool = False, after_previous: bool = False,
    block_n: int = 0, cluster: int = 0,
) -> None:  # fmt: skip
    """Launch: y[t] = p * LayerNorm_e(x[t] + h[r] @ w[e].T + bias[e]), r being the row of token t; x without an expert.

    Args:
        h: (T, I) in row order, contiguous, in w's dtype as everything is.
        w: (E, H, I) that `applies`.
        x: (T, H) by token, or with `x_by_row` in row order; copied if its rows are no whole pieces of 16 bytes.
        y: (T, H) contiguous, by token.
        grouping: top-1.
        norm_weight, norm_bias: (E, H).
        eps: added to the variance.
        bias: (E, H), or None.
        weights: (T, 1) or (T,) routing weights, or None.
        after_previous: it may start while the expert GEMM before it on the stream, whose output it reads, still runs.
        block_n, cluster: columns of a tile (128, 192) and CTAs that hold a row (1, 2, 4, 8); 0: chosen by H.
    """
    if y.numel() == 0:
        return
    x, bias = expert_gemm.in_pieces(x), None if bias is None else expert_gemm.aligned(bias)
    norm_weight, norm_bias = expert_gemm.aligned(norm_weight), expert_gemm.aligned(norm_bias)
    weights = None if weights is None else expert_gemm.aligned(weights)  # copies live until the launch
    num_experts, columns, depth = w.shape
    w_expert_stride, w_row_stride = expert_gemm.strides(w)
    native.module().expert_gemm_norm(
        a=h.data_ptr(),
        a_row_stride=depth,
        w=w.data_ptr(),
        w_expert_stride=w_expert_stride,
        w_row_stride=w_row_stride,
        bias=pointer(bias),
        x=x.data_ptr(),
        x_row_stride=x.stride(0),
        norm_weight=norm_weight.data_ptr(),
        norm_bias=norm_bias.data_ptr(),
        weights=pointer(weights),
        y=y.data_ptr(),
        offsets=grouping.offsets.data_ptr(),
        row_to_assignment=grouping.row_to_assignment.data_ptr(),
        rows=grouping.num_rows,
        num_experts=num_experts,
        columns=columns,
        depth=depth,
        dtype=FLOATS[w.dtype],
        eps=eps,
        x_by_row=x_by_row,
        after_previous=after_previous,
        block_n=block_n,
        cluster=cluster,
        stream=stream_of(y),
    )
