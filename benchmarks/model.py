"""What an op must compute and move: the floor under any implementation.

FLOPs are those of the matrix products, 2 M N K each, as torch's `FlopCounterMode` counts them. Bytes are those of the
launches of ARCHITECTURE.md ("The idea that makes it fast"): each reads its operands once and writes its results once,
caches cannot help it, and nothing else is moved. Left out: the maps of a `Grouping` (4 bytes a row, against 2 H or
more), and what a backward pass keeps in partial sums. A weight is read if a token meets it: with routing at random,

    experts touched = E (1 - (1 - top_k / E)^T)

so few tokens read few experts. The gradient of a weight is written for all experts, zeros included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from moebert_kernels.nn.hash_router import table_dtype

DIRECTIONS = ("forward", "forward_backward")
ID_BYTES, MAP_BYTES = 8, 4  # token ids and masks are int64; expert ids, offsets and maps int32


@dataclass(frozen=True)
class Cost:
    """FLOPs of matrix products, and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)

    def compute_ms(self, tflops: float) -> float:
        return self.flops / (tflops * 1e9)

    def memory_ms(self, gbytes_per_s: float) -> float:
        return self.bytes / (gbytes_per_s * 1e6)

    def roof_ms(self, tflops: float, gbytes_per_s: float) -> float:
        """The time below which no implementation on such a machine can be: all else hides behind the longer of both."""
        return max(self.compute_ms(tflops), self.memory_ms(gbytes_per_s))

    def bound_by(self, tflops: float, gbytes_per_s: float) -> Literal["compute", "memory"]:
        return "compute" if self.compute_ms(tflops) >= self.memory_ms(gbytes_per_s) else "memory"


def experts_touched(T: float, E: int, top_k: int = 1) -> float:
    """Expected number of experts that get a token when each of T tokens goes to `top_k` of E at random."""
    return E * (1 - (1 - top_k / E) ** T)


def op_cost(
    op: str, direction: str, *, T: int, E: int, H: int = 0, I: int = 0, dtype: str | torch.dtype = "float32",
    top_k: int = 1, gated: bool = False, L: int = 1, V: int = 30522, masked: bool = False,
) -> Cost:  # fmt: skip
    """The cost of an op of the package, with biases, all weights trained and no dropout.

    Args:
        op: a name of `OPS`. With E = 1, the two feed-forwards are a dense layer of width I.
        direction: "forward", or "forward_backward" for both, as in training: what backward needs is written as well.
        T: tokens.
        E: experts.
        H, I: hidden size and neurons of an expert. For `expert_gemm`, K and N of w (E, N, K).
        dtype: of everything that is neither an id nor a map.
        top_k: experts per token; `expert_gemm` has T * top_k rows.
        gated: w1 has 2 I rows.
        L, V: layers whose tables are looked up, entries of a table. Routing ops only.
        masked: an attention mask is read. Routing ops only.

    Raises:
        ValueError: an unknown op or direction, a backward of a routing op, a size below 0, E or top_k below 1, or
            top_k above E.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op}")
    if direction not in DIRECTIONS or (op in ROUTING and direction != "forward"):
        wanted = "forward" if op in ROUTING else " or ".join(DIRECTIONS)
        raise ValueError(f"direction: expected {wanted}, got {direction}")
    for name, size, least in (("T", T, 0), ("E", E, 1), ("H", H, 0), ("I", I, 0), ("L", L, 1), ("V", V, 0)):
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k: expected 1 to E = {E}, got {top_k}")
    training = direction == "forward_backward"
    if op in ROUTING:
        return _routing(op, T, E, top_k, L, V, masked)
    size = item_bytes(dtype)
    if op == "add_norm_in_order":  # residual and added read, rows written; backward reads rows' gradient too
        return Cost(0, size * H * (3 * T + 2 + (4 * T + 3 if training else 0)))
    if op == "expert_gemm":
        return _linear(T * top_k, H, I, E, experts_touched(T, E, top_k), size, training)
    return _feed_forward(op, T, E, H, I, size, top_k, 2 if gated else 1, training)


ROUTING = ("hash_route", "group_tokens", "group_tokens_by_hash")
OPS = (*ROUTING, "expert_gemm", "fused_moe_ffn", "fused_moe_ffn_add_norm", "add_norm_in_order")


def item_bytes(dtype: str | torch.dtype) -> int:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: expected a torch dtype or its name, got {dtype}")
    return found.itemsize


def _routing(op: str, T: int, E: int, top_k: int, L: int, V: int, masked: bool) -> Cost:
    lookup = T * ID_BYTES * (2 if masked else 1) + L * min(T, V) * table_dtype(E).itemsize
    expert_ids = T * top_k * MAP_BYTES
    grouping = 2 * T * top_k * MAP_BYTES + (E + 1) * MAP_BYTES
    moved = {
        "hash_route": lookup + L * expert_ids,
        "group_tokens": expert_ids + grouping,
        "group_tokens_by_hash": lookup + L * grouping,
    }
    return Cost(0, moved[op])


def _linear(rows: float, depth: int, columns: int, E: int, touched: float, size: int, training: bool) -> Cost:
    """Rows times (E, columns, depth) weights, with a bias."""
    product = 2 * rows * depth * columns
    x, y, w = rows * depth, rows * columns, depth * columns
    forward = Cost(product, size * (x + touched * (w + columns) + y))
    if not training:
        return forward
    dx = Cost(product, size * (y + touched * w + x))
    dw = Cost(product, size * (y + x + E * (w + columns)))
    return forward + dx + dw


def _feed_forward(op: str, T: int, E: int, H: int, I: int, size: int, top_k: int, gates: int, training: bool) -> Cost:
    """Launch by launch, as `moebert_kernels/triton_backend/fused_moe_ffn.py` and its neighbour make them."""
    rows, touched = T * top_k, experts_touched(T, E, top_k)
    W = gates * I  # columns of w1
    w1, w2, b1, b2 = W * H, H * I, W, H
    add_norm = op == "fused_moe_ffn_add_norm"
    up = T * H + touched * (w1 + b1) + rows * I + (rows * W if training else 0)  # reads x, writes h, keeps h_pre
    down = rows * I + touched * (w2 + b2) + rows * H
    summed = 0 if top_k == 1 else rows * H + T * H  # one assignment per token is scattered by the GEMM itself
    last = 3 * T * H + touched * 2 * H if add_norm else summed  # x, the outputs and the norm, y
    forward = Cost(2 * rows * (w1 + w2), size * (up + down + last))
    if not training:
        return forward
    dy_rows = rows if add_norm else T  # dy is read by token, or by row after the norm's backward
    norm = 4 * T * H + touched * H + 2 * E * H if add_norm else 0  # dy, x, outputs -> dz; weight; its two gradients
    dh = dy_rows * H + touched * w2 + rows * W + rows * W + rows * I  # dy, w2, h_pre -> dh_pre and h again
    dw2 = dy_rows * H + rows * I + E * (w2 + b2)
    dw1 = rows * W + T * H + E * (w1 + b1)
    dx = rows * W + touched * w1 + rows * H
    dx += T * H if add_norm else summed  # the residual's dz
    return forward + Cost(4 * rows * (w1 + w2), size * (norm + dh + dw2 + dw1 + dx))


def encoder_cost(
    direction: str, *, L: int, H: int, B: int, S: int, E: int, I: int, dtype: str | torch.dtype,
    routed_tokens: int | None = None,
) -> Cost:  # fmt: skip
    """The cost of L layers of hidden size H on B sequences of S tokens; embeddings and heads are left out.

    Attention computes all B S tokens, padded ones too, and never writes its scores (as flash attention). Experts
    compute `routed_tokens`, all of them by default; with E = 1 they are the dense layer of width I. Residual, norm and
    bias of attention are one pass.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected {' or '.join(DIRECTIONS)}, got {direction}")
    training, size, T = direction == "forward_backward", item_bytes(dtype), B * S
    routed = T if routed_tokens is None else routed_tokens
    if not 0 <= routed <= T:
        raise ValueError(f"routed_tokens: expected 0 to B S = {T}, got {routed_tokens}")
    projections = _linear(T, H, 3 * H, 1, 1, size, training) + _linear(T, H, H, 1, 1, size, training)
    # scores and their product with the values: q, k, v read, o written; backward has four products more, reads
    # q, k, v, o, do and writes dq, dk, dv
    scores = Cost(4 * B * S * S * H * (3 if training else 1), size * T * H * (4 + (8 if training else 0)))
    # x and the projection read, y written; backward reads dy and y and writes one gradient for both
    norm = Cost(0, size * (T * H * (3 + (3 if training else 0)) + 2 * H * (2 if training else 1)))
    experts = op_cost("fused_moe_ffn_add_norm", direction, T=routed, E=E, H=H, I=I, dtype=dtype)
    return (projections + scores + norm + experts) * L
