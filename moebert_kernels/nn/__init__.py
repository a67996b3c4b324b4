"""Modules that own parameters or tables: routers and the mixture-of-experts feed-forward layer."""

from moebert_kernels.nn.gate_router import GateRouter, balance_loss
from moebert_kernels.nn.hash_router import HashRouter
from moebert_kernels.nn.moe_feed_forward import MoEFeedForward
from moebert_kernels.nn.task_router import TaskRouter

__all__ = ["GateRouter", "HashRouter", "MoEFeedForward", "TaskRouter", "balance_loss"]
