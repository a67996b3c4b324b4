"""Mixture-of-Experts feed-forward layers that are really faster: kernels, routing, conversion and distillation.

Importing this package imports torch and nothing heavier. Modules for models of your own are in `nn`; conversion,
training and serving of transformers' models are in `layers`, `convert`, `distill` and `serve`.
"""

from moebert_kernels.grouping import Grouping
from moebert_kernels.ops.add_norm_in_order import add_norm_in_order
from moebert_kernels.ops.expert_gemm import expert_gemm
from moebert_kernels.ops.fused_moe_ffn import fused_moe_ffn
from moebert_kernels.ops.fused_moe_ffn_add_norm import fused_moe_ffn_add_norm
from moebert_kernels.ops.group_tokens import group_tokens, group_tokens_by_hash
from moebert_kernels.ops.hash_route import hash_route
from moebert_kernels.ops.mpo_expert_weights import mpo_expert_weights
from moebert_kernels.warming import warmup

__version__ = "0.1.0"  # the one place: packages, `moebert --version` and the sdist read it here

__all__ = [
    "Grouping",
    "add_norm_in_order",
    "expert_gemm",
    "fused_moe_ffn",
    "fused_moe_ffn_add_norm",
    "group_tokens",
    "group_tokens_by_hash",
    "hash_route",
    "mpo_expert_weights",
    "warmup",
]
