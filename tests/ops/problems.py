"""Problems that nobody chose, for the ops: what the fuzz draws, and how a drawn problem becomes tensors."""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st

from moebert_kernels.activation import ACTIVATIONS, is_gated
from tests.ops.cases import DTYPES

LAYOUTS = ("plain", "transposed", "expanded", "sliced")
ROUTES = ("even", "random", "skipping", "one expert", "nobody", "far outside")
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)
HALVES = (torch.bfloat16, torch.float16)


def sizes(largest: int) -> st.SearchStrategy[int]:
    """1 to `largest`, with those around Triton's smallest tile more often."""
    return st.one_of(st.sampled_from([s for s in (1, 2, 15, 16, 17, 33) if s <= largest]), st.integers(1, largest))


@dataclasses.dataclass(frozen=True)
class Routed:
    """Tokens with experts: sizes, routing and the form of the tensors. `seed` decides the values."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    route: str
    id_dtype: torch.dtype
    dtype: torch.dtype
    autocast: torch.dtype | None
    layouts: tuple[str, ...]  # of x, w1, w2, dy and the biases
    bias1: bool
    bias2: bool
    weighted: bool
    grouped: bool  # the op gets a Grouping
    leading: bool  # x has two leading dimensions
    activation: str
    eps: float
    dropout_p: float
    hidden_dropout_p: float
    recompute: bool
    gather: bool
    frozen: int  # bit i: the i-th tensor wants no gradient
    seed: int

    def expert_ids(self) -> torch.Tensor:
        """(T, top_k)."""
        shape, last = (self.tokens, self.top_k), self.experts - 1
        ids = {
            "even": lambda: torch.arange(self.tokens * self.top_k).view(shape) % self.experts,
            "random": lambda: torch.randint(0, self.experts, shape),
            "skipping": lambda: torch.randint(-2, self.experts + 2, shape),
            "one expert": lambda: torch.full(shape, last),
            "nobody": lambda: torch.full(shape, -1),
            "far outside": lambda: torch.where(
                torch.rand(shape) < 0.5, torch.iinfo(self.id_dtype).min, torch.randint(0, self.experts, shape)
            ),
        }[self.route]()
        return ids.to(self.id_dtype)

    def tensors(self, norm: bool = False) -> list[torch.Tensor | None]:
        """x, w1, b1, w2, b2, with `norm` its two, and the routing weights; values that autocast does not round."""
        rows = 2 * self.width if is_gated(self.activation) else self.width
        x, w1, w2, _, bias = self.layouts
        made = [
            laid_out((self.tokens, self.hidden), x),
            laid_out((self.experts, rows, self.hidden), w1, self.hidden**-0.5),
            laid_out((self.experts, rows), bias) if self.bias1 else None,
            laid_out((self.experts, self.hidden, self.width), w2, self.width**-0.5),
            laid_out((self.experts, self.hidden), bias) if self.bias2 else None,
        ]
        if norm:
            made += [laid_out((self.experts, self.hidden), bias, 0.1, 1.0), laid_out((self.experts, self.hidden), bias)]
        made.append(laid_out((self.tokens, self.top_k), bias, 0.5, 1.0) if self.weighted else None)
        return [None if t is None else with_values_of(t, self.autocast, self.dtype) for t in made]

    def output_gradient(self, *shape: int) -> torch.Tensor:
        return with_values_of(laid_out(shape, self.layouts[3]), self.autocast, self.dtype)


def laid_out(shape: tuple[int, ...], layout: str, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    """Normal values in a tensor of this shape whose memory is laid out in an unusual way."""
    if layout == "transposed" and len(shape) > 1:
        base = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    elif layout == "expanded":
        base = torch.randn(1, *shape[1:]).expand(shape)
    elif layout == "sliced":
        base = torch.randn(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    else:
        base = torch.randn(shape)
    return base.mul(scale).add(mean) if layout == "plain" else _like_strides(base, base.mul(scale).add(mean))


def _like_strides(base: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` in memory like that of `base`; where elements share memory they share values too."""
    span = 1 + base.storage_offset() + sum((n - 1) * s for n, s in zip(base.shape, base.stride(), strict=True) if n)
    memory = values.new_full((max(span, 1),), math.nan)  # between the elements nothing may be read
    view = memory.as_strided(base.shape, base.stride(), base.storage_offset())
    view.copy_(values) if 0 not in base.stride() else view[:1].copy_(values[:1])
    return view


def with_values_of(t: torch.Tensor, narrow: torch.dtype | None, dtype: torch.dtype) -> torch.Tensor:
    """`t` in `dtype`, its values those of `narrow`, its strides as they are."""
    return _like_strides(t, t.to(narrow or dtype).to(dtype)) if t.numel() else t.to(dtype)


@st.composite
def routed(draw, largest: int, widest: torch.dtype, max_top_k: int = 3) -> Routed:
    dtype = draw(st.sampled_from([d for d in DTYPES if widest == torch.float64 or d != torch.float64]))
    hidden = draw(sizes(largest))
    flags = {f.name: draw(st.booleans()) for f in dataclasses.fields(Routed) if f.type == "bool"}
    dropout = st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.99])
    return Routed(
        tokens=draw(st.one_of(st.just(0), sizes(2 * largest))), hidden=hidden, width=draw(sizes(largest)),
        experts=draw(st.integers(1, 9)), top_k=draw(st.integers(1, max_top_k)), route=draw(st.sampled_from(ROUTES)),
        id_dtype=draw(st.sampled_from(ID_DTYPES)), dtype=dtype,
        autocast=draw(st.sampled_from((None, None, *HALVES))) if dtype == torch.float32 else None,
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(5)), **flags,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        # with few columns a variance may be as small as rounding
        eps=1e-2 if hidden < 8 else draw(st.sampled_from([1e-12, 1e-5])),
        dropout_p=draw(dropout), hidden_dropout_p=draw(dropout),
        frozen=draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 26, 255, 509])), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sites:
    """An MPO: factors and bonds of its sites."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    bonds: tuple[int, ...]
    central_site: int
    experts: int
    counts: tuple[int, ...] | None
    dtype: torch.dtype
    autocast: torch.dtype | None
    layout: str
    frozen: int
    seed: int

    def tensors(self) -> list[torch.Tensor]:
        """The central tensor and the auxiliary ones."""
        made = []
        for k, (i, j) in enumerate(zip(self.rows, self.columns, strict=True)):
            shape = (self.bonds[k], i, j, self.bonds[k + 1])
            shape = shape if k == self.central_site else (self.experts, *shape)
            made.append(with_values_of(laid_out(shape, self.layout, self.bonds[k] ** -0.5), self.autocast, self.dtype))
        return [made.pop(self.central_site), *made]


@st.composite
def sites(draw, largest: int, widest: torch.dtype) -> Sites:
    count, experts = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([d for d in DTYPES if widest == torch.float64 or d != torch.float64]))
    return Sites(
        rows=tuple(draw(st.integers(1, 4)) for _ in range(count)),
        columns=tuple(draw(st.integers(1, 3)) for _ in range(count)),
        bonds=(1, *(draw(sizes(largest)) for _ in range(count - 1)), 1), central_site=draw(st.integers(0, count - 1)),
        experts=experts, dtype=dtype, layout=draw(st.sampled_from(LAYOUTS)),
        counts=draw(st.one_of(st.none(), st.tuples(*[st.integers(0, 2)] * experts))),
        autocast=draw(st.sampled_from((None, None, *HALVES))) if dtype == torch.float32 else None,
        frozen=draw(st.sampled_from([0, 0, 1, 2, 6])), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip
