"""What a feed-forward of fewer neurons loses on the tokens of some text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moebert_kernels import reference
from moebert_kernels.convert.correction import Moments, Refit
from moebert_kernels.convert.sites import DenseWeights
from moebert_kernels.convert.text_pass import SiteText

_CHUNK = 2048  # tokens whose activations are in memory at once,
_KEPT_BYTES = 1 << 30  # unless those of all tokens take no more than this
_BLOCK = 768  # columns of a symmetric matrix at once
_FEW_GROUPS = 64  # summed by a matrix product, and more by index


class SiteErrors:
    """A dense feed-forward and the tokens that came to it, in float32 on its device.

    The error of a token is the mean square of what changes behind the residual: of LayerNorm(x + output) without its
    scale and shift where that norm stands there, else of the output relative to the residual stream's mean square. So a
    few tokens of a huge norm do not decide.

    Args:
        dense: its weights.
        activation: its name in the ops.
        text: of `read_text`.
    """

    def __init__(self, dense: DenseWeights, activation: str, text: SiteText) -> None:
        w1, b1, w2, b2 = (None if t is None else t.detach().float() for t in dense)
        assert w1 is not None and w2 is not None
        self.w1, self.b1, self.w2, self.b2, self.activation = w1, b1, w2, b2, activation
        text = text.in_order(text.held_out.to(torch.uint8).argsort(stable=True))  # what is read together is adjacent
        self.text, choosing = text, int((~text.held_out).sum())
        self.train, judged = torch.arange(len(text.ids), device=text.ids.device).tensor_split([choosing])
        self.judged = judged if len(judged) else self.train
        self._kept: Tensor | None = None
        kept, output = [], []
        keeps = len(text.x) * w2.shape[1] * 4 <= _KEPT_BYTES
        for _, _, h in self._chunks(torch.arange(len(text.x))):
            output.append(F.linear(h, w2, b2))
            kept += [h] if keeps else []
        self.output, self._kept = torch.cat(output), torch.cat(kept) if keeps else None
        del kept
        behind = text.x.float() + self.output
        size = behind.var(1, unbiased=False) if text.is_normed else text.stream
        self.weight = 1.0 / size.clamp(min=1e-12)  # (N,), s^2

    def weight_by_gradient(self) -> Tensor:
        """(N,) the weights, half of them by the text's gradient, which must be known."""
        assert self.text.gradient is not None
        gradient = self.text.gradient
        return (self.weight + gradient / (gradient / self.weight).mean().clamp(min=1e-30)) / 2

    def _chunks(self, tokens: Tensor) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
        """Some of the ascending tokens at a time, their inputs (n, H) and activations (n, D), not to be changed."""
        for part in tokens.to(self.text.x.device).split(_CHUNK):
            first, last = (int(part[0]), int(part[-1])) if len(part) else (0, -1)
            rows = slice(first, last + 1) if last + 1 - first == len(part) else part  # a slice copies nothing
            x = self.text.x[rows].float()
            if self._kept is not None:
                yield rows, x, self._kept[rows]
            else:
                yield rows, x, reference.activate(F.linear(x, self.w1, self.b1), self.activation)

    def errors(self, experts: Sequence[Refit], tokens: Tensor) -> Tensor:
        """(n, E) error of each token with each expert."""
        return torch.cat([self._errors(part, x, h, experts) for part, x, h in self._chunks(tokens)])

    def _errors(self, part: Tensor | slice, x: Tensor, h: Tensor, experts: Sequence[Refit]) -> Tensor:
        exact, found = self.output[part], []
        norm = F.layer_norm(x + exact, x.shape[1:]) if self.text.is_normed else None
        for expert in experts:
            output = F.linear(h.index_select(1, expert.kept), expert.w2, expert.b2)
            if norm is not None:
                found.append((F.layer_norm(x + output, x.shape[1:]) - norm).square().mean(1))
            else:
                found.append((output - exact).square().mean(1) * self.weight[part])
        return torch.stack(found, 1)

    def means(self, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weight (G,), mean (G, D) and mean square (G, D) of the activations of groups of the tokens that choose.

        Args:
            group: (n,) of each of `train`, 0 to G - 1.
        """
        D, device = self.w2.shape[1], self.w2.device
        total = torch.zeros(num_groups, device=device)
        sums, squares = torch.zeros(num_groups, D, device=device), torch.zeros(num_groups, D, device=device)
        at = 0
        for part, _, h in self._chunks(self.train):
            weight, into = self.weight[part], group[at : at + len(h)]
            at += len(h)
            total.index_add_(0, into, weight)
            if num_groups <= _FEW_GROUPS:
                member = F.one_hot(into, num_groups).T * weight
                sums.addmm_(member, h)
                squares.addmm_(member, h.square())
            else:
                sums.index_add_(0, into, weight[:, None] * h)
                squares.index_add_(0, into, weight[:, None] * h.square())
        scale = total.clamp(min=1e-30)[:, None]
        return total, sums / scale, squares / scale

    def moments(self, group: Tensor, num_groups: int, weights: Tensor | None = None) -> list[Moments]:
        """The moments of each group's activations, and of all tokens that choose; as for `means`.

        Args:
            weights: (N,) of the tokens; None: `weight`.
        """
        weights = self.weight if weights is None else weights
        D, device = self.w2.shape[1], self.w2.device
        raw = [(torch.zeros((), device=device), torch.zeros(D, device=device), torch.zeros(D, D, device=device))
               for _ in range(num_groups)]  # fmt: skip
        for g, (total, sums, products) in enumerate(raw):
            for part, _, h in self._chunks(self.train[group == g]):
                weight = weights[part]
                total += weight.sum()
                sums += weight @ h
                add_gram(products, h * weight.sqrt()[:, None])
            products.triu_()
            products += products.triu(1).T
        whole = tuple(torch.stack([group_raw[n] for group_raw in raw]).sum(0) for n in (0, 1))
        products = raw[0][2].clone()
        for group_raw in raw[1:]:
            products += group_raw[2]
        return [self._moments(*part) for part in (*raw, (*whole, products))]

    def _moments(self, total: Tensor, sums: Tensor, products: Tensor) -> Moments:
        scale = total.clamp(min=1e-30)
        mean, second = sums / scale, products / scale
        if self.b2 is None:
            return Moments(float(total), torch.zeros_like(mean), second)
        return Moments(float(total), mean, second - torch.outer(mean, mean))


def add_gram(products: Tensor, rows: Tensor) -> None:
    """Add the upper half of rows^T rows, of (n, D), to (D, D), block by block; what is below may be anything after."""
    for start in range(0, len(products), _BLOCK):
        block = slice(start, start + _BLOCK)
        products[block, start:].addmm_(rows[:, block].T, rows[:, start:])
