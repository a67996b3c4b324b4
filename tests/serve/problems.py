"""Random experts and tokens, and what prepared experts may give for them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels import reference
from moebert_kernels.activation import ACTIVATIONS
from moebert_kernels.cpu import has_int8_instructions
from moebert_kernels.layers import NormedExperts
from moebert_kernels.nn import DenseExperts
from moebert_kernels.serve.dtypes import DTYPES, input_dtype, is_int8
from moebert_kernels.serve.experts import PackedExperts
from moebert_kernels.serve.packed import ENGINES, available
from moebert_kernels.serve.tiles import ENGINE as TILES
from tests.helpers import assert_as_accurate

SEVEN_BITS = not has_int8_instructions()  # of activations, on CPUs that add products of 8-bit numbers in 16 bits


@dataclass(frozen=True)
class Problem:
    """Experts of any kind, tokens in any layout, with any routing."""

    dtype: str
    engine: str
    experts: Any
    x: Tensor  # (T, H)
    ids: Tensor  # (T,) or (T, top_k)
    weights: Tensor | None

    @staticmethod
    def draw(seed: int, dtype: str) -> Problem:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        # of one neuron alone, plain torch's own error is that of one number, and by luck nothing
        H, I, E = rng.choice([8, 9, 16, 40]), rng.choice([5, 6, 16, 33]), rng.choice([1, 2, 4, 7])
        T = rng.choice([0, 1, 2, 7, 33, 70, 150])
        normed = rng.random() < 0.5
        top_k = 1 if normed else rng.randint(1, min(E, 3))
        kind = NormedExperts if normed else DenseExperts
        experts = kind(
            H, I, E, activation=rng.choice(ACTIVATIONS), bias=rng.choice(["none", "expert", "shared"]),
            **({"eps": 1e-5} if normed else {}),
        )  # fmt: skip
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=rng.choice([0.1, 1.0]))
        to = input_dtype(dtype)
        experts = experts.to(to).eval()
        x = torch.randn(T, H, dtype=to) * rng.choice([0.1, 1.0, 5.0])
        if rng.random() < 0.3:
            x = torch.randn(H, T, dtype=to).t()
        low, high = rng.choice([(0, E), (-1, E), (-2, E + 2), (0, max(E - 2, 1)), (-1, 0)])
        ids = torch.randint(low, high, (T,) if top_k == 1 else (T, top_k))
        weights = torch.rand(ids.shape, dtype=to) if rng.random() < 0.5 else None
        return Problem(
            dtype, rng.choice([e for e in ENGINES[dtype] if e in available(dtype)]), experts, x, ids,
            weights,
        )  # fmt: skip

    def packed(self) -> PackedExperts:
        made = PackedExperts.of(self.experts, self.dtype)
        made.pack(lambda shape, of_experts: self.engine)
        return made

    def check(self) -> None:
        """Compare with the reference in float64, of the dequantised weights where they are int8."""
        got = self.packed()(self.x, self.ids, self.weights)
        if is_int8(self.dtype):
            self._check_int8(got)
            return
        assert_as_accurate(got, self._reference(self.x.dtype), self._reference(torch.float64), str(self))

    def _reference(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            e = self.experts
            b1, b2 = e.biases()
            arguments: list[Any] = [e.w1, b1, e.w2, b2]
            options: dict[str, Any] = {"activation": e.activation}
            function = reference.fused_moe_ffn
            if e.adds_residual:
                arguments += [e.norm_weight, e.norm_bias]
                function, options["eps"] = reference.fused_moe_ffn_add_norm, e.eps
            weights = None if self.weights is None else self.weights.to(dtype)
            cast = [None if a is None else a.to(dtype) for a in arguments]
            return function(self.x.to(dtype), self.ids, *cast, routing_weights=weights, **options)

    def _check_int8(self, got: Tensor) -> None:
        """Each expert's rows with torch's own quantisation of its inputs and activations, all else in float64.

        In bfloat16 the kernel rounds what it gives, and torch's libraries what each product and the activation give;
        where a token has several experts, their sum is rounded too.
        """
        to, rounding_error = self.x.dtype, 2**-8 if self.x.dtype == torch.bfloat16 else 0.0
        tensors = PackedExperts.of(self.experts, "int8")
        rounding = TILES if self.engine == TILES else self.dtype
        w1, w2 = (
            getattr(tensors, n).double() * getattr(tensors, f"{n}_scale").double()[..., None] for n in ("w1", "w2")
        )
        T, H = self.x.shape
        top_k = 1 if self.ids.ndim == 1 else self.ids.shape[1]
        ids = self.ids.view(T, top_k)
        experts, p = self.experts, self.weights
        y = self.x.double() if experts.adds_residual else torch.zeros(T, H, dtype=torch.float64)
        allowed = torch.zeros(T, H, dtype=torch.float64)
        b1, b2 = (None if b is None else b.detach().double() for b in experts.biases())
        for e in range(len(w1)):
            rows, columns = (ids == e).nonzero(as_tuple=True)
            if not len(rows):
                continue
            x, _ = _rounded(self.x[rows].double(), rounding)
            h = _linear(x, w1[e], b1, e)
            if self.engine == TILES:
                h = reference.activate(h, experts.activation)
            else:
                h = reference.activate(h.to(to).double(), experts.activation).to(to).double()
            h_rounded, step_h = _rounded(h, rounding)
            z = _linear(h_rounded, w2[e], b2, e)
            # a number that lies between two steps may fall on either one, in a handful of the activations
            numbers = z.abs().max() + self.x.abs().max() + h.abs().max() * w2[e].abs().max()
            bound = 3 * step_h * w2[e].abs().max() + 1e-5 * numbers + 1e-6
            if self.engine != TILES:  # so may one between two numbers of bfloat16; its square moves by twice as much
                bound = bound + 4 * rounding_error * numbers
            scale = (
                torch.ones(len(rows), 1, dtype=torch.float64)
                if p is None
                else p.reshape(T, top_k)[rows, columns, None].double()
            )
            if experts.adds_residual:
                z = self.x[rows].double() + z
                deviation = (z.var(1, correction=0, keepdim=True) + experts.eps).sqrt()
                bound = 3 * bound * experts.norm_weight[e].abs().max().double() / deviation + 1e-5
                z = torch.layer_norm(
                    z, (H,), experts.norm_weight[e].double(), experts.norm_bias[e].double(), experts.eps
                )
                y[rows] = z * scale
            else:
                y.index_add_(0, rows, z * scale)
            allowed.index_add_(0, rows, (bound + rounding_error * z.abs()) * scale)
        if top_k > 1:
            allowed += rounding_error * y.abs()
        error = (got.double() - y).abs()
        assert got.shape == y.shape and torch.isfinite(got).all()
        assert (error <= allowed + 1e-5 * y.abs()).all(), f"{self}: {(error - allowed).max()}"


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, e: int) -> Tensor:
    return x @ w.T if bias is None else x @ w.T + bias[e]


def _rounded(x: Tensor, dtype: str) -> tuple[Tensor, Any]:
    """x on the grid of 8 or 7 bits between its minimum and maximum, and the size of two steps, of all or each row."""
    x = x.float()
    if dtype == TILES:
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        step = ((high - low) / 255).clamp(min=1e-30)
        zero = (-low / step).round().double()
        # as the kernel computes it: a few bfloat16 numbers in a thousand lie just between two steps
        q = (x.double() * (1 / step).double() + zero).float().round().double().clamp(0, 255)
        return (q - zero) * step.double(), step.double()
    if DTYPES[dtype].token_scales:
        largest = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
        rounded, step = _rounded((x / largest).double(), "int8")
        return rounded * largest, step * largest.double()
    scale, zero_point = torch._choose_qparams_per_tensor(x, SEVEN_BITS)
    quantised = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    return quantised.dequantize().double(), scale
