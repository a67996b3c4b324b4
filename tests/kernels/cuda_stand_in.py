"""The expert GEMMs of `moebert_kernels._C` in plain torch, which read the same pointers."""

import ctypes

import torch

from moebert_kernels import reference
from moebert_kernels.activation import UNGATED

DTYPES = (None, torch.float16, torch.bfloat16)


def view(pointer, dtype, shape, strides=None):
    """The memory at a pointer, as the kernel would address it."""
    if pointer == 0:
        return None
    strides = strides or (shape[-1], 1)[-len(shape) :]
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


class StandIn:
    """`_C.expert_gemm` and `_C.expert_gemm_norm` in plain torch, on the CPU."""

    expert_gemm_norm_max_columns = 1024

    def __init__(self):
        self.calls = []  # of each whether it may start beside the one before it
        self.normed = []  # of each that normalises whether x is in row order

    def expert_gemm(
        self, *, a, a_row_stride, w, w_expert_stride, w_row_stride, y, pre, bias, weights, offsets, row_to_assignment,
        rows, num_experts, columns, depth, top_k, dtype, activation, gather, scatter, after_previous, block_n, cluster,
        stream,
    ):  # fmt: skip
        self.calls.append(after_previous)
        dtype = DTYPES[dtype]
        a = view(a, dtype, (rows // top_k if gather else rows, depth), (a_row_stride, 1))
        w = view(w, dtype, (num_experts, columns, depth), (w_expert_stride, w_row_stride, 1))
        y, pre = (view(pointer, dtype, (rows, columns)) for pointer in (y, pre))
        bias, weights = view(bias, dtype, (num_experts, columns)), view(weights, dtype, (rows,))
        offsets = view(offsets, torch.int32, (num_experts + 1,)).tolist()
        assignment = view(row_to_assignment, torch.int32, (rows,)).long()
        for e in range(num_experts + 1):
            row = torch.arange(offsets[e], offsets[e + 1] if e < num_experts else rows)
            to = assignment[row] if scatter else row
            if e == num_experts:
                for out in (y, pre):
                    if out is not None:
                        out[to] = 0
                continue
            h = a[assignment[row] // top_k if gather else row].double() @ w[e].double().T
            h = h if bias is None else h + bias[e].double()
            if pre is not None:
                pre[to] = h.to(dtype)
            h = reference.activate(h, UNGATED[activation])
            y[to] = (h if weights is None else h * weights[assignment[row]].double()[:, None]).to(dtype)

    def expert_gemm_norm(
        self, *, a, a_row_stride, w, w_expert_stride, w_row_stride, bias, x, x_row_stride, norm_weight, norm_bias,
        weights, y, offsets, row_to_assignment, rows, num_experts, columns, depth, dtype, eps, x_by_row, after_previous,
        block_n, cluster, stream,
    ):  # fmt: skip
        self.calls.append(after_previous)
        self.normed.append(x_by_row)
        dtype = DTYPES[dtype]
        a, x = view(a, dtype, (rows, depth), (a_row_stride, 1)), view(x, dtype, (rows, columns), (x_row_stride, 1))
        w = view(w, dtype, (num_experts, columns, depth), (w_expert_stride, w_row_stride, 1))
        y, weights = view(y, dtype, (rows, columns)), view(weights, dtype, (rows,))
        bias, norm_weight, norm_bias = (
            view(pointer, dtype, (num_experts, columns)) for pointer in (bias, norm_weight, norm_bias)
        )
        offsets = view(offsets, torch.int32, (num_experts + 1,)).tolist()
        token = view(row_to_assignment, torch.int32, (rows,)).long()
        for e in range(num_experts + 1):
            row = torch.arange(offsets[e], offsets[e + 1] if e < num_experts else rows)
            residual = x[row if x_by_row else token[row]]
            if e == num_experts:
                y[token[row]] = residual
                continue
            z = a[row].double() @ w[e].double().T + residual.double() + (0 if bias is None else bias[e].double())
            p = 1 if weights is None else weights[token[row]].double()[:, None]
            normed = torch.nn.functional.layer_norm(z, z.shape[1:], norm_weight[e].double(), norm_bias[e].double(), eps)
            y[token[row]] = (p * normed).to(dtype)
