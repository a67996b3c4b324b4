"""The experts of transformers' own Mixture-of-Experts models in a prepared model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moebert_kernels.integrations.transformers import activation_of, check_options, weights_of
from moebert_kernels.serve.experts import PackedExperts, expert_tensors
from moebert_kernels.serve.packed import Packed

OWN = "own"  # the name of no activation


class PackedTransformersExperts(PackedExperts):
    """An experts module of transformers with packed weights: y[t] = sum_j p[t, j] * expert_e(x[t]).

    Buffers: those of `PackedExperts` without norms. A gate, an activation or a norm behind the experts that no op
    has is the module's own code: it stays as `own`, without its matrices.
    """

    own: Any

    @classmethod
    def of(cls, experts: Any, dtype: str) -> PackedTransformersExperts:
        """From a module for which `integrations.transformers.is_experts` holds; its matrices are taken away."""
        check_options(experts)
        with torch.no_grad():
            tensors = expert_tensors(*weights_of(experts), dtype)
        activation = activation_of(experts)
        made = cls(tensors, dtype, activation or OWN, None)
        made.top_k = int(getattr(experts.config, "num_experts_per_tok", None) or 1)
        if activation is None:
            for name in [name for name in experts._parameters if "proj" in name]:
                del experts._parameters[name]
            object.__setattr__(made, "own", experts)  # no submodule: transformers would draw its matrices on loading
            if hasattr(experts, "post_expert_norm"):
                made.post_expert_norm = experts.post_expert_norm
        return made

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """(T, H), ids (T, top_k) of which those outside [0, E) are skipped, p (T, top_k) -> (T, H)."""
        return super().forward(hidden_states, top_k_index, top_k_weights).to(hidden_states.dtype)

    def _hidden(self, layer: Packed, x: Tensor) -> Tensor:
        return super()._hidden(layer, x) if self.activation != OWN else self._activate(layer.linear(x))

    def _activate(self, h_pre: Tensor) -> Tensor:
        if self.activation != OWN:
            return super()._activate(h_pre)
        return self.own._apply_gate(h_pre) if self.own.has_gate else self.own.act_fn(h_pre)

    def _outputs(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        outputs = super()._outputs(rows, counts)
        norm: Any = getattr(self, "post_expert_norm", None)
        return outputs if norm is None else [norm(y) for y in outputs]
