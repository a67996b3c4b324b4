"""Correct the feed-forwards of a converted model one after another, each for what those before it have changed.

`choose_experts` fits a feed-forward to the inputs that it has in the dense model. In the converted model its inputs
are others, and what they lack adds up from layer to layer. With x the inputs in the converted model, h = act(w1 x + b1)
and r what the dense model's residual stream behind the feed-forward is ahead of the converted model's,

    w2 += D,   b2 += mean(r) - D mean(h),   D = cov(r, h) (cov(h) + d I)^-1

leaves the least of r that the feed-forward can. The first layers know nothing of r, the later ones take back what is
linear in h. K-prune (2308.03449) and others tune pruned encoders so, sublayer by sublayer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from moebert_kernels import reference
from moebert_kernels.convert.batches import reading, tensors_of
from moebert_kernels.convert.chosen import MOST_TOKENS, sites_at_once
from moebert_kernels.convert.sample_loss import unread_labels
from moebert_kernels.convert.sites import DenseWeights, Site, find_sites
from moebert_kernels.convert.text_pass import HELD_OUT_EVERY, Recorder, is_normed_sum, recording
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEFeedForward, moe_layers
from moebert_kernels.nn import DenseExperts, HashRouter

RIDGE = 0.1  # d, of the mean of cov(h)'s diagonal
_CHUNK = 2048  # tokens whose activations are computed at once
_TRIAL = 0.1  # of an output's size, added to it to see where it goes


@dataclass(frozen=True)
class Correction:
    """What a correction did at one feed-forward, on sequences that did not decide it.

    Attributes:
        name: of the feed-forward.
        before, after: mean square of the difference between the two models' residual streams behind it, relative to the
            dense model's variance (with a LayerNorm there) or mean square. Where `after` would not be less, or
            `before` is rounding, the feed-forward is left as it was, and both are the same.
    """

    name: str
    before: float
    after: float


def correct_in_turn(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Mapping[str, Any]], *, max_tokens: int = MOST_TOKENS,
    progress: bool = False,
) -> list[Correction]:  # fmt: skip
    """Correct w2 and b2 of a student's feed-forwards, one after another, by unlabelled text.

    One sequence in eight only judges. Time: a forward of the teacher over the text, and about two of the student.
    Memory: `max_tokens` x H numbers for each feed-forward of the teacher, 2 GiB at most, and four times as many for the
    student.

    Args:
        student: made of `teacher` by `convert_to_moe` with parts of its neurons and hash tables, or by `dense_student`;
            changed.
        teacher: the dense model; not changed.
        batches: mappings of tensors with `input_ids` and, where there is padding, `attention_mask`; reading ends at
            `max_tokens`.
        progress: show a bar.

    Returns:
        What it did at each feed-forward.

    Raises:
        UserError: a student that is not of this teacher, or whose experts are of another kind; no text.
    """
    pairs = _pairs(student, teacher)
    texts = first_tokens(teacher, batches, max_tokens)
    at_once = sites_at_once([site for site, _ in pairs], max_tokens)
    found, done = [], _Done(student, texts)
    with tqdm(total=len(pairs), desc="correcting layers in turn", unit=" layers", disable=not progress) as bar:
        for start in range(0, len(pairs), at_once):
            some = pairs[start : start + at_once]
            wanted = [_Stream(teacher, site, site.first_modules[0], _kind(teacher, site, texts[0])) for site, _ in some]
            _run(teacher, wanted, texts)
            for (site, part), want in zip(some, wanted, strict=True):
                got = _Stream(student, site, part.first, want.kind, is_student=True)
                done.run(site, got)
                with torch.no_grad():
                    found.append(_corrected(site, part, want, got, max_tokens))
                want.parts.clear()
                bar.update()
    return found


@dataclass
class _Part:
    """A student's feed-forward: what gets its input, the table of its experts, and views of their weights."""

    first: nn.Module
    table: Tensor | None
    experts: list[DenseWeights]


def _pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[Site, _Part]]:
    """The teacher's feed-forwards that the student has changed, and what it has there."""
    sites = {site.name: site for site in find_sites(teacher)}
    if student is teacher:
        raise UserError("student: expected a converted copy of the teacher, got the teacher")
    parts: dict[str, _Part] = {}
    if moe_layers(student):
        for name, layer in student.named_modules():
            if isinstance(layer, MoEFeedForward):
                parts[name] = _Part(layer, *_experts(name, layer))
    else:
        parts = {s.name: _Part(s.first_modules[0], None, [s.weights()]) for s in find_sites(student)}
    unknown = [name for name in parts if name not in sites]
    if unknown or (not moe_layers(student) and len(parts) != len(sites)):
        raise UserError(
            f"student: expected one made of this teacher, with its {len(sites)} feed-forwards, got a"
            f" {type(student).__name__} with {len(parts)}"
        )
    pairs = [(site, parts[name]) for name, site in sites.items() if name in parts]
    for site, part in pairs:
        H, device = site.weights().w2.shape[0], site.weights().w2.device
        if any(expert.w2.shape[0] != H or expert.w2.device != device for expert in part.experts):
            raise UserError(f"student: expected {site.name} of {H} on {device}, as the teacher's, got another size or"
                            " device")  # fmt: skip
    return pairs


def _experts(name: str, layer: MoEFeedForward) -> tuple[Tensor, list[DenseWeights]]:
    experts: Any = layer.experts
    if not isinstance(layer.router, HashRouter) or not isinstance(experts, DenseExperts):
        raise UserError(
            f"student: expected experts with weights of their own, routed by a hash table, at {name}, got"
            f" {type(experts).__name__} routed by {type(layer.router).__name__}"
        )
    w1, w2 = experts.w1.detach(), experts.w2.detach()
    b1, b2 = ([None] * len(w1) if b is None else b.detach() for b in experts.biases())
    return layer.router.table, [DenseWeights(*weights) for weights in zip(w1, b1, w2, b2, strict=True)]


def first_tokens(model: nn.Module, batches: Iterable[Mapping[str, Any]], most: int) -> list[dict[str, Tensor]]:
    """The batches with the first `most` tokens, as the model takes them, on its device."""
    accepted = set(inspect.signature(model.forward).parameters) - set(unread_labels(model))
    found, count = [], 0
    for tensors in tensors_of(batches, next(model.parameters()).device):
        found.append({name: value for name, value in tensors.items() if name in accepted})
        ids, mask = found[-1].get("input_ids"), found[-1].get("attention_mask")
        count += 0 if ids is None else ids.numel() if mask is None or mask.ndim != 2 else int((mask != 0).sum())
        if count >= most:
            break
    if not found:
        raise UserError("batches: expected text to correct by, got none; an iterator that was read before is empty")
    return found


class _Enough(Exception):
    """Ends a forward of the student, of which no more is asked."""


class _Stream(Recorder):
    """At one feed-forward the tokens' ids, its input, and what the residual stream is behind it.

    Args:
        kind: of the feed-forward's output, see `_kind`.
        is_student: its forward ends here, and its own output is not looked at.
    """

    def __init__(self, model: nn.Module, site: Site, first: nn.Module, kind: str, is_student: bool = False) -> None:
        super().__init__(model, site.name, first, None if is_student else site.second_module)
        self.kind, self.is_student = kind, is_student
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
            raise _Enough
        y = self.y.reshape(-1, self.y.shape[-1])[flat]
        total = {"normed": x + y, "added": behind, "alone": y}[self.kind]
        self.parts.append((self.ids[real], rows[real], behind.float().square().mean(1), total))

    def all(self, most: int) -> list[Tensor]:
        """The parts of `most` tokens, as they are kept."""
        return [torch.cat(parts)[:most] for parts in zip(*self.parts, strict=True)]


def _run(model: nn.Module, streams: Sequence[Recorder], texts: Iterable[Mapping[str, Tensor]]) -> None:
    with recording(model, streams):
        for given in texts:
            with suppress(_Enough), reading(model, given):
                model(**given)


class _Done:
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

    def run(self, site: Site, got: _Stream) -> None:
        """Show all texts to `got`, which ends each forward."""
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

    def _run(self, got: _Stream, texts: Sequence[Mapping[str, Tensor]]) -> None:
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

        for block in known:
            block.forward = first if block is known[0] else given
        try:
            _run(self.student, [got], texts)
        finally:
            for block in known:
                del block.forward

    def _is_the_same(self, got: _Stream) -> bool:
        """Whether the first text gives what a whole forward gives."""
        seen = []
        for known in (self.known, -1):
            self.known, before = known, self.known
            self._run(got, self.texts[:1])
            self.known = before
            seen.append(got.parts.pop())
            got.rows = 0
        return all(
            torch.allclose(a.float(), b.float(), atol=1e-3 * float(b.float().abs().max()))
            for a, b in zip(*seen, strict=True)
        )


def _place(model: nn.Module, name: str) -> tuple[nn.ModuleList, int]:
    """The list of the model's layers that a feed-forward is in, the outermost one, and its place there."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, nn.ModuleList):
            return module, int(parts[end])
    raise UserError(f"model: expected {name} in one of a list of layers, found no list around it")


def _kind(model: nn.Module, site: Site, text: Mapping[str, Tensor]) -> str:
    """Where the output y of a dense feed-forward with the input x goes.

    "normed": the stream behind it is a LayerNorm of x + y; "added": y is added to the stream; "alone": anything else,
    and only y itself can be compared.
    """
    plain = _Trial(model, site)
    _run(model, [plain], [text])
    if is_normed_sum(plain.seen_x + plain.seen_y, plain.behind):
        return "normed"
    moved = _Trial(model, site)
    noise = torch.randn(plain.y.shape, generator=torch.Generator().manual_seed(0)).to(plain.y)
    noise *= _TRIAL * plain.y.float().std()
    hook = site.second_module.register_forward_hook(lambda _, args, y: y + noise)
    try:
        _run(model, [moved], [text])
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
        raise _Enough


def _corrected(site: Site, part: _Part, want: _Stream, got: _Stream, most: int) -> Correction:
    ids, rows, stream, total = want.all(most)
    _, _, x, base = got.all(most)
    total, x, base = total.float(), x.float(), base.float()
    size = total.var(1, unbiased=False) if want.kind == "normed" else stream
    weight = 1.0 / size.clamp(min=1e-12)
    judges = (rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1).to(x.device)
    expert = torch.zeros(len(ids), dtype=torch.long) if part.table is None else part.table[ids].long()
    expert = expert.to(x.device)
    before = after = torch.zeros((), device=x.device)
    changes = []
    for e, weights in enumerate(part.experts):
        own = expert == e
        h, y = _activations(weights, site.activation, x[own])
        ahead = total[own] - (y if want.kind == "alone" else base[own] + y if want.kind == "normed" else base[own])
        judging = judges[own] if bool(judges.any()) else torch.ones_like(judges[own])
        fits = ~judges[own]
        change, shift = _least_squares(h[fits], ahead[fits], weight[own][fits], weights.b2 is not None)
        left = ahead[judging] - F.linear(h[judging], change, shift)
        before = before + (ahead[judging].square().mean(1) * weight[own][judging]).sum()
        after = after + (left.square().mean(1) * weight[own][judging]).sum()
        changes.append((weights, change, shift))
    count = max(int(judges.sum()) or len(judges), 1)
    error = float(before) / count
    rounding = (8 * torch.finfo(part.experts[0].w2.dtype).eps) ** 2
    if not after < before or error < rounding:
        return Correction(site.name, error, error)
    for weights, change, shift in changes:
        weights.w2.add_(change.to(weights.w2.dtype))
        if weights.b2 is not None:
            weights.b2.add_(shift.to(weights.b2.dtype))
    return Correction(site.name, error, float(after) / count)


def _activations(weights: DenseWeights, activation: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """h (n, I) and the outputs (n, H) in float32."""
    w1, b1, w2, b2 = (None if t is None else t.float() for t in weights)
    assert w1 is not None and w2 is not None
    parts = [reference.activate(F.linear(some, w1, b1), activation) for some in x.split(_CHUNK)]
    h = torch.cat(parts) if parts else x.new_zeros(0, w2.shape[1])
    return h, F.linear(h, w2, b2)


def _least_squares(h: Tensor, ahead: Tensor, weight: Tensor, centred: bool) -> tuple[Tensor, Tensor | None]:
    """The changes of w2 (H, I) and b2 (H,), or None, by tokens (n, I) and (n, H) of these weights (n,)."""
    share = weight / weight.sum().clamp(min=1e-30)
    mean, lead = (share @ h, share @ ahead) if centred else (h.new_zeros(h.shape[1]), ahead.new_zeros(ahead.shape[1]))
    scaled = (h - mean) * share[:, None]
    gram, cross = scaled.T @ (h - mean), scaled.T @ (ahead - lead)
    ridge = RIDGE * gram.diagonal().mean()
    if not ridge > 0:
        change = h.new_zeros(ahead.shape[1], h.shape[1])
    else:
        change = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), cross).T
    return change, lead - change @ mean if centred else None
