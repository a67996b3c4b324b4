"""What `fit` looks at before its first step: do model, teacher, folder and settings fit together?"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moebert_kernels.distill.checkpoint import recover_folder
from moebert_kernels.distill.config import RUN_FOLDERS, Batches, FitConfig
from moebert_kernels.distill.objectives import Objective
from moebert_kernels.distill.teacher import Teacher, check_one_head
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config
from moebert_kernels.nn import GradientMask, MPOWeight

# Experts' biases and norms are stacked in one (E, I) or (E, H) parameter, so their names tell, not their dimensions.
# A task router's logits are a bias too.
_UNDECAYED_NAMES = ("bias", "b1", "b2", "norm_weight", "norm_bias", "logits")
# transformers sets these in the model's own config when it is used or saved
_SET_IN_USE = ("architectures", "dtype", "problem_type", "quantization_config", "transformers_version")


def check_teacher(
    model: nn.Module,
    objective: Objective | None,
    teacher: nn.Module | TeacherCache | None,
    config: FitConfig,
) -> None:
    """Raise UserError unless there is a teacher exactly where it is needed, apart from the student, with one head."""
    if (objective is None) != (teacher is None):
        given, missing = ("a teacher", "objective") if objective is None else ("an objective", "teacher")
        raise UserError(f"{missing}: expected one together with {given}, got None")
    if teacher is not None:
        check_one_head("model", model)
    if isinstance(teacher, nn.Module):
        ours = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in ours for parameter in teacher.parameters()):
            raise UserError("teacher: expected weights of its own, got some that the student trains")
    elif teacher is not None and config.teacher_dropout:
        raise UserError("teacher_dropout: expected False with cached teacher outputs, which do not change, got True")


def check_experts(model: nn.Module, config: FitConfig, mask: GradientMask | None) -> None:
    """Raise UserError unless the model has what the mask and the fold are for."""
    if mask is not None:
        ours = {id(module) for module in model.modules()}
        if any(id(weight) not in ours for weight in mask.weights):
            raise UserError("gradient_mask: expected one of the model that is trained, got one of another")
    if config.shared_fold and not any(isinstance(module, MPOWeight) for module in model.modules()):
        raise UserError(f"shared_fold: expected False for a model that folds no weights, got a {type(model).__name__}")


def prepare_folder(folder: Path, resume: bool) -> None:
    """Make `folder`, and put right what an interruption left in it; without `resume` drop its run and the models of it.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir: expected a folder that can be written, got {folder} ({error.strerror})") from None
    recover_folder(folder / "best")
    recover_folder(folder / "final")
    if not resume:
        for name in reversed(RUN_FOLDERS):  # a model of the old run must not be taken for the new one's
            shutil.rmtree(folder / name, ignore_errors=True)


def parameter_groups(
    model: nn.Module, weight_decay: float, router_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Trained parameters for the optimizer: biases and norms, also the experts' stacked ones, without weight decay.

    Routers' parameters are a group of their own, without weight decay, if they have a learning rate of their own.

    Raises:
        UserError: nothing is trained.
    """
    # T5's norm is a class of its own, as other models' are
    norms, routers = (
        {id(p) for m in model.modules() if type(m).__name__.endswith(kind) for p in m.parameters()}
        for kind in ("Norm", "Router")
    )
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    routing: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if router_learning_rate is not None and id(parameter) in routers:
            routing.append(parameter)
        else:
            plain = name.rsplit(".", 1)[-1] in _UNDECAYED_NAMES or id(parameter) in norms
            (undecayed if plain else decayed).append(parameter)
    if router_learning_rate is not None and not routing:
        raise UserError("router_learning_rate: expected a model with trained routers, got one without")
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
        {"params": routing, "weight_decay": 0.0, "lr": router_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("model: expected at least one parameter that requires a gradient, got none")
    return groups


def new_optimizer(model: nn.Module, config: FitConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over what is trained, with the run's settings.

    Raises:
        UserError: nothing is trained.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, config.router_learning_rate),
        lr=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_eps,
        fused=device.type in ("cpu", "cuda"),  # a fifth of the plain one's time on a CPU
    )


def run_identity(
    model: nn.Module,
    train: Batches,
    config: FitConfig,
    objective: Objective | None,
    teacher: Teacher | None,
    processes: int,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Flat JSON-able facts that must agree for a run to be resumed. The student's weights come from the checkpoint."""
    shapes = [(name, list(tensor.shape)) for name, tensor in sorted(model.state_dict().items())]
    model_config: Any = model.config
    moe = moe_config(model_config)
    settings = {
        f"model.{name}": value
        for name, value in (model_config.to_dict() | ({} if moe is None else moe.to_dict())).items()
        if not name.startswith("_") and name not in _SET_IN_USE
    }
    identity = {
        **settings,
        **config.identity(),
        "model_class": type(model).__name__,
        "weight shapes": sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "training data": train.fingerprint,
        "batches per epoch": len(train),
        "processes": processes,
        "objective": None if objective is None else type(objective).__name__,
        **({} if objective is None else {f"objective.{name}": value for name, value in objective.identity().items()}),
        "teacher weights": teacher.info.fingerprint if teacher is not None else None,
        "cache_dtype": teacher.info.stored_as if teacher is not None else None,
        **further,
    }
    return json.loads(json.dumps(identity, default=str))
