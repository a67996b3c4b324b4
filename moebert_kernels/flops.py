"""The FLOPs of the ops, for torch's `FlopCounterMode`: importing this module registers them, as `layers` does.

Counted are the matrix products of all rows. Rows of skipped assignments, whose number only the device knows, count too.
`mpo_expert_weights`, which makes weights once for a call, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]
_OPS: Any = torch.ops.moebert_kernels


def _product(rows: int, weight: Shape) -> int:
    """Of rows and a weight (E, N, K), one expert for each row."""
    return 2 * rows * math.prod(weight[1:])


@register_flop_formula(_OPS.expert_gemm)
def expert_gemm(x: Shape, w: Shape, bias: Any, offsets: Shape, rows: Shape, *_: Any, **__: Any) -> int:
    return _product(rows[0], w)


@register_flop_formula(_OPS.expert_gemm_backward)
def expert_gemm_backward(
    dy: Shape, x: Shape, w: Shape, bias: Any, offsets: Shape, rows: Shape, *rest: Any, **_: Any
) -> int:
    needs: list[bool] = rest[-1]
    return sum(needs[:2]) * _product(rows[0], w)


def _forward(w1: Shape, w2: Shape, rows: Shape) -> int:
    return _product(rows[0], w1) + _product(rows[0], w2)


def _backward(w1: Shape, w2: Shape, rows: Shape, needs: Sequence[bool], through: bool) -> int:
    """`through`: whether the gradient of the activations is wanted."""
    need_dx, need_dw1, _need_db1, need_dw2 = needs[:4]
    return (need_dx + need_dw1) * _product(rows[0], w1) + (through + need_dw2) * _product(rows[0], w2)


@register_flop_formula(_OPS.fused_moe_ffn)
def fused_moe_ffn(
    x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, p: Any, offsets: Shape, rows: Shape, *_: Any, **__: Any
) -> int:
    return _forward(w1, w2, rows)


@register_flop_formula(_OPS.fused_moe_ffn_backward)
def fused_moe_ffn_backward(
    dy: Shape, x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, p: Any, offsets: Shape, rows: Shape,
    tokens: Shape, seed: Any, h_pre: Shape, *rest: Any, **_: Any,
) -> int:  # fmt: skip
    needs = rest[-1]
    through = any(needs[:3]) or needs[5]
    recomputed = _product(rows[0], w1) if h_pre[0] < rows[0] and (through or needs[3]) else 0
    return _backward(w1, w2, rows, needs, through) + recomputed


@register_flop_formula(_OPS.fused_moe_ffn_add_norm)
def fused_moe_ffn_add_norm(
    x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, norm_weight: Shape, norm_bias: Shape, p: Any,
    offsets: Shape, rows: Shape, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _forward(w1, w2, rows)


@register_flop_formula(_OPS.fused_moe_ffn_add_norm_backward)
def fused_moe_ffn_add_norm_backward(
    dy: Shape, x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, norm_weight: Shape, norm_bias: Shape, p: Any,
    offsets: Shape, rows: Shape, tokens: Shape, seed: Any, h_pre: Shape, *rest: Any, **_: Any,
) -> int:  # fmt: skip
    needs = rest[-1]
    recomputed = _forward(w1, w2, rows) if h_pre[0] < rows[0] else 0
    return _backward(w1, w2, rows, needs, any(needs[:3])) + recomputed
