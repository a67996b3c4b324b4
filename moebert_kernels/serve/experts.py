"""The experts of a layer in a prepared model, with packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.activation import ACTIVATIONS
from moebert_kernels.grouping import Grouping
from moebert_kernels.nn.context import current
from moebert_kernels.ops._routing import resolve_routing, resolve_routing_weights
from moebert_kernels.serve.dtypes import bias_dtype, is_int8
from moebert_kernels.serve.modules import Engines, PackedModule, as_weights
from moebert_kernels.serve.packed import Packed, Weights, rounded_rows
from moebert_kernels.serve.tiles import ENGINE as TILES
from moebert_kernels.serve.tiles import TiledExperts, unavailable
from moebert_kernels.torch_backend.activation import activate

# Experts whose pre-activations are no more than these numbers together get one activation: 1 MiB, for the cache.
_TOGETHER = 2**18


class PackedExperts(PackedModule):
    """The experts of a layer with packed weights; norms are computed in float32, and rounded once.

    Buffers: w1 (E, I or 2I, H), w2 (E, H, I), of int8 ones w1_scale (E, I or 2I) and w2_scale (E, H); b1, b2 as wide as
    the scales, or none; norm_weight, norm_bias (E, H) of `NormedExperts`.

    Args:
        tensors: the buffers.
        dtype: one of `DTYPES`.
        activation: of the experts.
        eps: of their LayerNorms.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None], dtype: str, activation: str, eps: float | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.activation = activation
        self.adds_residual = tensors.get("norm_weight") is not None
        self.eps = eps
        self.clears_padding = is_int8(dtype)
        w1, w2 = tensors["w1"], tensors["w2"]
        assert w1 is not None and w2 is not None
        self.num_experts = w1.shape[0]
        self.top_k = 1  # on which engines are compared
        self._shapes = {"w1": (w1.shape[1], w1.shape[2]), "w2": (w2.shape[1], w2.shape[2])}
        self._rows_together = max(_TOGETHER // w1.shape[1], 1)
        self._first: list[Packed] = []
        self._second: list[Packed] = []
        self._norms: list[tuple[Tensor, Tensor]] = []
        self._tiled: TiledExperts | None = None
        self._fill(tensors)

    @classmethod
    def of(cls, experts: Any, dtype: str) -> PackedExperts:
        """From `Experts` of any kind; weights that are folded from tensors are folded now."""
        with torch.no_grad():
            w1, w2 = experts.weights()
            b1, b2 = experts.biases()
            tensors = expert_tensors(w1, b1, w2, b2, dtype)
            if experts.adds_residual:
                to = bias_dtype(dtype)
                tensors |= {name: getattr(experts, name).detach().to(to) for name in ("norm_weight", "norm_bias")}
        return cls(tensors, dtype, experts.activation, getattr(experts, "eps", None))

    def _linears(self, name: str) -> list[Weights]:
        """Of "1" or "2", of each expert."""
        weight, scale, bias = (self._buffers.get(key) for key in (f"w{name}", f"w{name}_scale", f"b{name}"))
        assert weight is not None
        return [
            Weights(weight[e], None if scale is None else scale[e], None if bias is None else bias[e])
            for e in range(self.num_experts)
        ]

    def shapes(self) -> Iterator[tuple[tuple[int, int], bool, list[Weights]]]:
        for name in ("1", "2"):
            yield self._shapes[f"w{name}"], True, self._linears(name)

    def tiles(self) -> bool:
        return self.activation in ACTIVATIONS and unavailable(self.dtype) is None

    def pack(self, engines: Engines) -> None:
        if self.activation in ACTIVATIONS and engines(self._shapes["w1"], True) == TILES:
            self._tiled = TiledExperts(self._take(), self.dtype, self.activation, self.eps)
            return
        for name, packed in (("1", self._first), ("2", self._second)):
            engine = engines(self._shapes[f"w{name}"], True)
            for e, weights in enumerate(self._linears(name)):
                packed.append(self._pack(f"w{name}.{e}", engine, Weights(*map(_own, weights))))
        taken = self._take()
        if self.adds_residual:
            rows = zip(taken["norm_weight"], taken["norm_bias"], strict=True)
            self._norms = [(weight.float(), bias.float()) for weight, bias in rows]

    def products(self) -> dict[str, Packed | TiledExperts]:
        if self._tiled is not None:
            return {f"w{name}.{e}": self._tiled for name in (1, 2) for e in range(self.num_experts)}
        both = (("w1", self._first), ("w2", self._second))
        return {f"{name}.{e}": layer for name, packed in both for e, layer in enumerate(packed)}

    def tensors(self) -> dict[str, Tensor]:
        if self._tiled is not None:
            return self._tiled.tensors()
        found: dict[str, Tensor] = {}
        for name, packed in (("1", self._first), ("2", self._second)):
            parts = zip(*(layer.weights() for layer in packed), strict=True)
            for key, values in zip((f"w{name}", f"w{name}_scale", f"b{name}"), parts, strict=True):
                if values[0] is not None:
                    found[key] = torch.stack(list(values))
        for key, values in zip(("norm_weight", "norm_bias"), zip(*self._norms, strict=True), strict=False):
            found[key] = torch.stack(list(values)).to(bias_dtype(self.dtype))
        return found

    def forward(self, x: Tensor, routing: Grouping | Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """As `Experts.forward`; a `Grouping` is that of x, and torch's libraries do not check it."""
        if torch.is_grad_enabled():  # `no_grad` costs as much as a LayerNorm, and most callers are inside one
            with torch.no_grad():
                return PackedExperts.forward(self, x, routing, routing_weights)
        grouping = routing
        if not isinstance(grouping, Grouping):
            grouping = resolve_routing(x, grouping, self.num_experts, max_top_k=1 if self.adds_residual else None)
        flat = x.reshape(-1, x.shape[-1])
        if self._tiled is not None:
            p = None if routing_weights is None else resolve_routing_weights(x, grouping.top_k, routing_weights)
            return self._by_tiles(flat, grouping, p).view(x.shape)
        bounds = grouping.offsets.tolist()
        routed, top_k = bounds[-1], grouping.top_k
        tokens = grouping.row_to_assignment if top_k == 1 else grouping.row_to_assignment // top_k
        if not routed:
            y = flat.clone() if self.adds_residual else flat.new_zeros(flat.shape)
            return y.view(x.shape)
        skips = routed < grouping.num_rows
        counts = [hi - lo for lo, hi in pairwise(bounds)]
        sizes = [*map(rounded_rows, counts)] if self._first[0].compiles or self._second[0].compiles else counts
        if sizes == counts:
            outputs = self._outputs(flat.index_select(0, tokens[:routed] if skips else tokens), counts)
        else:
            outputs = self._outputs(flat.index_select(0, _repeated_last(tokens, bounds, sizes)), sizes)
            outputs = [y[:count] for y, count in zip(outputs, filter(None, counts), strict=True)]
        if routing_weights is not None:
            p = resolve_routing_weights(x, top_k, routing_weights)
            p_rows = p.reshape(-1, 1).index_select(0, grouping.row_to_assignment[:routed])
            outputs = [(outputs[0] if len(outputs) == 1 else torch.cat(outputs)).mul_(p_rows)]
        if skips:  # behind the routed rows stand the skipped ones, also in the permutation
            skipped = tokens[routed:]
            outputs.append(
                self._passed(flat, skipped) if self.adds_residual else outputs[0].new_zeros(len(skipped), flat.shape[1])
            )
        # one read of each row: `index_copy_` and `index_put_` take four times as long
        rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        del outputs  # what is freed is used again, where new memory costs a fault of each page
        y = rows.index_select(0, grouping.assignment_to_row)
        if top_k > 1:
            y = y.view(-1, top_k, y.shape[1]).sum(1)
        return y.view(x.shape)

    def _by_tiles(self, flat: Tensor, grouping: Grouping, p: Tensor | None) -> Tensor:
        """`forward` of (T, H)."""
        assert self._tiled is not None
        routed, top_k = int(grouping.offsets[-1]), grouping.top_k
        y = self._tiled(flat, grouping, p)
        if routed < grouping.num_rows:
            skipped = grouping.row_to_assignment[routed:].long()
            y[skipped] = self._passed(flat, skipped) if self.adds_residual else 0
        return y if top_k == 1 else y.view(-1, top_k, y.shape[1]).sum(1)

    def _passed(self, flat: Tensor, skipped: Tensor) -> Tensor:
        """x of skipped tokens; in int8 0 of those that are padding, whose x no norm has made small.

        Else it would decide the scale of attention's next inputs.
        """
        rows, padding = flat.index_select(0, skipped), is_padding(len(flat)) if self.clears_padding else None
        if padding is not None:
            rows.masked_fill_(padding.index_select(0, skipped).unsqueeze(1), 0)
        return rows

    def _outputs(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        """Of each expert that has any of the rows (R, H): its output, with residual and norm where it has them.

        With few tokens a fifth of the time was Python: no views but these, and no calls around the library's.
        """
        first, second, norms = self._first, self._second, self._norms
        if 0 in counts:
            experts = [e for e, count in enumerate(counts) if count]
            counts = [counts[e] for e in experts]
            first, second = [first[e] for e in experts], [second[e] for e in experts]
            norms = [norms[e] for e in experts] if norms else norms
        inputs = rows.split_with_sizes(counts)
        hidden: Iterable[Tensor]
        if len(inputs) == 1 or first[0].fuses(self.activation):
            hidden = map(self._hidden, first, inputs)  # each when its expert's turn comes, and is in the cache then
        elif len(rows) <= self._rows_together:
            together = torch.cat([layer.linear(x) for layer, x in zip(first, inputs, strict=True)])
            hidden = self._activate(together).split_with_sizes(counts)
        else:
            hidden = self._several_hidden(first, inputs, counts)
        if not norms:
            return [layer.linear(h) for layer, h in zip(second, hidden, strict=True)]
        size = (rows.shape[1],)
        return [
            torch.layer_norm(layer.plus(h, x), size, weight, bias, self.eps)
            for layer, h, x, (weight, bias) in zip(second, hidden, inputs, norms, strict=True)
        ]

    def _several_hidden(self, first: Sequence[Packed], inputs: Sequence[Tensor], counts: list[int]) -> Iterator[Tensor]:
        """`_hidden` of each expert; with few rows, of several experts at once."""
        most, start = self._rows_together, 0
        while start < len(counts):
            end, rows = start + 1, counts[start]
            while end < len(counts) and rows + counts[end] <= most:
                rows += counts[end]
                end += 1
            if end == start + 1:
                yield self._hidden(first[start], inputs[start])
            else:
                parts = [layer.linear(x) for layer, x in zip(first[start:end], inputs[start:end], strict=True)]
                yield from self._activate(torch.cat(parts)).split_with_sizes(counts[start:end])
            start = end

    def _hidden(self, layer: Packed, x: Tensor) -> Tensor:
        """(R, I) of the rows of one expert; the library may apply the activation."""
        return layer(x, self.activation)

    def _activate(self, h_pre: Tensor) -> Tensor:
        """(R, I or 2I) -> (R, I)."""
        return activate(h_pre, self.activation, inplace=True)

    def extra_repr(self) -> str:
        engines = sorted({layer.engine for layer in self.products().values()}) or ["empty"]
        return (
            f"num_experts={self.num_experts}, activation={self.activation!r}, dtype={self.dtype}, "
            f"engine={'/'.join(engines)}"
        )


def _repeated_last(tokens: Tensor, bounds: list[int], sizes: list[int]) -> Tensor:
    """tokens (R,) by expert -> (sum of sizes,): the last one of each again, up to its size, which changes no scale."""
    parts = []
    for (lo, hi), size in zip(pairwise(bounds), sizes, strict=True):
        parts += [tokens[lo:hi], tokens[hi - 1 : hi].expand(size - (hi - lo))]
    return torch.cat(parts)


def is_padding(count: int) -> Tensor | None:
    """(count,) bool of the tokens of the forward that runs; None: nothing says which are padding."""
    tokens = current().tokens
    mask = None if tokens is None else tokens.token_mask
    return None if mask is None else mask[:, -(count // len(mask)) :].reshape(-1) == 0


def expert_tensors(
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, dtype: str
) -> dict[str, Tensor | None]:
    """The buffers of `PackedExperts` from w1 (E, I or 2I, H), b1, w2 (E, H, I), b2, of any strides."""
    tensors: dict[str, Tensor | None] = {}
    for name, weight, bias in (("1", w1, b1), ("2", w2, b2)):
        made = [as_weights(weight[e], None if bias is None else bias[e], dtype) for e in range(len(weight))]
        for key, parts in zip((f"w{name}", f"w{name}_scale", f"b{name}"), zip(*made, strict=True), strict=True):
            tensors[key] = None if parts[0] is None else torch.stack(list(parts))
    return tensors


def _own(tensor: Tensor | None) -> Tensor | None:
    """A copy: a view would keep the tensors of all experts alive."""
    return None if tensor is None else tensor.clone()
