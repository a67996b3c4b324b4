"""GShard routing: two experts per token, the second one by chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.nn._checks import check_gate_inputs, check_noise_and_capacity, check_sizes
from moebert_kernels.nn.balance import Balance
from moebert_kernels.nn.gate_router import gate_probabilities
from moebert_kernels.nn.switch_router import jittered, place_in_expert
from moebert_kernels.ops._checks import FLOATS, check_shape, is_number

POLICIES = ("all", "none", "random")
MIN_CAPACITY = 4


class Top2Router(nn.Module):
    """Send a token to its two most probable experts, weighted by their normalised gates (GShard, 2006.16668).

    Args:
        hidden_size: H.
        num_experts: E, at least 2.
        policy: which tokens go to their second expert in training: "all", "none", or "random": those for which a
            uniform draw is below g2 / threshold, g2 being the second of the normalised gates.
        eval_policy: the same in evaluation. The original code draws there too ("random").
        threshold: from where on the second expert is certain.
        capacity_factor, eval_capacity_factor: c; an expert takes max(4, min(T, int(c * T / E))) tokens of each
            sequence, first choices first, in order. None: no limit. The original code has 1.25 and 2.
        jitter, noise: as for `SwitchRouter`.
        route_padding: route padding like any token, and count it in the balance loss. T counts it in any case.

    Raises:
        UserError: a value out of its range.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, policy: str = "random", eval_policy: str = "all",
        threshold: float = 0.2, capacity_factor: float | None = None, eval_capacity_factor: float | None = None,
        jitter: float = 0.0, noise: float = 0.0, route_padding: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("policy", policy), ("eval_policy", eval_policy)):
            if value not in POLICIES:
                raise UserError(f"{name}: expected one of {', '.join(POLICIES)}, got {value!r}")
        check_sizes(hidden_size=hidden_size, num_experts=num_experts)
        if num_experts < 2:
            raise UserError(f"num_experts: expected at least 2 for two experts per token, got {num_experts}")
        if not is_number(threshold) or not 0 < threshold < math.inf:
            raise UserError(f"threshold: expected a finite number above 0, got {threshold!r}")
        check_noise_and_capacity(
            jitter, noise, capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor
        )
        self.policy = policy
        self.eval_policy = eval_policy
        self.threshold = threshold
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.jitter = jitter
        self.noise = noise
        self.route_padding = route_padding
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.balance = Balance(num_experts, per_sequence=True)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose two experts for every token.

        Args:
            x: (B, T, H) float.
            attention_mask: (B, T), 0 where a token is padding. None: no padding.
            draws: (B, T), uniform in [0, 1), of the policy "random"; None: from torch's generator.

        Returns:
            expert_ids (B, T, 2) int64, -1 where none is taken; routing_weights (B, T, 2) of the dtype of x;
            balance_loss, a scalar of at least float32: the mean over the sequences.
        """
        check_gate_inputs(self.gate, x, attention_mask, dims=3)
        if draws is not None:
            check_shape("draws", draws, {"B": x.shape[0], "T": x.shape[1]})
            if draws.dtype not in FLOATS or draws.device != x.device:
                raise ValueError(f"draws: expected floats on {x.device} (as x), got {draws.dtype} on {draws.device}")
        counted = None if self.route_padding or attention_mask is None else attention_mask != 0
        probabilities = gate_probabilities(
            self.gate, jittered(x, self.jitter if self.training else 0.0), self.noise if self.training else 0.0
        )
        gates, expert_ids = probabilities.topk(2, dim=-1)
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-9)
        loss = self.balance(probabilities, expert_ids[..., 0], counted)
        if counted is not None:
            expert_ids = expert_ids.masked_fill(~counted.unsqueeze(-1), -1)
        first, second = expert_ids.unbind(-1)
        policy = self.policy if self.training else self.eval_policy
        if policy == "none":
            second = torch.full_like(second, -1)
        elif policy == "random":
            draws = torch.rand_like(gates[..., 1]) if draws is None else draws
            second = second.masked_fill(draws >= gates[..., 1].detach() / self.threshold, -1)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is not None:
            first, second = _within_capacity(first, second, probabilities.shape[-1], factor)
        return torch.stack([first, second], -1), gates.to(x.dtype), loss

    def extra_repr(self) -> str:
        return (
            f"policy={self.policy!r}, eval_policy={self.eval_policy!r}, threshold={self.threshold}, "
            f"capacity_factor={self.capacity_factor}, eval_capacity_factor={self.eval_capacity_factor}, "
            f"jitter={self.jitter}, noise={self.noise}, route_padding={self.route_padding}"
        )


def _within_capacity(first: Tensor, second: Tensor, num_experts: int, factor: float) -> tuple[Tensor, Tensor]:
    """Ids (B, T) with -1 where the expert is full: first choices take their places before all second ones."""
    length = first.shape[1]
    # `int`, `min` and `max` of Python would make the traced length a constant of an exported file
    capacity = torch.sym_max(MIN_CAPACITY, torch.sym_min(length, torch.sym_int(length * factor / num_experts)))
    places = place_in_expert(torch.cat([first, second], 1), num_experts)
    first_place, second_place = places[:, :length], places[:, length:]
    # First choices beyond the capacity take no place, but then the expert is full anyway.
    return first.masked_fill(first_place >= capacity, -1), second.masked_fill(second_place >= capacity, -1)
