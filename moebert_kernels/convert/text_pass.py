"""What a pass over text sees at the feed-forwards: their inputs, their token ids, and the stream that they add to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from moebert_kernels.convert.batches import reading, tensors_of
from moebert_kernels.convert.importance import frozen_eval
from moebert_kernels.convert.sample_loss import unread_labels
from moebert_kernels.convert.sites import Site
from moebert_kernels.errors import UserError
from moebert_kernels.layers.routing import stack_of

HELD_OUT_EVERY = 8  # sequences; one of so many judges what the others chose
MOST_OF_ONE_ID = 0.5  # of the tokens
MOST_UNSEEN = 0.5  # of the tokens held out


@dataclass(frozen=True)
class SiteText:
    """The tokens of some text at one feed-forward, without padding.

    Attributes:
        ids: (N,) int64 token ids.
        x: (N, H) inputs of the feed-forward, in the model's dtype.
        held_out: (N,) bool, tokens of the sequences that only judge.
        stream: (N,) float32, mean square of the residual stream behind the feed-forward. Of no use where `is_normed`.
        is_normed: whether a LayerNorm stands behind the residual, so that what counts is LayerNorm(x + output).
        gradient: (N,) float32, squared norms of the loss's gradient with respect to the feed-forward's output, over
            their mean in the sequence; None where it is not asked for.
    """

    ids: Tensor
    x: Tensor
    held_out: Tensor
    stream: Tensor
    is_normed: bool
    gradient: Tensor | None = None

    def in_order(self, order: Tensor) -> SiteText:
        """The tokens (N,) of these numbers."""
        gradient = None if self.gradient is None else self.gradient[order]
        return SiteText(
            self.ids[order], self.x[order], self.held_out[order], self.stream[order], self.is_normed, gradient
        )


class Recorder:
    """The hooks of one feed-forward of a model.

    Args:
        model: of transformers.
        name: dotted path of the feed-forward, dense or converted.
        first: the module that gets its input.
        second: the module that gives its output; None: it is not looked at.
    """

    def __init__(self, model: nn.Module, name: str, first: nn.Module, second: nn.Module | None) -> None:
        self.stack, self.block = stack_of(model, name), _block_of(model, name)
        self.first, self.second = first, second
        self.ids: Any = None
        self.mask: Any = None
        self.x: Any = None
        self.y: Any = None
        self.output: Any = None

    def hooks(self) -> list[Any]:
        names = tuple(inspect.signature(self.stack.forward).parameters)

        def before_stack(_: Any, args: Any, kwargs: Any) -> None:
            given = dict(zip(names, args, strict=False)) | kwargs
            self.ids, self.mask = given.get("input_ids"), given.get("attention_mask")
            if self.ids is None:
                raise UserError(
                    "batches: expected token ids (input_ids) as a tensor, by which experts are chosen, got none"
                )

        def before_first(_: Any, args: Any) -> None:
            self.x = args[0].detach()

        def after_second(_: Any, args: Any, y: Tensor) -> None:
            self.y = y.detach()
            if torch.is_grad_enabled():
                self.output = y if y.requires_grad else y.requires_grad_()

        def after_block(_: Any, args: Any, output: Any) -> None:
            self.keep((output[0] if isinstance(output, tuple) else output).detach())

        made = [
            self.stack.register_forward_pre_hook(before_stack, with_kwargs=True),
            self.first.register_forward_pre_hook(before_first),
            self.block.register_forward_hook(after_block),
        ]
        return made if self.second is None else [*made, self.second.register_forward_hook(after_second)]

    def real(self) -> Tensor:
        """(B, T) bool, the tokens of the forward that are no padding."""
        if not isinstance(self.mask, Tensor) or self.mask.ndim != 2:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return self.mask[:, -self.ids.shape[1] :] != 0

    def keep(self, behind: Tensor) -> None:
        """Keep what is wanted of a forward, `behind` being the residual stream behind the block."""
        raise NotImplementedError


class _SiteRecorder(Recorder):
    """Of a dense site, and what it has seen of some text, up to `most` tokens."""

    def __init__(self, model: nn.Module, site: Site, most: int) -> None:
        super().__init__(model, site.name, site.first_modules[0], site.second_module)
        self.most = most
        self.parts: list[tuple[Tensor, ...]] = []
        self.gradients: list[Tensor] = []
        self.count = self.rows = 0  # tokens kept, sequences seen
        self.is_normed: bool | None = None
        self.last: Any = None

    def keep(self, behind: Tensor) -> None:
        ids, mask = self.ids, self.real()
        rows = self.rows + torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids)
        self.rows += len(ids)
        flat = mask.flatten().to(self.x.device)
        x, y, behind = (t.reshape(-1, t.shape[-1])[flat] for t in (self.x, self.y, behind))
        if self.is_normed is None and len(x):
            self.is_normed = is_normed_sum(x + y, behind)
        kept = slice(0, max(0, self.most - self.count))
        self.last = flat.nonzero().flatten()[kept]
        stream = behind.float().square().mean(1)
        self.parts.append(tuple(t[kept].clone() for t in (ids[mask], x, rows[mask], stream)))
        self.count += len(self.parts[-1][0])

    def keep_gradient(self, gradient: Tensor | None) -> None:
        """Keep squared norms of the gradient at the last output; None: it does not reach the loss."""
        gradient = torch.zeros_like(self.output) if gradient is None else gradient
        squares = gradient.float().square().sum(-1).view(self.ids.shape)
        # every sequence counts alike: where the model is sure of the label the loss has hardly any gradient
        scale = (squares > 0).sum(1, keepdim=True) / squares.sum(1, keepdim=True).clamp(min=1e-30)
        self.gradients.append((squares * scale).flatten()[self.last])

    def text(self) -> SiteText:
        ids, x, rows, stream = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        held_out = rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        ids, held_out = ids.long().to(x.device), held_out.to(x.device)
        gradient = torch.cat(self.gradients) if self.gradients else None
        return SiteText(ids, x, held_out, stream.to(x.device), bool(self.is_normed), gradient)


@contextmanager
def recording(model: nn.Module, recorders: Iterable[Recorder]) -> Iterator[None]:
    """With the recorders' hooks, in eval mode, without gradients and autocast; all is put back."""
    device = next(model.parameters()).device
    with ExitStack() as stack, torch.no_grad(), torch.autocast(device.type, enabled=False):
        stack.enter_context(frozen_eval(model))
        for recorder in recorders:
            for hook in recorder.hooks():
                stack.callback(hook.remove)
        yield


def read_text(
    model: nn.Module, sites: list[Site], batches: Iterable[Mapping[str, Any]], most: int, progress: bool = False,
    with_gradient: bool = False,
) -> list[SiteText]:  # fmt: skip
    """Run the model over the batches until there are `most` tokens, and return what came to each site.

    The model runs in eval mode, in its own dtype; it is left as it was. Memory: `most` x H numbers for each site.
    `with_gradient` adds one backward pass for each batch, which must have the labels of the model's loss.

    Raises:
        UserError: nothing to read, no token ids, or no loss.
    """
    recorders = [_SiteRecorder(model, site, most) for site in sites]
    accepted = set(inspect.signature(model.forward).parameters) - set(() if with_gradient else unread_labels(model))
    bar = tqdm(total=most, desc="reading text", unit=" tokens", disable=not progress, leave=False)
    with recording(model, recorders), bar:
        for tensors in tensors_of(batches, sites[0].weights().w1.device):
            given = {name: value for name, value in tensors.items() if name in accepted}
            with reading(model, given), torch.set_grad_enabled(with_gradient):
                output = model(**given)
            if with_gradient:
                _keep_gradients(recorders, output, given)
            least = min(recorder.count for recorder in recorders)
            bar.update(min(least, most) - bar.n)
            if least >= most:
                break
    if any(recorder.count == 0 for recorder in recorders):
        raise UserError(
            "batches: expected text to choose experts by, got no tokens; padding is none, and an iterator that was read"
            " before is empty"
        )
    return [recorder.text() for recorder in recorders]


def _keep_gradients(recorders: list[_SiteRecorder], output: Any, batch: Mapping[str, Tensor]) -> None:
    loss = getattr(output, "loss", None)
    if loss is None:
        got = f"a model that takes {', '.join(batch)} of them and gives none"
        raise UserError(f"batches: expected labels, and a model with a head that gives a loss, got {got}")
    gradients = torch.autograd.grad(loss, [recorder.output for recorder in recorders], allow_unused=True)
    for recorder, gradient in zip(recorders, gradients, strict=True):
        recorder.keep_gradient(gradient)
        recorder.output = None


def check_text(text: SiteText, num_experts: int) -> None:
    """Raise a UserError for text of which no table of token ids can be made; with the share that is wrong."""
    counts = torch.bincount(text.ids)
    kinds, (most, which) = int((counts > 0).sum()), counts.max(0)
    share = float(most) / len(text.ids)
    if share > MOST_OF_ONE_ID:
        raise UserError(
            f"batches: expected text in a language that the tokenizer knows, got token id {int(which)} for "
            f"{100 * share:.0f} % of the tokens"
        )
    if kinds < 2 * num_experts:
        raise UserError(
            f"batches: expected text with at least {2 * num_experts} different token ids for {num_experts} experts, "
            f"got {kinds} in {len(text.ids)} tokens"
        )
    unseen = unseen_share(text)
    if unseen > MOST_UNSEEN:
        raise UserError(
            f"batches: expected text of one kind and more of it, got sequences of which {100 * unseen:.0f} % of the "
            "tokens are unseen in the others"
        )


def unseen_share(text: SiteText) -> float:
    """The share of the held-out tokens whose id is nowhere in the rest of the text; 0 where nothing is held out."""
    known = torch.isin(text.ids[text.held_out], text.ids[~text.held_out])
    return 1.0 - float(known.float().mean()) if len(known) else 0.0


def _block_of(model: nn.Module, name: str) -> Any:
    """The layer of the model around a feed-forward, whose output is the residual stream."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(parts[:end]))
    raise UserError(f"model: expected {name} in one of a list of layers, found no list around it")


def is_normed_sum(total: Tensor, behind: Tensor) -> bool:
    """Whether `behind` (n, H) is an affine function, column by column, of the LayerNorm of `total`."""
    if len(total) < 3:
        return False
    normed = F.layer_norm(total.float(), total.shape[1:])
    a, b = normed - normed.mean(0), behind.float() - behind.float().mean(0)
    slope = (a * b).sum(0) / a.square().sum(0).clamp(min=1e-30)
    rounding = (8 * torch.finfo(behind.dtype).eps) ** 2 + 1e-9  # of squares
    return bool((b - slope * a).square().sum() < rounding * b.square().sum())
