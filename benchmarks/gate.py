"""The gate: nothing is timed whose outputs are not what a plain float64 computation says, within the tests' bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.clocks import device_lost, first_line
from benchmarks.measuring import Outputs, Provider, Skipped
from moebert_kernels.accuracy import error_and_bound


@dataclass
class Checked:
    """What passed the gate and what did not.

    Attributes:
        passed: the providers that may be timed.
        error_shares: name -> worst error as a share of what is allowed.
        refused: name -> reason.
        skipped: name -> why it cannot run here.
        slow_ms: name -> the one time of a slow provider, which is not among `passed`.
        judges: name -> takes further outputs of `run`, raises Refused; not of those that `checked` stands for.
    """

    passed: dict[str, Provider] = field(default_factory=dict)
    error_shares: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    slow_ms: dict[str, float] = field(default_factory=dict)
    judges: dict[str, Callable[[Outputs], None]] = field(default_factory=dict)

    def judge_again(self, name: str, got: Outputs) -> None:
        """Refuse a provider that passed, if its outputs have become wrong."""
        try:
            if name in self.judges:
                self.judges[name](got)
        except Refused as error:
            del self.passed[name]
            self.refused[name] = f"once captured: {error}"


class Refused(Exception):
    """A provider's outputs are not what its reference says."""


def check(providers: Mapping[str, Provider | Skipped], dtype: torch.dtype | None = None) -> Checked:
    """Run every provider twice, a slow one once, and hold its outputs against its reference; see `Checked`.

    Args:
        dtype: of the case; outputs that round more than it does are refused.
    """
    checked = Checked()
    references: dict[tuple[Any, torch.dtype], Outputs] = {}  # several providers share one
    for name, provider in providers.items():
        if isinstance(provider, Skipped):
            checked.skipped[name] = provider.reason
            continue

        def reference(wanted: torch.dtype, of: Provider = provider) -> Outputs:
            if (of.reference, wanted) not in references:
                references[of.reference, wanted] = of.reference(wanted)
            return references[of.reference, wanted]

        def judge(got: Outputs, name: str = name, of: Provider = provider, reference: Any = reference) -> None:
            if of.arrange is not None:
                got = of.arrange(got)
            _refuse_narrower(got, dtype)
            share = worst_error_share(got, reference(got[0].dtype), reference(torch.float64))
            checked.error_shares[name] = max(share, checked.error_shares.get(name, 0.0))

        try:
            # both before the provider can change what it is given
            reference(torch.float64)
            reference(dtype or torch.float32)
            for _ in range(1 if provider.slow else 2):  # right once is not right
                with poisoned_memory():
                    start = time.perf_counter()
                    got = (provider.checked or provider.run)()
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    elapsed_ms = (time.perf_counter() - start) * 1e3
                judge(got)
        except Refused as error:
            checked.refused[name] = str(error)
            continue
        except Exception as error:  # a provider that cannot run is a result, and must not stop the others
            if device_lost():
                raise
            checked.refused[name] = first_line(error)
            continue
        if provider.slow:
            checked.slow_ms[name] = elapsed_ms
        else:
            checked.passed[name] = provider
            if provider.checked is None:
                checked.judges[name] = judge
    return checked


def _refuse_narrower(got: Outputs, dtype: torch.dtype | None) -> None:
    if dtype is None or not dtype.is_floating_point:
        return
    for i, tensor in enumerate(got):
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).eps > torch.finfo(dtype).eps:
            raise Refused(f"output {i}: expected {dtype}, got {tensor.dtype}")


def worst_error_share(got: Outputs, same_dtype: Outputs, exact: Outputs) -> float:
    """Largest error as a share of what `error_and_bound` allows.

    Raises:
        Refused: another number of outputs, another shape, a value that is not finite, or an error past the bound.
    """
    if len(got) != len(exact):
        raise Refused(f"outputs: expected {len(exact)}, got {len(got)}")
    worst = 0.0
    for i, (g, s, e) in enumerate(zip(got, same_dtype, exact, strict=True)):
        if g.shape != e.shape:
            raise Refused(f"output {i}: expected shape {tuple(e.shape)}, got {tuple(g.shape)}")
        not_finite = int((~torch.isfinite(g.detach())).sum())
        if not_finite:
            raise Refused(f"output {i}: {not_finite} of {g.numel()} values are not finite or never written")
        if g.numel() == 0:
            continue
        error, bound = error_and_bound(g, s, e)
        largest = float(error.max())
        if largest > bound:
            raise Refused(f"output {i}: expected an error of at most {bound:.1e}, got {largest:.1e}")
        worst = max(worst, largest / bound if bound else 0.0)
    return worst


_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """NaN, of integers the lowest, in all memory from torch's Python allocators: a row left unwritten shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_meta or tensor.dtype == torch.bool:
                return tensor
            kind = tensor.dtype
            wrong = float("nan") if kind.is_floating_point else 255 if kind == torch.uint8 else torch.iinfo(kind).min
            tensor.detach().fill_(wrong)  # bytes, which may be scratch of any type, as those of NaN
            return tensor

        return wrapper

    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    try:
        for owner, name, allocate in originals:
            setattr(owner, name, poisoned(allocate))
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)
