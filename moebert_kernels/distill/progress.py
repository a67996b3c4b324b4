"""What a run reports: running means of its loss terms, a JSONL log, and a polite answer to Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from moebert_kernels.errors import UserError

GRACE_STEPS = 20  # a student that starts as its teacher's copy may have a zero term at first, but not for long


class TermMeter:
    """Means of named terms over the sequences (or labels) seen since the last report; on the device until then.

    Args:
        reduce: sums a tensor over the processes of a distributed run.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] = lambda x: x):
        self._reduce = reduce
        self._names: list[str] = []
        self._sums: Tensor | None = None  # one sum per name, then the weight
        self._finite: Tensor | None = None  # per name, in the first batch in which one was not
        self._contributed: set[str] = set()

    def add(self, terms: Mapping[str, Tensor], weight: int) -> None:
        """Count a batch of `weight` sequences or labels; each term is its mean over them."""
        values = torch.stack([term.detach().float() for term in terms.values()])
        finite = values.isfinite()
        if self._sums is not None and self._finite is not None:
            finite = torch.where(self._finite.all(), finite, self._finite)
        self._finite = finite
        values = torch.cat([values * weight, values.new_full((1,), float(weight))])
        if self._sums is None:
            self._names, self._sums = list(terms), values
        else:
            self._sums += values

    def means(self, step: int, weighted: Iterable[str], last: bool = False) -> dict[str, float]:
        """The means so far, judged; the only place that waits for the device.

        `weighted` names the terms that must contribute; the others are reported only.

        Raises:
            UserError: a term is not finite, or one in `weighted` has been zero for GRACE_STEPS steps or until the
                `last` one.
        """
        if self._sums is None:
            return {}
        *sums, weight = self._reduce(self._sums.clone()).tolist()
        means = {name: total / weight for name, total in zip(self._names, sums, strict=True)}
        broken = {name: mean for name, mean in means.items() if not math.isfinite(mean)}
        if broken:  # one that breaks breaks the others in the next step
            first = self._reduce((~self._finite).float()).tolist() if self._finite is not None else []
            name = next((name for name, count in zip(self._names, first, strict=False) if count), min(broken))
            raise UserError(f"{name}: expected a finite loss, got {means[name]} at or shortly before step {step}")
        self._contributed |= {name for name, mean in means.items() if mean != 0.0}
        if last or step >= GRACE_STEPS:
            self.check_contributions(step, weighted)
        return means

    def check_contributions(self, step: int, weighted: Iterable[str]) -> None:
        """Raise UserError if a term in `weighted` has been exactly zero in everything that was judged."""
        silent = sorted(set(weighted) - self._contributed)
        if silent:
            raise UserError(f"{silent[0]}: expected a loss that contributes, got exactly 0 in all of {step} steps")

    def reset(self) -> None:
        """Start the next report's means."""
        self._sums = None

    def state(self) -> dict[str, Any]:
        """JSON-able, exact."""
        sums = None if self._sums is None else self._reduce(self._sums.clone()).tolist()
        return {"names": self._names, "sums": sums, "contributed": sorted(self._contributed)}

    def load_state(self, state: Mapping[str, Any], device: torch.device, rank: int) -> None:
        self._names, self._contributed = list(state["names"]), set(state["contributed"])
        self._sums = self._finite = None
        if state["sums"] is not None:  # the sum over all processes goes on in the first
            self._sums = torch.tensor(state["sums"], dtype=torch.float32, device=device) * (rank == 0)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars for saving and loading, which would break into the run's."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class RunLog:
    """A JSONL file that a resumed run continues as if nothing had happened.

    Args:
        path: the file. Only rank 0 writes; the others keep quiet.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self._writes = path, writes

    def write(self, **entry: Any) -> None:
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Forget what was written after the checkpoint that is resumed."""
        if self._writes and self.size() > size:
            with self.path.open("rb+") as file:
                file.truncate(size)


class StopRequest:
    """While entered, Ctrl-C and SIGTERM ask for a stop after the current step; a second one stops at once.

    A signal in the middle of an optimizer step would leave half-updated weights, so the step is finished first.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        # signal handlers can only be set in the main thread; elsewhere the caller's own remain
        in_main = threading.current_thread() is threading.main_thread()
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step, with a checkpoint (once more: at once)", file=sys.stderr, flush=True)
