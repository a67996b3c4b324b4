"""Ours against other packages, each on the nearest layer that it computes: top-1, H = I = 768, 4 experts.

Three layers: MoEBERT's own (GELU, biases), the same without biases, and a gated one (SwiGLU, no biases).
"""

from __future__ import annotations

from benchmarks import peers
from benchmarks.layers import BERT_BASE, SMOKE
from benchmarks.measuring import Case, Requirement, Target
from benchmarks.model import op_cost

CPU_CASES = [("forward", 128), ("forward_backward", 128)]
GPU_CASES = [("forward", 4096), ("forward_backward", 4096), ("forward", 16384), ("forward_backward", 16384)]
AT_LEAST = 1.2  # times each installed peer, on an H200


def cases(target: Target) -> list[Case]:
    directions = [("forward", 16), ("forward_backward", 16)] if target.smoke else None
    return [
        _case(kind, direction, T, target)
        for direction, T in directions or (GPU_CASES if target.on_gpu else CPU_CASES)
        for kind in peers.KINDS
    ]


def _case(kind: str, direction: str, T: int, target: Target) -> Case:
    shape = {size: (SMOKE if target.smoke else BERT_BASE)[size] for size in "HIE"}
    return Case(
        name=f"peers-{kind}-{direction}-T{T}",
        parameters={"op": "fused_moe_ffn", "layer": kind, "direction": direction, "dtype": target.dtype_name, "T": T,
                    **shape},
        providers=("moebert_kernels", *peers.PEERS),
        build=lambda: peers.build(peers.PeerLayer(kind, T, target, **shape), direction),
        baseline="moebert_kernels",
        requires=[Requirement("moebert_kernels", name, AT_LEAST) for name in peers.PEERS] if target.on_gpu else (),
        cost=op_cost("fused_moe_ffn", direction, T=T, dtype=target.dtype, gated=kind == "swiglu", **shape),
    )  # fmt: skip
