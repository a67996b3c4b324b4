"""Correct the feed-forwards of a converted model one after another, each for what those before it have changed.

`choose_experts` fits a feed-forward to the inputs that it has in the dense model. In the converted model its inputs
are others, and what they lack adds up from layer to layer. With x the inputs in the converted model, h = act(w1 x + b1)
and r what the dense model's residual stream behind the feed-forward is ahead of the converted model's,

    w2 += D,   b2 += mean(r) - D mean(h),   D = cov(r, h) (cov(h) + d I)^-1

leaves the least of r that the feed-forward can. In the first layer r is its own error, which was fitted before; later
layers also take back what those before have left, as far as it is linear in h. K-prune (2308.03449) tunes the weights
of pruned encoders in such turns.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
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
from moebert_kernels.convert.streams import KnownBlocks, Stream, kind_of, run
from moebert_kernels.convert.text_pass import HELD_OUT_EVERY, recording
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEFeedForward, moe_layers
from moebert_kernels.nn import DenseExperts, HashRouter

RIDGE = 0.1  # d, of the mean of cov(h)'s diagonal
_FEWEST = 3  # tokens of a text that shows where an output goes
_ROUNDING = 1e-12  # of float32's sums, in an error
_CHUNK = 2048  # tokens whose activations are computed at once


@dataclass(frozen=True)
class Correction:
    """What a correction did at one feed-forward, on sequences that did not decide it.

    Attributes:
        name: of the feed-forward.
        before, after: mean square of the difference between the two models' residual streams behind it, relative to the
            dense model's variance (with a LayerNorm there) or mean square; where the output is not simply added to the
            stream, as in Gemma 2, of the difference between the two outputs, relative to the dense one's. Where `after`
            would not be less, or `before` is rounding, the feed-forward is left as it was, and both are the same.
    """

    name: str
    before: float
    after: float


def correct_in_turn(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Mapping[str, Any]], *, max_tokens: int = MOST_TOKENS,
    progress: bool = False,
) -> list[Correction]:  # fmt: skip
    """Correct w2 and b2 of a student's feed-forwards, one after another, by unlabelled text.

    One sequence in eight only judges; with fewer than eight nothing is corrected, with a warning. Time: a forward of
    the teacher over the text, and about two of the student; more where few batches hold all text, and for decoders
    behind an encoder. Memory: `max_tokens` x H numbers for each feed-forward of a pass of the teacher (2 GiB in all, or
    one feed-forward), the output of a block for all text with its padding, and at the feed-forward at work about
    3 (H + I) float32 for each token.

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
    longest = max(texts, key=_count)
    if (sequences := sum(len(text["input_ids"]) for text in texts)) < HELD_OUT_EVERY:
        warnings.warn(
            f"batches: {sequences} sequences are too few to correct layers in turn, as none could judge; nothing is"
            f" corrected, {HELD_OUT_EVERY} or more do",
            stacklevel=2,
        )
    at_once = sites_at_once([site for site, _ in pairs], max_tokens)
    found, done = [], KnownBlocks(student, texts)
    with tqdm(total=len(pairs), desc="correcting layers in turn", unit=" layers", disable=not progress) as bar:
        for start in range(0, len(pairs), at_once):
            some = pairs[start : start + at_once]
            wanted = [Stream(teacher, site, site.first_modules[0], kind_of(teacher, site, longest)) for site, _ in some]
            run(teacher, wanted, texts)
            for (site, part), want in zip(some, wanted, strict=True):
                got = Stream(student, site, part.first, want.kind, is_student=True, ends=len(want.parts) == len(texts))
                done.run(site, got)
                with torch.no_grad():
                    found.append(_corrected(site, part, want, got, max_tokens))
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
    if any(hasattr(module, "moe_layer") for module in student.modules()):
        raise UserError(
            "student: expected tokens in their own order, got set_expert_order; turn it off before,"
            " set_expert_order(student, False)"
        )
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
    """The batches with the first `most` tokens, as the model takes them, on its device.

    Raises:
        UserError: none, fewer than three tokens in each, or batches that the model cannot read.
    """
    accepted = set(inspect.signature(model.forward).parameters) - set(unread_labels(model))
    found, count = [], 0
    for tensors in tensors_of(batches, next(model.parameters()).device):
        found.append({name: value for name, value in tensors.items() if name in accepted})
        if "input_ids" not in found[-1]:
            raise UserError(f"batches: expected token ids (input_ids) as a tensor in each, got {', '.join(tensors)}")
        with reading(model, found[-1]):
            count += _count(found[-1])
        if count >= most:
            break
    if max(map(_count, found), default=0) < _FEWEST:
        raise UserError(
            f"batches: expected text to correct by, got none of at least {_FEWEST} tokens; an iterator that was read"
            " before is empty"
        )
    widest = max(found, key=lambda text: text["input_ids"].shape[-1])
    with recording(model, ()), reading(model, widest):  # which says of lengths whether the model has positions
        model(**widest)
    return found


def _count(text: Mapping[str, Tensor]) -> int:
    """Tokens that are no padding."""
    ids, mask = text["input_ids"], text.get("attention_mask")
    return ids.numel() if mask is None or mask.ndim != 2 else int((mask != 0).sum())


def _corrected(site: Site, part: _Part, want: Stream, got: Stream, most: int) -> Correction:
    ids, rows, stream, total = want.taken(most)
    _, _, x, base = got.taken(most)
    if len(x) != len(ids):
        raise UserError(f"student: expected the teacher's {len(ids)} tokens at {site.name}, got {len(x)}")
    total, x, base = total.float(), x.float(), base.float()
    if want.kind == "normed":
        size = total.var(1, unbiased=False)
    else:
        size = stream if want.kind == "added" else total.square().mean().expand(len(total))
    weight = 1.0 / size.clamp(min=1e-12)
    lead = total if want.kind == "alone" else total - base  # of the dense model, without or with the student's output
    judges = (rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1).to(x.device)
    expert = torch.zeros(len(ids), dtype=torch.long) if part.table is None else part.table[ids].long()
    expert, can_judge = expert.to(x.device), bool(judges.any())
    before = after = torch.zeros((), device=x.device)
    changes = []
    for e, weights in enumerate(part.experts):
        own = expert == e
        h, y = _activations(weights, site.activation, x[own])
        ahead = lead[own] if want.kind == "added" else lead[own] - y
        judging = judges[own] if can_judge else torch.ones_like(judges[own])
        fits = ~judges[own]
        change, shift = _least_squares(h[fits], ahead[fits], weight[own][fits], weights.b2 is not None)
        left = ahead[judging] - F.linear(h[judging], change, shift)
        before = before + (ahead[judging].square().mean(1) * weight[own][judging]).sum()
        after = after + (left.square().mean(1) * weight[own][judging]).sum()
        changes.append((weights, change, shift))
    count = int(judges.sum()) if can_judge else len(judges)
    error = float(before) / count
    rounding = max((0.5 * torch.finfo(part.experts[0].w2.dtype).eps) ** 2, _ROUNDING)
    if not can_judge or not after < before or error < rounding:
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
