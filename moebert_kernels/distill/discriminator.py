"""A discriminator that tells a student's outputs from its teacher's: the adversarial term of MicroBERT-style students.

[paper] The idea of a GAN: a discriminator is trained on the outputs of teacher and student. [reading] Everything else:
its input, its shape, the non-saturating loss, that it steps after the student.

It is trained apart: its own AdamW, one step for each of the student's, on all sequences of the window at once and after
the student's step, so that all micro-batches of a window meet the same discriminator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_kernels.errors import UserError

Input = Literal["auto", "logits", "pooled", "both"]
Reduce = Callable[[Tensor], Tensor]
TERM = "adversarial"


@dataclass(frozen=True)
class AdversaryConfig:
    """Settings of a discriminator.

    Raises:
        UserError: a value out of its range.
    """

    input: Input = "auto"  # probabilities, mean-pooled last hidden state, or both. auto: both; pooled for regression
    sizes: tuple[int, ...] = (256, 64)
    dropout: float = 0.1
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    real_label: float = 0.9  # one-sided label smoothing
    warmup: float = 0.1  # share of all steps in which the discriminator learns and the student does not hear of it
    # After so many steps in a row whose mean accuracy is above `stop_accuracy` the term ends for good. None: never.
    stop_steps: int | None = None
    stop_accuracy: float = 0.95

    def __post_init__(self) -> None:
        if self.input not in get_args(Input):
            raise UserError(f"discriminator_input: expected one of {', '.join(get_args(Input))}, got {self.input!r}")
        for name, holds, wanted in (
            ("dropout", 0.0 <= self.dropout < 1.0, "at least 0 and less than 1"),
            ("warmup", 0.0 <= self.warmup < 1.0, "at least 0 and less than 1"),
            ("real_label", 0.5 < self.real_label <= 1.0, "more than 0.5 and at most 1"),
            ("stop_accuracy", 0.5 < self.stop_accuracy <= 1.0, "more than 0.5 and at most 1"),
            ("learning_rate", self.learning_rate > 0.0, "a number above 0"),
            ("stop_steps", self.stop_steps is None or self.stop_steps >= 1, "at least 1 or None"),
        ):
            if not holds:
                raise UserError(f"discriminator_{name}: expected {wanted}, got {getattr(self, name)!r}")

    def input_for(self, kind: str) -> str:
        """What the discriminator sees of a task of this kind.

        Raises:
            UserError: probabilities of a regression task, which has none.
        """
        if kind != "regression":
            return "both" if self.input == "auto" else self.input
        if self.input not in ("auto", "pooled"):
            raise UserError(f"discriminator_input: expected 'pooled' for a regression task, got {self.input!r}")
        return "pooled"

    def identity(self) -> dict[str, object]:
        return {f"discriminator_{name}": value for name, value in asdict(self).items()}


class Discriminator(nn.Sequential):
    """(B, n) -> (B,) logits of "this is the teacher's": linear layers with LeakyReLU(0.2) and dropout between them."""

    def __init__(self, size: int, hidden: Sequence[int] = (256, 64), dropout: float = 0.1):
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(size, width), nn.LeakyReLU(0.2), nn.Dropout(dropout)]
            size = width
        super().__init__(*layers, nn.Linear(size, 1), nn.Flatten(0))


def generator_loss(logits: Tensor) -> Tensor:
    """-mean log D over (B,) logits of the student's outputs: the non-saturating loss of the generator."""
    return F.softplus(-logits).mean()


def discriminator_losses(real: Tensor, fake: Tensor, real_label: float) -> Tensor:
    """(B,): 1/2 (BCE(D(teacher), real_label) + BCE(D(student), 0)) of each sequence, from logits (B,)."""
    of_real = F.binary_cross_entropy_with_logits(real, torch.full_like(real, real_label), reduction="none")
    of_fake = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="none")
    return 0.5 * (of_real + of_fake)


class Adversary:
    """A discriminator in training.

    Args:
        config: its settings.
        size: n, features of an output.
        seed: of its first weights; the global generators are left alone.
        device: where it runs, in float32.
    """

    METRICS = ("real", "fake", "accuracy", "loss")

    def __init__(self, config: AdversaryConfig, size: int, seed: int = 0, device: torch.device | str = "cpu"):
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = Discriminator(size, config.sizes, config.dropout)
        self.network.to(device).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.learning_rate, betas=config.betas)
        self.stopped = False
        self._window: list[tuple[Tensor, Tensor]] = []
        self._sums = torch.zeros(len(self.METRICS) + 1, device=device)  # of the metrics, and the sequences
        self._recent = torch.zeros(2, device=device)  # right answers and answers since the last look
        self._steps = 0  # since then

    def factor(self, share: float) -> float:
        """What the term's weight is multiplied with when so much of the run is done: 0 or 1."""
        return float(not self.stopped and share >= self.config.warmup)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's loss, (), from features (B, n) of both, which are kept for `step` but in an evaluation."""
        if torch.is_grad_enabled():
            self._window.append((student.detach().float(), teacher.detach().float()))
        return generator_loss(self.network(student.float()))

    def drop_window(self) -> None:
        """Forget features that no `step` has seen."""
        self._window = []

    def forget(self) -> None:
        """Start the log's means anew."""
        self._sums.zero_()

    def step(self, sequences: Sequence[int], total: int, share: float, reduce: Reduce = lambda x: x) -> None:
        """One step on the window's sequences, unless the term is stopped.

        Args:
            sequences: of each micro-batch that was seen, how many sequences count: all, or none.
            total: sequences of the window, in all processes.
            share: as for `factor`.
            reduce: sums over the processes.
        """
        pairs, self._window = self._window, []
        if self.stopped:
            return
        student, teacher = (
            torch.cat([pair[side][:count] for pair, count in zip(pairs, sequences, strict=True)]) for side in (0, 1)
        )
        self.network.train().requires_grad_(True)
        real, fake = self.network(torch.cat([teacher, student])).split(len(teacher))
        losses = discriminator_losses(real, fake, self.config.real_label)
        (losses.sum() / total).backward()
        for parameter in self.network.parameters():
            parameter.grad = reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.network.eval().requires_grad_(False)
        self._note(real.detach(), fake.detach(), losses.detach(), share, reduce)

    def _note(self, real: Tensor, fake: Tensor, losses: Tensor, share: float, reduce: Reduce) -> None:
        right = 0.5 * ((real > 0).float() + (fake <= 0).float())
        values = [real.sigmoid(), fake.sigmoid(), right, losses, torch.ones_like(losses)]
        self._sums += torch.stack([value.sum() for value in values])
        if self.config.stop_steps is None or share < self.config.warmup:
            return
        self._recent += torch.stack([right.sum(), right.new_tensor(float(len(right)))])
        self._steps += 1
        if self._steps == self.config.stop_steps:
            correct, count = reduce(self._recent).tolist()
            self.stopped = correct > self.config.stop_accuracy * count
            self._recent, self._steps = torch.zeros_like(self._recent), 0

    def means(self, step: int, reduce: Reduce = lambda x: x) -> dict[str, Any]:
        """For the log: means over the sequences since the last call, D(real) and D(fake) as probabilities.

        Raises:
            UserError: the discriminator's loss is not finite.
        """
        *sums, count = reduce(self._sums.clone()).tolist()
        self._sums.zero_()
        if not count:
            return {}
        means = {f"discriminator_{name}": total / count for name, total in zip(self.METRICS, sums, strict=True)}
        loss = means["discriminator_loss"]
        if not abs(loss) < float("inf"):
            raise UserError(f"discriminator_loss: expected a finite loss, got {loss} at or shortly before step {step}")
        return means | {"adversarial_stopped": True} if self.stopped else means

    def state(self, reduce: Reduce = lambda x: x) -> dict[str, Any]:
        """JSON-able, exact; without the weights and the optimizer."""
        sums, recent = (reduce(value.clone()).tolist() for value in (self._sums, self._recent))
        return {"stopped": self.stopped, "sums": sums, "recent": recent, "steps": self._steps}

    def load_state(self, state: dict[str, Any], rank: int = 0) -> None:
        self.stopped, self._steps = state["stopped"], state["steps"]
        for values, saved in ((self._sums, state["sums"]), (self._recent, state["recent"])):
            values.copy_(torch.tensor(saved) * (rank == 0))  # the sum over all processes goes on in the first
