"""Converted models with MPOE's experts (2203.01104): what sharing central tensors saves, and the export to copies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from moebert_kernels.convert.replace import set_config
from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import SPLITS
from moebert_kernels.layers.feed_forward import MoEFeedForward
from moebert_kernels.layers.routing import moe_layers
from moebert_kernels.nn import DenseExperts, MPOExperts

_MIB = 2**20


@dataclass(frozen=True)
class MPOEReport:
    """Counts of parameters, and memory in MiB at the model's dtype.

    Attributes:
        num_experts: E.
        parameters: those of the whole model.
        switch_parameters: those of the same model with dense experts, as in Switch Transformers.
        central, auxiliary: parameters of the experts' weights that are shared, and those of all experts together.
        dense: parameters of one dense feed-forward's weights, summed over the layers.
        checkpoint_mib, switch_checkpoint_mib: the memory of both models' parameters.
        folded_mib: what inference keeps in addition, all experts' folded weights; 0 with dense experts.
    """

    num_experts: int
    parameters: int
    switch_parameters: int
    central: int
    auxiliary: int
    dense: int
    checkpoint_mib: float
    switch_checkpoint_mib: float
    folded_mib: float

    @property
    def ratio(self) -> float:
        """Parameters of the experts' weights over those of dense experts: 1 / E + aux / dense at full bonds."""
        return (self.central + self.auxiliary) / (self.num_experts * self.dense)

    @property
    def aux_share(self) -> float:
        """Auxiliary parameters of one expert over those of a dense feed-forward."""
        return self.auxiliary / (self.num_experts * self.dense)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "aux_share": self.aux_share}

    def __str__(self) -> str:
        E = self.num_experts
        shared = self.central / (E * self.dense)
        return (
            f"parameters {self.parameters / 1e6:,.1f}M, with {E} dense experts {self.switch_parameters / 1e6:,.1f}M "
            f"({self.switch_parameters / self.parameters:.2f} times)\n"
            f"experts' weights {self.ratio:.4f} of dense ones' = shared {shared:.4f} (1 / E = {1 / E:.4f}) "
            f"+ aux / dense {self.aux_share:.4f}\n"
            f"memory {self.checkpoint_mib:,.0f} MiB, with dense experts {self.switch_checkpoint_mib:,.0f} MiB; "
            f"folded for inference {self.folded_mib:,.0f} MiB more"
        )


def mpoe_report(model: nn.Module) -> MPOEReport:
    """Count a model converted with experts="mpo" or, to compare, "copy"; also one on the meta device.

    Raises:
        UserError: another model.
    """
    layers = _layers_of_whole_experts(model)
    central = auxiliary = dense = 0
    for layer in layers:
        experts: Any = layer.experts
        dense += experts.w1.shape[1:].numel() + experts.w2.shape[1:].numel()
        if isinstance(experts, MPOExperts):
            central += experts.w1.central.numel() + experts.w2.central.numel()
            auxiliary += sum(aux.numel() for weight in (experts.w1, experts.w2) for aux in weight.aux)
        else:
            auxiliary += experts.w1.numel() + experts.w2.numel()
    E = layers[0].experts.num_experts
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mean_bytes = sum(p.numel() * p.element_size() for p in model.parameters()) / parameters
    switch = parameters - central - auxiliary + E * dense
    return MPOEReport(
        num_experts=E,
        parameters=parameters,
        switch_parameters=switch,
        central=central,
        auxiliary=auxiliary,
        dense=dense,
        checkpoint_mib=parameters * mean_bytes / _MIB,
        switch_checkpoint_mib=switch * mean_bytes / _MIB,
        folded_mib=E * dense * mean_bytes / _MIB if central else 0.0,
    )


@torch.no_grad()
def to_dense_experts(model: nn.Module) -> Any:
    """Replace experts="mpo", in place, by experts="copy" with the weights to which the shared tensors fold.

    The model computes the same with the weights of Switch-style experts: w1 (E, I or 2I, H) and w2 (E, H, I) in each
    layer, on the same devices and in the same dtypes. A model with such experts stays as it is. Returns the model.

    Raises:
        UserError: the model has experts of neither kind.
    """
    for layer in _layers_of_whole_experts(model):
        folded: Any = layer.experts
        if not isinstance(folded, MPOExperts):
            continue
        w1, w2 = folded.weights()
        bias = "none" if folded.b1 is None else "shared" if folded.b1.ndim == 1 else "expert"
        with torch.device("meta"):
            layer.experts = DenseExperts(
                w2.shape[1], w2.shape[2], folded.num_experts,
                activation=folded.activation, bias=bias, hidden_dropout=folded.hidden_dropout,
            )  # fmt: skip
        layer.experts.w1, layer.experts.w2 = nn.Parameter(w1), nn.Parameter(w2)
        layer.experts.b1, layer.experts.b2 = folded.b1, folded.b2
        layer.experts.train(folded.training)
    config: Any = model.config
    set_config(
        model, replace(config.quantization_config, experts="copy", w1_factors=None, w2_factors=None, max_bond=None)
    )
    return model


def _layers_of_whole_experts(model: Any) -> list[MoEFeedForward]:
    """The layers of a model whose experts are each a whole feed-forward: MPOE's, or copies."""
    layers = moe_layers(model)
    if not layers or model.config.quantization_config.experts in SPLITS:
        got = f" with experts={model.config.quantization_config.experts!r}" if layers else ""
        raise UserError(
            f"model: expected a model converted with experts='mpo' or 'copy', got {type(model).__name__}{got}"
        )
    return layers
