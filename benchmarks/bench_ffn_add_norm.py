"""The whole MoEBERT expert (feed-forward, residual, an expert's own LayerNorm), forward and with backward.

And the LayerNorm before it, by torch or as rows in the order of the experts, which the expert then reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import Draws
from benchmarks.layers import BERT_BASE, SMOKE, compiled, layer_case, runner
from benchmarks.measuring import Case, Outputs, Provider, Target
from benchmarks.model import op_cost
from moebert_kernels import add_norm_in_order, fused_moe_ffn_add_norm, group_tokens, reference

FORWARD = {"cpu": (64, 256, 1024), "cuda": (16384, 4096, 65536, 1024, 256)}
BACKWARD = {"cpu": (16, 128, 1024), "cuda": (16384, 4096, 65536, 1024)}
PROVIDERS = ("moebert_kernels", "dense", "ideal", "original")
ON_GPU = ("moebert_kernels_cuda",)
IN_ORDER = "moebert_kernels_in_order"
IN_ORDER_TOKENS = {"forward": (16384, 4096, 65536, 1024), "forward_backward": (16384, 4096)}  # of a GPU


def cases(target: Target) -> list[Case]:
    on_gpu = target.on_gpu and not target.smoke
    found = [
        layer_case(
            "fused_moe_ffn_add_norm", direction, T, target, PROVIDERS + ON_GPU + compiled(T) if on_gpu else PROVIDERS
        )
        for direction, tokens in (("forward", FORWARD), ("forward_backward", BACKWARD))
        for T in ((20,) if target.smoke else tokens[target.device.type])
    ]
    if target.on_gpu or target.smoke:
        found += [
            _two_norms(direction, T, target)
            for direction, tokens in IN_ORDER_TOKENS.items()
            for T in ((20,) if target.smoke else tokens)
        ]
    return found


def _two_norms(direction: str, T: int, target: Target) -> Case:
    shape = {size: (SMOKE if target.smoke else BERT_BASE)[size] for size in "HIE"}
    costs = [op_cost(op, direction, T=T, dtype=target.dtype, **shape)
             for op in ("add_norm_in_order", "fused_moe_ffn_add_norm")]  # fmt: skip
    return Case(
        name=f"add_norm_in_order-{direction}-T{T}",
        parameters={"op": "add_norm_in_order", "direction": direction, "dtype": target.dtype_name, "T": T, **shape},
        providers=("moebert_kernels", IN_ORDER),
        build=lambda: _both_orders(direction, T, target, **shape),
        baseline="moebert_kernels",
        cost=costs[0] + costs[1],
    )


def _both_orders(direction: str, T: int, target: Target, *, H: int, I: int, E: int) -> dict[str, Provider]:
    draws = Draws(target)
    ids = draws.expert_ids(T, E)
    grouping = group_tokens(ids, E)
    residual, dy = draws.normal(T, H), draws.normal(T, H)
    weights = [draws.normal(T, H), *draws.norm_weights(H=H), *draws.ffn_weights(E, H=H, width=I)]
    weights += draws.norm_weights(E, H=H)

    def by_token(residual: Tensor, added: Tensor, weight: Tensor, bias: Tensor, *experts: Tensor) -> Tensor:
        return fused_moe_ffn_add_norm(F.layer_norm(residual + added, (H,), weight, bias, 1e-12), grouping, *experts)

    def in_order(residual: Tensor, added: Tensor, weight: Tensor, bias: Tensor, *experts: Tensor) -> Tensor:
        rows = add_norm_in_order(residual, added, weight, bias, grouping)
        return fused_moe_ffn_add_norm(rows, grouping, *experts, in_order=True)

    def naive(residual: Tensor, added: Tensor, weight: Tensor, bias: Tensor, *experts: Tensor) -> Tensor:
        x = F.layer_norm(residual + added, (H,), weight, bias, 1e-12)
        return reference.fused_moe_ffn_add_norm(x, ids, *experts)

    def exact(dtype: torch.dtype) -> Outputs:
        return runner(naive, residual.to(dtype), [w.to(dtype) for w in weights], dy.to(dtype), direction)()

    def provider(layer: Callable[..., Tensor]) -> Provider:
        return Provider(runner(layer, residual, weights, dy, direction), exact)

    return {"moebert_kernels": provider(by_token), IN_ORDER: provider(in_order)}


def test_ffn_add_norm(case, provider, run_provider):
    run_provider(case, provider)
