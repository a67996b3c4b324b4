"""y = act(x w' + bias) by a library that keeps the weight in an order of its own: int8, bfloat16 or float32, on a CPU.

The libraries are those that torch carries, and the package's own ("tiles"). An `Engine` is one way to run one dtype;
`fastest` measures which one it is on this machine. int8: weights are symmetric, with a scale for each output;
activations are quantised in the call, to eight bits; products are added in int32. torch's libraries have one scale and
one zero point for all rows of a call, "tiles" one for each row. "int8-token", "int8-bfloat16": torch's libraries get
rows that were divided by their largest magnitudes, so that each has a scale of its own.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebert_kernels.cpu import has_int8_instructions
from moebert_kernels.errors import UserError
from moebert_kernels.serve.dtypes import DTYPES, bias_dtype, input_dtype, is_int8
from moebert_kernels.serve.tiles import ENGINE as TILES
from moebert_kernels.serve.tiles import TiledLinear, unavailable
from moebert_kernels.torch_backend.activation import activate

_TOKEN_ENGINES = (TILES, "fbgemm-token", "onednn-token", "qnnpack-token")
ENGINES = {
    "int8": (TILES, "fbgemm", "onednn", "qnnpack"),
    "int8-token": _TOKEN_ENGINES,
    "int8-bfloat16": _TOKEN_ENGINES,
    "bfloat16": (TILES, "plain", "onednn"),
    "float32": ("plain", "onednn"),
}
_TOKEN = "-token"  # at the end of the names of engines that give each token a scale
# names of the activations that oneDNN applies to a tile while it is in registers
_FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", ""), "silu": ("swish", "")}
_SECONDS, _MOST_ROUNDS, _CLOSE = 0.5, 30, 1.05  # of `fastest`
_PACKED_ROWS = 256  # the row count that oneDNN's order is made for: of 1 to 1,024, the best or near it for all
# what the overloads call: for the experts of few tokens, their Python around it takes 5 % of the time
SMALLEST = 1e-30  # a row of zeros is divided by it
# of an activation; without these instructions products of 8-bit numbers are added in 16 bits, which overflow
_STEPS = 255 if has_int8_instructions() else 127
_linear_dynamic = torch.ops.quantized.linear_dynamic.default._op
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default._op
_linear_plus = torch.ops.mkldnn._linear_pointwise.binary._op


class Weights(NamedTuple):
    """weight (N, K) int8, bfloat16 or float32; scale (N,) float32 of int8 ones, else None; bias (N,) or None.

    An int8 one has its bias in float32, another one in its own dtype.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


class Packed:
    """A linear layer in an engine's form.

    Attributes:
        engine: its name.
        dtype: of inputs and outputs.
        linear: x (..., K) -> x w' + bias (..., N), with as little Python around it as can be.
        compiles: whether the library compiles each number of rows that it has not seen lately.
    """

    engine: str
    dtype: torch.dtype
    linear: Callable[[Tensor], Tensor]
    compiles = False

    def __call__(self, x: Tensor, activation: str = "identity") -> Tensor:
        """act(x (..., K) w' + bias) (..., N); gated activations give N / 2 columns."""
        return activate(self.linear(x), activation, inplace=True)

    def fuses(self, activation: str) -> bool:
        """Whether this activation costs no pass over the outputs."""
        return False

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """x (..., K) w' + bias + residual (..., N)."""
        return self.linear(x).add_(residual)

    def weights(self) -> Weights:
        """What was packed, bit for bit."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return pack, (self.engine, self.weights(), self.dtype)


class _Int8(Packed):
    def __init__(self, engine: str, weights: Weights, activations: torch.dtype) -> None:
        self.engine, self.dtype = engine, activations
        self.compiles = engine.startswith("onednn")
        weight, scale, bias = weights
        assert scale is not None
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        self._has_bias = bias is not None
        self._late_bias = None
        if engine.endswith(_TOKEN):
            self._late_bias = torch.zeros_like(scale) if bias is None else bias.float()
            bias = None
        with quantised_engine(engine.removesuffix(_TOKEN)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # a form torch will give up
            quantised = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(quantised, None if bias is None else bias.float())
        packed, reduced, late_bias = self._packed, _STEPS < 255, self._late_bias

        def linear(x: Tensor) -> Tensor:
            return _linear_dynamic(x, packed, reduced)

        def linear_of_tokens(x: Tensor) -> Tensor:
            # two passes in vectors: `vector_norm` and `aminmax` of rows are 15 times as slow
            x = x.detach()  # `out` refuses what has a gradient
            largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_()).clamp_(min=SMALLEST)
            y = _linear_dynamic(x / largest, packed, reduced)
            return torch.addcmul(late_bias, y, largest, out=y)

        in_float32 = linear if late_bias is None else linear_of_tokens
        self.linear = in_float32 if activations == torch.float32 else lambda x: in_float32(x.float()).to(activations)

    def weights(self) -> Weights:
        weight, bias = torch.ops.quantized.linear_unpack(self._packed)
        bias = bias if self._late_bias is None else self._late_bias
        return Weights(weight.int_repr(), weight.q_per_channel_scales().float(), bias if self._has_bias else None)


class _OneDNN(Packed):
    engine = "onednn"
    compiles = True

    def __init__(self, weights: Weights) -> None:
        self.dtype = weights.weight.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weights.weight.contiguous(), _PACKED_ROWS)
        self._bias = weights.bias
        weight, bias = self._weight, self._bias
        self.linear = lambda x: _linear_pointwise(x, weight, bias, "none", [], "")

    def __call__(self, x: Tensor, activation: str = "identity") -> Tensor:
        if activation not in _FUSED:
            return super().__call__(x, activation)
        name, algorithm = _FUSED[activation]
        return _linear_pointwise(x, self._weight, self._bias, name, [], algorithm)

    def fuses(self, activation: str) -> bool:
        return activation in _FUSED

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return _linear_plus(x, residual, self._weight, self._bias, "add")

    def weights(self) -> Weights:
        return Weights(self._weight.to_dense(), None, self._bias)


class _Plain(Packed):
    engine = "plain"

    def __init__(self, weights: Weights) -> None:
        self.dtype = weights.weight.dtype
        self.compiles = self.dtype == torch.bfloat16 and _bfloat16_by_onednn()
        self._weights = Weights(weights.weight.contiguous(), None, weights.bias)
        weight, _, bias = self._weights
        self.linear = lambda x: torch.nn.functional.linear(x, weight, bias)

    def weights(self) -> Weights:
        return self._weights


class _Tiles(Packed):
    engine = TILES

    def __init__(self, weights: Weights, activations: torch.dtype) -> None:
        self.linear = self._tiled = TiledLinear(*weights, activations)
        self.dtype = activations

    def weights(self) -> Weights:
        return Weights(*self._tiled.weights())


def pack(engine: str, weights: Weights, activations: torch.dtype) -> Packed:
    """Weights in the form of an engine; int8 ones can have activations in float32 or bfloat16, others in their own."""
    if engine == TILES:
        return _Tiles(weights, activations)
    if weights.weight.dtype == torch.int8:
        return _Int8(engine, weights, activations)
    return _OneDNN(weights) if engine == "onednn" else _Plain(weights)


def _bfloat16_by_onednn() -> bool:
    """Whether torch gives it products of this dtype on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rounded_rows(count: int) -> int:
    """At least as many, and at most a sixteenth more: from 32 on one of 16 numbers below each power of two.

    oneDNN takes up to 20 times as long for a number of rows that is new to it, and remembers 1,024 products.
    """
    step = 1 << max(count.bit_length() - 5, 0)
    return -(-count // step) * step


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight (N, K) as int8 in [-127, 127], and the scale (N,) float32 of each row: weight = int8 * scale."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def rounded_activation(x: Tensor, dtype: str) -> Tensor:
    """On 8 bits, or 7 as `_Int8` has it here, between the smallest and the largest number, of all or of each row.

    The gradient is that of x.
    """
    if not x.numel():
        return x
    with torch.no_grad():
        values = x.float()
        of_rows = DTYPES[dtype].token_scales
        largest = values.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) if of_rows else None
        values = values if largest is None else values / largest
        low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
        scale = ((high - low) / _STEPS).clamp(min=SMALLEST)
        zero = (-low / scale).round()
        rounded = ((values / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)
        change = (rounded if largest is None else rounded * largest).to(x.dtype) - x
    return x + change


def with_token_scales(engine: str) -> str:
    """The engine of "int8-token" that has the library of this one of "int8"."""
    return engine if engine == TILES else engine + _TOKEN


def converted(weight: Tensor, bias: Tensor | None, dtype: str) -> Weights:
    """A dense layer's weight and bias in one of `DTYPES`, in memory of their own."""
    bias = None if bias is None else bias.detach().to(bias_dtype(dtype), copy=True)
    if is_int8(dtype):
        return Weights(*quantised(weight), bias)
    return Weights(weight.detach().to(DTYPES[dtype].weights, copy=True), None, bias)


def available(dtype: str) -> list[str]:
    """The engines of this machine's torch for one of `DTYPES`.

    Raises:
        UserError: there are none.
    """
    if is_int8(dtype):
        supported = torch.backends.quantized.supported_engines
        found = [name for name in ENGINES[dtype] if name.removesuffix(_TOKEN) in supported]
        if len(found) > 1:
            found = [name for name in found if not name.startswith("qnnpack")]  # made for ARM
    else:
        with_onednn = torch.backends.mkldnn.is_available() if dtype == "float32" else _bfloat16_by_onednn()
        found = ["plain", "onednn"] if with_onednn else ["plain"]
    if unavailable(dtype) is None:
        found.insert(0, TILES)
    if not found:
        raise UserError(f"dtype: expected one that this build of torch can run, got {dtype!r}; take 'bfloat16'")
    return found


class Choice(NamedTuple):
    """What `fastest` found.

    Attributes:
        engine: the fastest.
        shape: (N, K) of the layers.
        rows: of the input.
        best_us: the shortest time of a call, the median of the layers', by engine; empty where there was one alone. The
            shortest, because what else runs on a machine only adds.
    """

    engine: str
    shape: tuple[int, int]
    rows: int
    best_us: dict[str, float]


def fastest(dtype: str, samples: Sequence[Weights], rows: int) -> Choice:
    """The engine for layers of one shape, by interleaved calls with made-up inputs, in about half a second.

    Args:
        dtype: one of `DTYPES`.
        samples: a few layers of that shape: with one alone, its weight would stay in the cache.
        rows: of each input.
    """
    engines = available(dtype)
    (N, K) = samples[0].weight.shape
    if len(engines) == 1:
        return Choice(engines[0], (N, K), rows, {})
    x = torch.linspace(-2, 2, rows * K).sin().view(rows, K).to(input_dtype(dtype))
    layers = {engine: [pack(engine, weights, x.dtype) for weights in samples] for engine in engines}
    shortest = {engine: [float("inf")] * len(samples) for engine in engines}
    with torch.inference_mode():
        for engine in engines:
            layers[engine][0](x)
        end = time.perf_counter() + _SECONDS
        for round_ in range(_MOST_ROUNDS):
            for k in range(len(samples)):
                for engine in engines:
                    start = time.perf_counter()
                    layers[engine][k](x)
                    shortest[engine][k] = min(shortest[engine][k], time.perf_counter() - start)
            if round_ and time.perf_counter() > end:
                break
    best = {engine: statistics.median(found) * 1e6 for engine, found in shortest.items()}
    # what is too close to tell apart goes to the first one, so that two models of a machine get the same
    chosen = next(engine for engine in engines if best[engine] <= _CLOSE * min(best.values()))
    return Choice(chosen, (N, K), rows, best)


@contextmanager
def quantised_engine(name: str) -> Iterator[None]:
    """torch's quantised engine, which decides in which form `linear_prepack` packs."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
