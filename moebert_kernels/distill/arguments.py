"""What a training run is told: transformers' `TrainingArguments`, and what it does not know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from moebert_kernels.errors import UserError

# which transformers does not look at
_LEAST = {
    "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0, "label_smoothing_factor": 0,
    "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "save_total_limit": 1, "early_stopping_patience": 1, "router_learning_rate": 0, "pad_to_multiple_of": 1, "seed": 0,
}  # fmt: skip
OBJECTIVES = ("layerwise", "tokens", "microbert", "embedding")


@dataclass
class MoETrainingArguments(TrainingArguments):
    """Settings of `MoETrainer`: all of transformers', under their names, and those below.

    Dictionaries may be given as JSON, as on a command line.

    Raises:
        UserError: a value out of its range, or an unknown name.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012  as transformers has it
        *TrainingArguments._VALID_DICT_FIELDS, "objective_options", "loss_weights", "gradient_mask",
    ]  # fmt: skip

    objective: str | None = field(
        default=None,
        metadata={
            "help": f"What a student follows its teacher in: one of {', '.join(OBJECTIVES)}. None: labels alone."
        },
    )
    objective_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the objective by name, e.g. {'layer_map': {1: 2}}."}
    )
    loss_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Weights of the loss terms by name: 'task' (the labels), 'balance', and the objective's. A term "
            "that is not named has weight 1, 'balance' that of the model's configuration."
        },
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the routers' parameters. None: as of all others."}
    )
    gradient_mask: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of GradientMask, e.g. {'probability': 0.5}: MPOE's steps without central tensors."
        },
    )
    shared_fold: bool = field(
        default=False,
        metadata={"help": "Fold the experts of MPOE once per optimizer step, which takes the memory of their weights."},
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to lengths that are multiples of this, so that shapes repeat."}
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Replay training steps from CUDA graphs, one for each shape of batches (needs pad_to_multiple_of)."
        },
    )
    teacher_dropout: bool = field(default=False, metadata={"help": "Run the teacher with its dropout."})
    teacher_outputs: str | None = field(
        default=None,
        metadata={"help": "Folder to keep the teacher's outputs in: computed once, for any number of epochs and runs."},
    )
    teacher_outputs_dtype: str | None = field(
        default=None, metadata={"help": "float32, float16 or bfloat16. None: as the teacher computes."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a new best, where `metric_for_best_model` is set."},
    )
    # Without it early stopping would count its evaluations anew in a run that goes on.
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Take up the states of callbacks, as of early stopping, from a checkpoint."}
    )
    # transformers pins always, and torch then warns on a machine without an accelerator
    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Keep batches in pinned memory. None: where they go to an accelerator."}
    )
    # Terms that are not finite stop the run by name; transformers would hide them from the log.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the log."}
    )

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise UserError(f"{name}: expected a number of at least {least}, got {value!r}")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise UserError(f"num_train_epochs: expected a number above 0, got {self.num_train_epochs!r}")
        if self.max_steps == 0:
            raise UserError("max_steps: expected a number above 0, or -1 for that of num_train_epochs, got 0")
        accelerator = _accelerator()
        if self.bf16 and accelerator is None:
            self.use_cpu = True  # without which transformers refuses bfloat16 on a CPU
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = not self.use_cpu and accelerator not in (None, "mps")
        super().__post_init__()  # type: ignore[no-untyped-call]
        judged = self.eval_strategy != "no" and self.metric_for_best_model is not None
        if self.early_stopping_patience is not None and not judged:
            raise UserError(
                f"early_stopping_patience: expected None without eval_strategy and metric_for_best_model, got"
                f" {self.early_stopping_patience}"
            )
        if self.shared_fold and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # DDP's search from the outputs ends at the folded weights
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise UserError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        for name in ("objective_options", "gradient_mask"):
            _check_entries(name, getattr(self, name))
        check_weights(self.loss_weights)

    @property
    def weights(self) -> dict[str, float]:
        """The weights that were given."""
        weights: Any = self.loss_weights
        return dict(weights or {})


def _accelerator() -> str | None:
    """The type of the device that is not the CPU, if there is one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def check_weights(weights: Any) -> None:
    """Raise UserError unless these are weights by name, or None."""
    _check_entries("loss_weights", weights)
    for name, weight in (weights or {}).items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise UserError(f"loss_weights.{name}: expected a number of at least 0, got {weight!r}")


def _check_entries(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name}: expected names and values, got {value!r}")
