"""Switch routing: one expert per token, chosen by a linear layer's softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.nn._checks import check_gate_inputs, check_noise_and_capacity, check_sizes
from moebert_kernels.nn.balance import Balance
from moebert_kernels.nn.gate_router import gate_probabilities

SCALINGS = ("ratio", "probability")


class SwitchRouter(nn.Module):
    """Send a token to its most probable expert (Switch Transformers, 2101.03961; MPOE, 2203.01104).

    The router gives a factor on the *input* of the expert, as MPOE's code does. With "ratio" it is p / stopgrad(p): its
    value is 1, so that a converted model starts as the dense one, and its gradient is the router's. With "probability"
    it is p itself. Scaling the input equals scaling the output, forward and backward, where f(s x) = s f(x) for s > 0:
    experts with relu or identity and without biases (T5's). For gelu, silu, gates or biases it does not.

    Args:
        hidden_size: H.
        num_experts: E.
        scaling: "ratio" or "probability".
        jitter: in training the router's input is multiplied by uniform draws from [1 - jitter, 1 + jitter].
        noise: standard deviation of normal noise on the logits in training.
        capacity_factor: c; an expert takes the first max(1, int(c * T / E)) of its tokens, and the others are dropped
            (the original keeps random ones). None: no limit.
        route_padding: route padding like any token, and count it in the balance loss. T counts it in any case.

    Raises:
        UserError: a value out of its range.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, scaling: str = "ratio", jitter: float = 0.0, noise: float = 0.0,
        capacity_factor: float | None = None, route_padding: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if scaling not in SCALINGS:
            raise UserError(f"scaling: expected one of {', '.join(SCALINGS)}, got {scaling!r}")
        check_sizes(hidden_size=hidden_size, num_experts=num_experts)
        check_noise_and_capacity(jitter, noise, capacity_factor=capacity_factor)
        self.scaling = scaling
        self.jitter = jitter
        self.noise = noise
        self.capacity_factor = capacity_factor
        self.route_padding = route_padding
        self.gate = nn.Linear(hidden_size, num_experts)
        self.balance = Balance(num_experts)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Choose an expert for every token.

        Args:
            x: (..., H) float.
            attention_mask: (...), 0 where a token is padding. None: no padding.

        Returns:
            expert_ids (...) int64, -1 for dropped tokens and for padding that is not routed; the factor on x (...) of
            its dtype, or None where it is 1 and has no gradient; balance_loss, a scalar of at least float32; dropped
            (...) bool.
        """
        check_gate_inputs(self.gate, x, attention_mask)
        counted = None if self.route_padding or attention_mask is None else attention_mask != 0
        probabilities = gate_probabilities(
            self.gate, jittered(x, self.jitter if self.training else 0.0), self.noise if self.training else 0.0
        )
        p, expert_ids = probabilities.max(dim=-1)
        loss = self.balance(probabilities, expert_ids, counted)
        dropped = torch.zeros_like(expert_ids, dtype=torch.bool)
        if counted is not None:
            expert_ids = expert_ids.masked_fill(~counted, -1)
        if self.capacity_factor is not None:
            num_experts = probabilities.shape[-1]
            # `int` and `max` of Python would make the traced size a constant of an exported file
            capacity = torch.sym_max(1, torch.sym_int(self.capacity_factor * expert_ids.numel() / num_experts))
            place = place_in_expert(expert_ids.reshape(1, -1), num_experts).view(expert_ids.shape)
            dropped = (expert_ids >= 0) & (place >= capacity)
            expert_ids = expert_ids.masked_fill(dropped, -1)
        factor: Tensor | None = p
        if self.scaling == "ratio":
            factor = p / p.detach() if torch.is_grad_enabled() and p.requires_grad else None
        return expert_ids, None if factor is None else factor.to(x.dtype), loss, dropped

    def extra_repr(self) -> str:
        return (
            f"scaling={self.scaling!r}, jitter={self.jitter}, noise={self.noise}, "
            f"capacity_factor={self.capacity_factor}, route_padding={self.route_padding}"
        )


def jittered(x: Tensor, jitter: float) -> Tensor:
    """x times uniform draws from [1 - jitter, 1 + jitter]."""
    return x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter) if jitter else x


def place_in_expert(expert_ids: Tensor, num_experts: int) -> Tensor:
    """(B, T): how many tokens before this one, in its row, have its expert; meaningless where the id is negative."""
    chosen = expert_ids.unsqueeze(-1) == torch.arange(num_experts, device=expert_ids.device)
    return (chosen.cumsum(1) - 1).gather(-1, expert_ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
