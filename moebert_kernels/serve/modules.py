"""The modules of a prepared model: linear layers and experts whose weights are packed.

Each has two states. `empty` ones have the buffers of a checkpoint, for transformers to fill; `pack` turns them into the
form of an engine, and `state_dict` turns that back into the same buffers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.serve.dtypes import DTYPES, bias_dtype, input_dtype, is_int8
from moebert_kernels.serve.packed import Packed, Weights, converted, pack, with_token_scales
from moebert_kernels.serve.tiles import TiledExperts

Engines = Callable[[tuple[int, int], bool], str]  # shape (N, K), and whether of experts -> engine


class PackedModule(nn.Module):
    """What can be packed: `names` of its buffers and `pack`; `tensors` gives the buffers back."""

    dtype: str  # one of DTYPES
    token_scales: frozenset[str] = frozenset()  # those of `products` that get them in an int8 model
    source: Any = None  # the embedding that has this module's weight and scale, where a model ties them

    def tie(self, source: nn.Module) -> None:
        """Take weight and scale from an embedding, nn's or packed, and keep none; checkpoints have them once."""
        self._buffers.pop("weight", None)
        self._buffers.pop("scale", None)
        object.__setattr__(self, "source", source)  # no submodule: its tensors have one name

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "scale") and self.source is not None:
            return getattr(self.source, name)
        return super().__getattr__(name)

    def products(self) -> dict[str, Packed | TiledExperts]:
        """The linear layers inside, once they are packed, by names that are this module's own."""
        return {}

    def tiles(self) -> bool:
        """Whether all that is inside runs in the engine "tiles" on this machine."""
        return False

    def _pack(self, product: str, engine: str, weights: Weights) -> Packed:
        engine = with_token_scales(engine) if product in self.token_scales else engine
        return pack(engine, weights, input_dtype(self.dtype))

    def shapes(self) -> Iterator[tuple[tuple[int, int], bool, list[Weights]]]:
        """Of every kind of linear layer inside: shape (N, K), whether of experts, and the layers."""
        yield from ()

    def pack(self, engines: Engines) -> None:
        """Put the buffers in the form of engines."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The buffers of a checkpoint, by name; those that are None are left out."""
        raise NotImplementedError

    def _fill(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Become an empty module with these buffers."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self.register_buffer(name, tensor)

    def _take(self) -> dict[str, Tensor]:
        """The buffers, which are removed."""
        taken = dict(self._buffers)
        self._buffers.clear()
        return {name: tensor for name, tensor in taken.items() if tensor is not None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in (self._buffers or self.tensors()).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        raise UserError("load_state_dict: expected a model that is not prepared; load the weights, then prepare it")


def products_of(model: nn.Module) -> dict[str, Packed | TiledExperts]:
    """The linear layers of all packed modules by name: a module's own, with w1.3 behind it for its fourth expert's."""
    return {
        f"{prefix}.{name}".removesuffix("."): packed
        for prefix, module in model.named_modules()
        if isinstance(module, PackedModule)
        for name, packed in module.products().items()
    }


class PackedLinear(PackedModule):
    """nn.Linear with a packed weight; inputs and outputs have the model's dtype.

    Buffers: weight (N, K), scale (N,) of int8 ones, bias (N,) or none; of a tied one bias alone.
    """

    def __init__(self, weights: Weights, dtype: str) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_features, self.in_features = weights.weight.shape
        self._packed: Packed | None = None
        self._fill(weights._asdict())

    @classmethod
    def of(cls, module: Any, dtype: str) -> PackedLinear:
        """From an nn.Linear, or from GPT-2's Conv1D, which keeps (in, out)."""
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        return cls(as_weights(weight, module.bias, dtype), dtype)

    def shapes(self) -> Iterator[tuple[tuple[int, int], bool, list[Weights]]]:
        yield (self.out_features, self.in_features), False, [self._weights()]

    def pack(self, engines: Engines) -> None:
        engine = engines((self.out_features, self.in_features), False)
        weights = self._weights()
        self._take()
        self._packed = self._pack("", engine, weights)
        # models ask for their layers' shape and dtype
        self.weight = torch.empty(self.out_features, self.in_features, dtype=self._packed.dtype, device="meta")

    def products(self) -> dict[str, Packed | TiledExperts]:
        return {} if self._packed is None else {"": self._packed}

    def _weights(self) -> Weights:
        own = Weights(*(self._buffers.get(name) for name in Weights._fields))
        if self.source is None:
            return own
        weight, scale = self.source.weight.detach(), getattr(self.source, "scale", None)
        return Weights(weight.to(DTYPES[self.dtype].weights), scale, own.bias)

    def tensors(self) -> dict[str, Tensor]:
        if self._packed is None:  # a tied one without a bias, which has no buffers
            return {}
        names = Weights._fields if self.source is None else ("bias",)
        return {name: t for name, t in self._packed.weights()._asdict().items() if t is not None and name in names}

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed
        assert packed is not None
        if x.dtype is not packed.dtype:
            raise ValueError(f"x: expected {packed.dtype} in a model prepared as {self.dtype}, got {x.dtype}")
        return packed.linear(x)

    def extra_repr(self) -> str:
        engine = "empty" if self._packed is None else self._packed.engine
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}, engine={engine}"


def as_weights(weight: Tensor, bias: Tensor | None, dtype: str) -> Weights:
    """`converted`, on the meta device too, where there are no values."""
    if not weight.is_meta:
        return converted(weight, bias, dtype)
    scale = torch.empty(len(weight), dtype=torch.float32, device="meta") if is_int8(dtype) else None
    bias = None if bias is None else torch.empty_like(bias, dtype=bias_dtype(dtype))
    made = torch.empty_like(weight, dtype=DTYPES[dtype].weights, memory_format=torch.contiguous_format)
    return Weights(made, scale, bias)
