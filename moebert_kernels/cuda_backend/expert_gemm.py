"""Grouped GEMM on Hopper's tensor cores, fed by TMA: one launch forward; backward is Triton's.

It takes float16 and bfloat16 with sizes and strides of whole 16-byte pieces, which TMA copies. What it cannot take runs
in Triton: float32, transposed weights, odd widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels import backend, native
from moebert_kernels.cuda_backend._arguments import ACTIVATIONS, FLOATS, pointer, stream_of
from moebert_kernels.grouping import Grouping
from moebert_kernels.triton_backend import expert_gemm as in_triton
from moebert_kernels.triton_backend.expert_gemm import backward

__all__ = ["applies", "backward", "expert_gemm", "forward"]

_PIECE, _ALIGNMENT = 8, 16  # elements and bytes of what a copy moves at least


def applies(x: Tensor, *weights: Tensor) -> bool:
    """Whether x's GPU has the kernel and it can multiply by each w (E, N, K); rows of any strides are made to fit."""
    return all(map(_fits, weights)) and backend.kernel_unavailable("expert_gemm", x.device, x.dtype) is None


def expert_gemm(
    a: Tensor, w: Tensor, y: Tensor, grouping: Grouping, *, bias: Tensor | None = None, weights: Tensor | None = None,
    activation: str = "identity", pre: Tensor | None = None, gather: bool = False, scatter: bool = False,
    after_previous: bool = False, block_n: int = 0, cluster: int = 0,
) -> None:  # fmt: skip
    """Launch: y = act(a @ w[e].T + bias[e]), times the routing weight; zeros for rows without an expert.

    Args:
        a: (rows, K) in row order, or (T, K) with `gather`; copied if its rows are no whole pieces.
        w: (E, N, K) that `applies`.
        y: (rows, N) contiguous; in row order, or with `scatter` in assignment order.
        bias: (E, N), or None.
        weights: (T, top_k) contiguous routing weights, or None.
        activation: neither a gated one nor relu2.
        pre: as y, receives what the activation is taken of; or None.
        after_previous: it may start while the expert GEMM before it on the stream, whose output it reads, still runs.
        block_n, cluster: columns of a tile (128, 192, 256) and CTAs that share weights (1, 2); 0: chosen by the sizes.
    """
    if y.numel() == 0:
        return
    a, bias = in_pieces(a), None if bias is None else aligned(bias)
    num_experts, columns, depth = w.shape
    w_expert_stride, w_row_stride = strides(w)
    native.module().expert_gemm(
        a=a.data_ptr(),
        a_row_stride=a.stride(0),
        w=w.data_ptr(),
        w_expert_stride=w_expert_stride,
        w_row_stride=w_row_stride,
        y=y.data_ptr(),
        pre=pointer(pre),
        bias=pointer(bias),
        weights=pointer(weights),
        offsets=grouping.offsets.data_ptr(),
        row_to_assignment=grouping.row_to_assignment.data_ptr(),
        rows=grouping.num_rows,
        num_experts=num_experts,
        columns=columns,
        depth=depth,
        top_k=grouping.top_k,
        dtype=FLOATS[w.dtype],
        activation=ACTIVATIONS[activation],
        gather=gather,
        scatter=scatter,
        after_previous=after_previous,
        block_n=block_n,
        cluster=cluster,
        stream=stream_of(y),
    )


def forward(x: Tensor, w: Tensor, bias: Tensor | None, grouping: Grouping, gather: bool) -> Tensor:
    """Rows (num_rows, N); zero past the routed ones."""
    if not applies(x, w):
        return in_triton.forward(x, w, bias, grouping, gather)
    y = x.new_empty(grouping.num_rows, w.shape[1])
    expert_gemm(x, w, y, grouping, bias=bias, gather=gather)
    return y


def in_pieces(rows: Tensor) -> Tensor:
    """(rows, K) whose rows begin at whole pieces: a copy where they do not."""
    whole = rows.stride(1) == 1 and rows.stride(0) % _PIECE == 0 and rows.stride(0) >= rows.shape[1]
    return rows if whole and rows.data_ptr() % _ALIGNMENT == 0 else rows.clone(memory_format=torch.contiguous_format)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and aligned: a copy where it is not."""
    whole = tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _fits(w: Tensor) -> bool:
    return (
        w.dtype in (torch.float16, torch.bfloat16)
        and w.stride(2) == 1
        and w.data_ptr() % _ALIGNMENT == 0
        and all(count > 0 and count % _PIECE == 0 for count in (*w.shape[1:], *strides(w)))
    )


def strides(w: Tensor) -> tuple[int, int]:
    """Of experts and rows; that of a single one means nothing, and torch may say anything."""
    num_experts, columns, depth = w.shape
    row = w.stride(1) if columns > 1 else depth
    return w.stride(0) if num_experts > 1 else columns * row, row
