"""Callbacks of transformers' `Trainer`: gradient mask, discriminator, a polite answer to Ctrl-C, the bar."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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


class StopCallback(TrainerCallback):
    """While entered, Ctrl-C and SIGTERM ask for a stop after the current step, with a checkpoint; a second one stops at
    once.

    A signal in the middle of an optimizer step would leave half-updated weights, so the step is finished first. At the
    end of an epoch the checkpoint waits for the evaluation, which a resumed run would leave out.

    Args:
        reduce: sums over the processes, which must agree; None: there is one.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self._requested, self._stopping, self._reduce = False, False, reduce

    def __enter__(self) -> StopCallback:
        # signal handlers can only be set in the main thread; elsewhere the caller's own remain
        in_main = threading.current_thread() is threading.main_thread()
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: object) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print("\nstopping after this step, with a checkpoint (once more: at once)", file=sys.stderr, flush=True)

    def _agreed(self, args: TrainingArguments, state: TrainerState) -> bool:
        if self._reduce is None:
            return self._requested
        if state.global_step % state.logging_steps:  # several only ask each other where they wait anyway
            return False
        return bool(self._reduce(torch.tensor(float(self._requested), device=args.device)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < state.max_steps and (self._stopping or self._agreed(args, state)):
            self._stopping = True
            control.should_save = control.should_save or state.epoch != int(state.epoch or 0)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = control.should_save or self._stopping

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._stopping:
            where = f"step {state.global_step} of {state.max_steps}"
            print(f"stopped at {where}; the same call goes on from there", file=sys.stderr, flush=True)
            raise KeyboardInterrupt(where)


class BarCallback(ProgressCallback):
    """transformers' bar, with the last losses behind it instead of lines on standard output."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        bar: Any = self.training_bar
        if bar is not None and "loss" in (logs or {}):
            shown = {name: f"{value:.4g}" for name, value in logs.items() if name not in ("epoch", "learning_rate")}
            bar.set_postfix(shown, refresh=False)
