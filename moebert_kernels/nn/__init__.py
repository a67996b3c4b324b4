"""Modules that own parameters or tables: routers, experts and mixture-of-experts feed-forward layers."""

from moebert_kernels.nn.balance import BalanceWindow, balance_loss
from moebert_kernels.nn.experts import DenseExperts, Experts, MPOExperts, fold, unfold
from moebert_kernels.nn.gate_router import GateRouter
from moebert_kernels.nn.gradient_mask import GradientMask
from moebert_kernels.nn.hash_router import HashRouter
from moebert_kernels.nn.mpo_weight import MPOWeight, shared_fold
from moebert_kernels.nn.switch_router import SwitchRouter
from moebert_kernels.nn.task_router import TaskRouter
from moebert_kernels.nn.top2_router import Top2Router

__all__ = [
    "BalanceWindow",
    "DenseExperts",
    "Experts",
    "GateRouter",
    "GradientMask",
    "HashRouter",
    "MPOExperts",
    "MPOWeight",
    "SwitchRouter",
    "TaskRouter",
    "Top2Router",
    "balance_loss",
    "fold",
    "shared_fold",
    "unfold",
]
