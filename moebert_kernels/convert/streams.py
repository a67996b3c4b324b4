"""What a model's residual stream is at its feed-forwards, of a dense model and of a student that was made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.convert.batches import reading
from moebert_kernels.convert.sites import Site
from moebert_kernels.convert.text_pass import Recorder, is_normed_sum, recording
from moebert_kernels.errors import UserError

_TRIAL = 0.1  # of the stream's size, added to an output to see where it goes


class Enough(Exception):
    """Ends a forward of the student, of which no more is asked."""


class Stream(Recorder):
    """At one feed-forward the tokens' ids, its input, and what the residual stream is behind it.

    Args:
        kind: of the feed-forward's output, see `kind_of`.
        is_student: its own output is not looked at.
        ends: the forward, which comes here once, goes no further.
    """

    def __init__(
        self, model: nn.Module, site: Site, first: nn.Module, kind: str, is_student: bool = False, ends: bool = False
    ) -> None:
        super().__init__(model, site.name, first, None if is_student else site.second_module)
        self.kind, self.is_student, self.ends = kind, is_student, ends
        self.rows = 0
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def keep(self, behind: Tensor) -> None:
        real = self.real()
        rows = self.rows + torch.arange(len(real), device=real.device).unsqueeze(1).expand_as(real)
        self.rows += len(real)
        flat = real.flatten().to(self.x.device)
        x, behind = (t.reshape(-1, t.shape[-1])[flat] for t in (self.x, behind))
        if self.is_student:
            kept = x if self.kind == "normed" else behind
            self.parts.append((self.ids[real], rows[real], x, kept))
            if self.ends:
                raise Enough
            return
        y = self.y.reshape(-1, self.y.shape[-1])[flat]
        total = {"normed": x + y, "added": behind, "alone": y}[self.kind]
        self.parts.append((self.ids[real], rows[real], behind.float().square().mean(1), total))

    def taken(self, most: int) -> list[Tensor]:
        """The parts of `most` tokens, which are let go."""
        found = [torch.cat(parts)[:most] for parts in zip(*self.parts, strict=True)]
        self.parts.clear()
        return found


def run(model: nn.Module, streams: Sequence[Recorder], texts: Iterable[Mapping[str, Tensor]]) -> None:
    """Forwards over the texts, as far as the streams let each go."""
    with recording(model, streams):
        for given in texts:
            with suppress(Enough), reading(model, given):
                model(**given)


class KnownBlocks:
    """Forwards of a student up to one feed-forward after another, in which blocks that are done compute nothing again.

    A block's output is kept for each text, and every block up to it gives that. So a forward computes the block that
    was corrected last and the one that is next. Where that is not the same, as in a model that hands more from block to
    block than their outputs, whole forwards run.
    """

    def __init__(self, student: nn.Module, texts: Sequence[Mapping[str, Tensor]]) -> None:
        self.student, self.texts = student, texts
        self.blocks: nn.ModuleList | None = None
        self.known = -1  # the block whose outputs are kept
        self.outputs: list[Any] = []

    def run(self, site: Site, got: Stream) -> None:
        """Show all texts to `got`, which ends each forward if it comes to the feed-forward once."""
        if not got.ends:
            run(self.student, [got], self.texts)
            return
        blocks, number = _place(self.student, site.name)
        if blocks is not self.blocks:  # a decoder's, behind those of its encoder
            self.blocks, self.known, self.outputs = blocks, -1, []
        if self.known >= 0 and not self._is_the_same(got):
            self.known, self.outputs = -1, []
        found: list[Any] = []
        with ExitStack() as stack:
            if number:
                hook = blocks[number - 1].register_forward_hook(lambda _, args, output: found.append(output))
                stack.callback(hook.remove)
            self._run(got, self.texts)
        if number:
            self.known, self.outputs = number - 1, found

    def _run(self, got: Stream, texts: Sequence[Mapping[str, Tensor]]) -> None:
        """With the blocks that are known in the way of the forwards."""
        assert self.blocks is not None
        coming, current = iter(self.outputs), [None]
        known = list(self.blocks)[: self.known + 1]

        def first(*_: Any, **__: Any) -> Any:
            current[0] = next(coming)
            return given()

        def given(*_: Any, **__: Any) -> Any:
            output: Any = current[0]  # a copy, should the next block write into it
            return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()

        own = [vars(block).get("forward") for block in known]
        for block in known:
            block.forward = first if block is known[0] else given
        try:
            run(self.student, [got], texts)
        finally:
            for block, forward in zip(known, own, strict=True):
                del block.forward
                if forward is not None:  # a user's, or accelerate's
                    block.forward = forward

    def _is_the_same(self, got: Stream) -> bool:
        """Whether the first text gives what a whole forward gives."""
        try:
            self._run(got, self.texts[:1])
        except Exception:  # whatever a block says that misses what the blocks before had left for it
            got.parts.clear()
        known, self.known = self.known, -1
        self._run(got, self.texts[:1])
        self.known, got.rows = known, 0
        seen = [got.parts.pop() for _ in range(len(got.parts))]
        return len(seen) == 2 and all(
            torch.allclose(a.float(), b.float(), atol=1e-3 * float(b.float().abs().max()))
            for a, b in zip(*(part[2:] for part in seen), strict=True)
        )


def _place(model: nn.Module, name: str) -> tuple[nn.ModuleList, int]:
    """The list of the model's layers that a feed-forward is in, the outermost one, and its place there."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, nn.ModuleList):
            return module, int(parts[end])
    raise UserError(f"model: expected {name} in one of a list of layers, found no list around it")


def kind_of(model: nn.Module, site: Site, text: Mapping[str, Tensor]) -> str:
    """Where the output y of a dense feed-forward with the input x goes.

    "normed": the stream behind it is a LayerNorm of x + y; "added": y is added to the stream; "alone": anything else,
    and only y itself can be compared.
    """
    plain = _Trial(model, site)
    run(model, [plain], [text])
    if is_normed_sum(plain.seen_x + plain.seen_y, plain.behind):
        return "normed"
    moved = _Trial(model, site)
    noise = torch.randn(plain.y.shape, generator=torch.Generator().manual_seed(0)).to(plain.y)
    noise *= _TRIAL * max(float(plain.seen_y.float().std()), float(plain.behind.float().std()))  # above rounding
    hook = site.second_module.register_forward_hook(lambda _, args, y: y + noise)
    try:
        run(model, [moved], [text])
    finally:
        hook.remove()
    change = (moved.behind - plain.behind).float()
    wanted = noise.reshape(-1, noise.shape[-1])[plain.flat].float()
    return "added" if (change - wanted).square().mean() < 1e-2 * wanted.square().mean() else "alone"


class _Trial(Recorder):
    """What is at a dense feed-forward in one forward, without padding."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        super().__init__(model, site.name, site.first_modules[0], site.second_module)

    def keep(self, behind: Tensor) -> None:
        self.flat = self.real().flatten().to(self.x.device)
        self.seen_x, self.seen_y, self.behind = (
            t.reshape(-1, t.shape[-1])[self.flat] for t in (self.x, self.y, behind)
        )
        raise Enough
