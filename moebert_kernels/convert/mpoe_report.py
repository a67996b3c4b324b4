"""What sharing central tensors saves: parameters and memory of an MPOE model, and of one with as many dense experts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from moebert_kernels.errors import UserError
from moebert_kernels.models.mpoe_layers import MPOEFeedForward
from moebert_kernels.nn import MPOExperts

_MIB = 2**20


@dataclass(frozen=True)
class MPOEReport:
    """Counts of parameters, and memory in MiB at the model's dtype.

    Attributes:
        num_experts: E.
        parameters: of the whole model.
        switch_parameters: of the same model with dense experts, as in Switch Transformers.
        central, auxiliary: parameters of the experts' weights that are shared, and those of all experts together.
        dense: parameters of one dense feed-forward's weights, summed over the layers.
        checkpoint_mib, switch_checkpoint_mib: of both models' parameters.
        folded_mib: what inference keeps beside them, all experts' folded weights; 0 with dense experts.
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
    """Count an MPOE model, also one on the meta device.

    Raises:
        UserError: a model without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, MPOEFeedForward)]
    if not layers:
        raise UserError(f"model: expected an MPOE model, got {type(model).__name__}")
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
