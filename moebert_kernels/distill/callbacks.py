"""Callbacks of transformers' `Trainer`, for what happens once in an optimizer step: gradient mask, discriminator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moebert_kernels.distill.discriminator import Adversary
from moebert_kernels.nn import GradientMask


class GradientMaskCallback(TrainerCallback):
    """Mask the central tensors of the model's experts by chance, step by step; see `GradientMask`.

    It has no state of its own: a draw depends on the seed and the step, which a resumed run knows.
    """

    def __init__(self, mask: GradientMask) -> None:
        self.mask = mask
        self._open = ExitStack()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._open.enter_context(self.mask.step(state.global_step))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._open.close()

    def release(self) -> None:
        """Take the mask off a model whose step was interrupted."""
        self._open.pop_all()
        for weight in self.mask.weights:
            weight.masked = (False,) * weight.num_experts


class Window(NamedTuple):
    """What one optimizer step looks at: how many sequences, or labels, each micro-batch has here, and all processes."""

    counts: list[int]
    total: int


class DiscriminatorCallback(TrainerCallback):
    """Train a discriminator: one step for each of the student's, after it, on all sequences of the window.

    Args:
        adversary: the discriminator.
        window: gives the window that the step looked at.
        reduce: sums over the processes.
    """

    def __init__(self, adversary: Adversary, window: Callable[[], Window], reduce: Callable[[Tensor], Tensor]) -> None:
        self.adversary, self._window, self._reduce = adversary, window, reduce

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        window = self._window()
        share = state.global_step / state.max_steps  # the step is counted after this call
        self.adversary.step(window.counts, window.total, share, self._reduce)
