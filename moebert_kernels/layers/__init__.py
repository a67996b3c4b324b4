"""Mixtures of experts that replace feed-forwards: their configuration, the layer, and how tokens reach it."""

# ruff: noqa: E402  what is missing is named before the imports that need it
from moebert_kernels.errors import require_extra

require_extra("train", "transformers")

import moebert_kernels.flops  # noqa: F401  so that torch counts the FLOPs of converted models
from moebert_kernels.layers.config import MoEConfig, moe_config
from moebert_kernels.layers.expert_order import set_expert_order
from moebert_kernels.layers.feed_forward import MoEFeedForward, NormedExperts
from moebert_kernels.layers.routing import balance_losses, moe_layers, summed_losses
from moebert_kernels.layers.tasks import get_task, set_task

__all__ = [
    "MoEConfig",
    "MoEFeedForward",
    "NormedExperts",
    "balance_losses",
    "get_task",
    "moe_config",
    "moe_layers",
    "set_expert_order",
    "set_task",
    "summed_losses",
]
