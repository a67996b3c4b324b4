"""What `MoETrainer` refuses of its arguments."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moebert_kernels.distill.arguments import MoETrainingArguments
from moebert_kernels.distill.objectives import BY_SEQUENCE, Objective
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config, moe_layers
from moebert_kernels.nn import MPOWeight

_FEW_BITS = (torch.bfloat16, torch.float16)


def check_given(model: Any, args: Any, options: Mapping[str, Any]) -> None:
    """Raise UserError for what transformers' `Trainer` takes and this one does not."""
    if model is None:
        raise UserError("model: expected a model, got None (a search over settings makes a trainer for each)")
    if not isinstance(args, MoETrainingArguments):
        raise UserError(f"args: expected MoETrainingArguments, got {type(args).__name__}")
    if options.get("compute_loss_func") is not None:
        raise UserError("compute_loss_func: expected None, as the loss is a sum of terms (objective=), got a function")


def check_experts(model: nn.Module, args: MoETrainingArguments, fsdp: bool) -> None:
    """Raise UserError for settings of experts that the model does not have, or that FSDP cannot follow.

    For a model, too, whose configuration says experts and which has none.
    """
    if moe_config(getattr(model, "config", None)) is not None and not moe_layers(model):
        raise UserError(
            f"model: expected experts, as its configuration says, got a dense {type(model).__name__}"
            " (from_config makes it dense; from_pretrained loads the experts)"
        )
    if args.shared_fold and not any(isinstance(module, MPOWeight) for module in model.modules()):
        raise UserError(f"shared_fold: expected False for a model that folds no weights, got a {type(model).__name__}")
    if fsdp and (args.shared_fold or args.gradient_mask is not None):
        raise UserError("fsdp: expected no shared_fold and no gradient_mask, which look at whole weights, got one")


def warn_of_few_bits(model: nn.Module) -> None:
    """Of weights that are to be trained and that most steps would leave as they are."""
    few = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype in _FEW_BITS]
    if few:
        warnings.warn(
            f"model: {len(few)} parameters, as {few[0]}, are trained in {model.get_parameter(few[0]).dtype}, which"
            " rounds away most steps of usual learning rates; load it with dtype=torch.float32, and pass bf16=True",
            stacklevel=3,
        )


def check_smoothing(model: nn.Module, args: MoETrainingArguments) -> None:
    """Raise UserError for the smoothing of labels, which are not by token, of a model whose class says so."""
    name = type(model).__name__
    if args.label_smoothing_factor and name.endswith(BY_SEQUENCE):
        raise UserError(
            f"label_smoothing_factor: expected 0 for a model without labels by token, a {name}, got"
            f" {args.label_smoothing_factor}"
        )


def find_unused(args: MoETrainingArguments) -> None:
    """Let DDP look for parameters without a gradient, such as an encoder's pooler, where layers are recomputed, too.

    transformers turns this off there, as reentrant checkpointing needs.
    """
    if args.ddp_find_unused_parameters is None and args.gradient_checkpointing and not is_reentrant(args):
        args.ddp_find_unused_parameters = True


def is_reentrant(args: MoETrainingArguments) -> bool:
    """Whether layers are recomputed by torch's reentrant checkpointing."""
    options: Any = args.gradient_checkpointing_kwargs or {}
    return bool(args.gradient_checkpointing and options.get("use_reentrant"))


def check_built(objective: Objective, args: MoETrainingArguments, fsdp: bool) -> None:
    """Raise UserError for what an objective has made, where it cannot be trained."""
    if objective.maps is not None and fsdp:
        raise UserError("project: expected False under FSDP, which does not know the maps, got True")
    if objective.relation_layer is not None and is_reentrant(args):
        raise UserError("use_reentrant: expected False with the term 'relation', which gets no gradient then, got True")


def check_optimizer(optimizer: Any, maps: nn.Module | None, args: MoETrainingArguments) -> None:
    """Raise UserError for an optimizer that was given where groups of parameters would have to be added to it."""
    if optimizer is not None and (maps is not None or args.router_learning_rate is not None):
        needed = "router_learning_rate" if maps is None else "the objective's maps"
        raise UserError(f"optimizers: expected none with {needed}, which need groups of their own, got one")
