"""Training with the roundings of int8 in the forward, so that a model learns to bear them.

Gradients pass straight through (1712.05877, section 3). Weights stay in floating point, under the names that they had.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moebert_kernels import reference
from moebert_kernels.errors import UserError
from moebert_kernels.grouping import Grouping
from moebert_kernels.nn.context import derived_class
from moebert_kernels.ops._routing import resolve_routing, resolve_routing_weights
from moebert_kernels.ops.expert_gemm import expert_gemm
from moebert_kernels.serve.dtypes import DTYPES, is_int8
from moebert_kernels.serve.embedding import PackedEmbedding
from moebert_kernels.serve.experts import PackedExperts, is_padding
from moebert_kernels.serve.modules import PackedLinear
from moebert_kernels.serve.packed import quantised, rounded_activation
from moebert_kernels.serve.preparation import check, packable


class int8_forward:
    """Inside, a model's forward rounds weights and activations as `prepare(model, dtype)` does; gradients pass through.

    For any loop that trains, and for evaluations: scores inside are about those of the prepared model. What `prepare`
    leaves in floating point is left here too. The scale of experts' activations is one for all experts of a layer.

    Args:
        model: of transformers, dense or converted; its modules' classes change while inside.
        dtype: "int8", "int8-token" or "int8-bfloat16", as for `prepare`; activations stay in the dtype they are in.

    Raises:
        UserError: another dtype, or a model that is prepared, is inside already, or has no layer to round.
    """

    def __init__(self, model: Any, dtype: str = "int8") -> None:
        if dtype not in DTYPES or not is_int8(dtype):
            raise UserError(f"dtype: expected one of {', '.join(filter(is_int8, DTYPES))}, got {dtype!r}")
        check(model, dtype, 1, any_device=True)
        if any(hasattr(module, "rounded_as") for module in model.modules()):
            raise UserError("model: expected one whose forward is not in int8 yet, got one that is")
        self.model, self.dtype = model, dtype
        self.modules: list[tuple[Any, type]] = []

    def __enter__(self) -> int8_forward:
        for _, _, child, kind in packable(self.model, self.dtype):
            if kind in _CLASSES and not hasattr(child, "rounded_as"):  # a module may stand in two places
                self.modules.append((child, type(child)))
                child.__class__ = _CLASSES[kind](type(child))
                object.__setattr__(child, "rounded_as", self.dtype)
        if not self.modules:
            raise UserError("model: expected linear layers or experts that int8 changes, found none")
        return self

    def __exit__(self, *_: object) -> None:
        for module, before in self.modules:
            module.__class__ = before
            del module.rounded_as
        self.modules = []


class Int8Callback(TrainerCallback):
    """`int8_forward` during a training by `MoETrainer` or `Trainer`, evaluations included.

    Args:
        dtype: as for `int8_forward`.
        start: share of the training, in [0, 1), that is in floating point before. Of its evaluations none is the best.
    """

    def __init__(self, dtype: str = "int8", start: float = 0.0) -> None:
        if not 0 <= start < 1:
            raise UserError(f"start: expected a share of the training in [0, 1), got {start!r}")
        self.dtype, self.start = dtype, start
        self._inside: int8_forward | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        first = self.start * state.max_steps
        if self._inside is None and state.global_step >= first:
            if state.global_step - 1 < first and state.global_step:  # scores until now were those of the other forward
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            self._inside = int8_forward(getattr(model, "module", model), self.dtype).__enter__()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.release()

    def release(self) -> None:
        """Give the model its own forward back; `MoETrainer` does after a training that failed too."""
        if self._inside is not None:
            self._inside.__exit__()
            self._inside = None


def rounded_weight(weight: Tensor) -> Tensor:
    """(..., K) as int8 with a scale for each row has it; the gradient is that of `weight`."""
    with torch.no_grad():
        q, scale = quantised(weight.reshape(-1, weight.shape[-1]))
        change = (q * scale[:, None]).view(weight.shape).to(weight.dtype) - weight
    return weight + change


@functools.cache
def rounded_linear_class(base: Any) -> Any:
    """The class of an nn.Linear, or of GPT-2's Conv1D."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight.T if base.__name__ == "Conv1D" else self.weight
        return F.linear(rounded_activation(x, self.rounded_as), rounded_weight(weight), self.bias)

    return derived_class(rounded_linear_class, base, (base,), {"forward": forward})


@functools.cache
def rounded_embedding_class(base: Any) -> Any:
    """The class of an nn.Embedding: what is looked up are whole rows."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        return rounded_weight(base.forward(self, ids))

    return derived_class(rounded_embedding_class, base, (base,), {"forward": forward})


@functools.cache
def rounded_experts_class(base: Any) -> Any:
    """The class of `Experts` of any kind."""

    def forward(self: Any, x: Tensor, routing: Grouping | Tensor, routing_weights: Tensor | None = None) -> Tensor:
        grouping = resolve_routing(x, routing, self.num_experts, max_top_k=1 if self.adds_residual else None)
        p = resolve_routing_weights(x, grouping.top_k, routing_weights)
        flat = x.reshape(-1, x.shape[-1])
        (w1, w2), (b1, b2) = self.weights(grouping.offsets), self.biases()
        skipped = grouping.assignment_to_row >= grouping.offsets[-1]
        unread = skipped.view(-1, grouping.top_k).all(1, keepdim=True)  # their values would decide the scale
        read = rounded_activation(flat.masked_fill(unread, 0), self.rounded_as)
        rows = expert_gemm(read, rounded_weight(w1), grouping, b1, gather=True)
        h = F.dropout(reference.activate(rows, self.activation), self.hidden_dropout, self.training)
        y = expert_gemm(rounded_activation(h, self.rounded_as), rounded_weight(w2), grouping, b2)
        y = y.index_select(0, grouping.assignment_to_row)
        if self.adds_residual:
            y = _normed(self, flat, y, grouping)
        if p is not None:
            y = y * p.reshape(-1, 1)
        passed = y.new_zeros(())
        if self.adds_residual:
            padding = is_padding(len(flat))
            passed = (flat if padding is None else flat.masked_fill(padding.to(x.device)[:, None], 0)).to(y.dtype)
        y = torch.where(skipped[:, None], passed, y)
        if grouping.top_k > 1:
            y = y.view(-1, grouping.top_k, y.shape[1]).sum(1)
        return y.view(x.shape)

    return derived_class(rounded_experts_class, base, (base,), {"forward": forward})


def _normed(experts: Any, x: Tensor, y: Tensor, grouping: Grouping) -> Tensor:
    """LayerNorm_e(x + dropout(y)) (T, H), in token order."""
    z = x + F.dropout(y, experts.output_dropout, experts.training)
    rows = torch.searchsorted(grouping.offsets[1:], grouping.assignment_to_row, right=True)
    expert = rows.clamp(max=experts.num_experts - 1)
    normed = F.layer_norm(z, z.shape[1:], eps=experts.eps)
    return torch.addcmul(experts.norm_bias[expert], normed, experts.norm_weight[expert])


_CLASSES: dict[type, Any] = {
    PackedLinear: rounded_linear_class, PackedEmbedding: rounded_embedding_class, PackedExperts: rounded_experts_class,
}  # fmt: skip
