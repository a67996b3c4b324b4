"""Which parameters an optimizer decays, and which have settings of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from moebert_kernels.errors import UserError

# Experts' biases and norms are stacked in one (E, I) or (E, H) parameter; a task router's logits are a bias too.
_UNDECAYED = ("bias", "b1", "b2", "norm_weight", "norm_bias", "logits")


def decayed(names: Iterable[str]) -> list[str]:
    """Of the names of parameters that `Trainer` decays those that are."""
    return [name for name in names if name.rpartition(".")[2] not in _UNDECAYED]


def add_groups(optimizer: Any, model: nn.Module, maps: nn.Module | None, args: Any) -> None:
    """Give the routers of `model` their learning rate, if they have one, at their decay, and train `maps` as well.

    Raises:
        UserError: a learning rate for the routers of a model without trained ones.
    """
    if args.router_learning_rate is not None:
        routers = {
            id(p) for m in model.modules() if type(m).__name__.endswith("Router")
            for p in m.parameters() if p.requires_grad
        }  # fmt: skip
        if not routers:
            raise UserError("router_learning_rate: expected a model with trained routers, got one without")
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in routers]
            group["params"] = [p for p in group["params"] if id(p) not in routers]
            if moved:
                decay = group["weight_decay"]
                optimizer.add_param_group({"params": moved, "weight_decay": decay, "lr": args.router_learning_rate})
    if maps is not None:
        optimizer.add_param_group({"params": list(maps.parameters()), "weight_decay": args.weight_decay})
