"""Learned routing: a linear gate on each token, or on the mean of each sentence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.nn._checks import check_gate_inputs, check_sizes
from moebert_kernels.nn.balance import Balance


class GateRouter(nn.Module):
    """Send a token, or a whole sentence, to the most probable expert of a softmax gate.

    The output of the expert is multiplied by that probability, so the gate learns from the task's loss.

    Args:
        hidden_size: H.
        num_experts: E.
        per: "token" gates each token, "sentence" the mean over each sentence's valid tokens.
        original_batch1: with "sentence" and batch size 1, give no probability and no balance loss, as the original
            code does (`MoELayer._forward_sentence_single_expert`). Otherwise a sentence alone is treated as in a batch.
        route_padding: route padding like any token, and count it in the balance loss. The mean over a sentence
            leaves padding out in any case.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, per: Literal["token", "sentence"] = "token", *,
        original_batch1: bool = False, route_padding: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if per not in ("token", "sentence"):
            raise UserError(f"per: expected 'token' or 'sentence', got {per!r}")
        check_sizes(hidden_size=hidden_size, num_experts=num_experts)
        self.per = per
        self.original_batch1 = original_batch1
        self.route_padding = route_padding
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.balance = Balance(num_experts)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Choose an expert for every token.

        Args:
            x: (B, T, H) float.
            attention_mask: (B, T), 0 where a token is padding. None: no padding.

        Returns:
            expert_ids (B, T) int64, -1 for padding that is not routed; routing_weights (B, T) of the dtype of x, or
            None for 1; balance_loss, a scalar of at least float32.
        """
        check_gate_inputs(self.gate, x, attention_mask, dims=3)
        valid = None if attention_mask is None else attention_mask != 0
        counted = None if self.route_padding else valid
        if self.per == "token":
            probabilities = gate_probabilities(self.gate, x)
            weights, expert_ids = probabilities.max(dim=-1)
            loss = self.balance(probabilities, expert_ids, counted)
        else:
            probabilities = gate_probabilities(self.gate, _masked_mean(x, valid))
            weights, expert_ids = probabilities.max(dim=-1)
            if self.original_batch1 and x.shape[0] == 1:
                loss = None
            else:
                loss = self.balance(probabilities, expert_ids, None if counted is None else counted.any(dim=1))
            weights, expert_ids = (v.unsqueeze(1).expand(x.shape[:2]) for v in (weights, expert_ids))
        if counted is not None:
            expert_ids = expert_ids.masked_fill(~counted, -1)
        if loss is None:
            return expert_ids, None, probabilities.new_zeros(())
        return expert_ids, weights.to(x.dtype), loss

    def extra_repr(self) -> str:
        return f"per={self.per!r}, original_batch1={self.original_batch1}, route_padding={self.route_padding}"


def gate_probabilities(gate: nn.Linear, x: Tensor, noise: float = 0.0) -> Tensor:
    """softmax(gate(x)), the gate in its own dtype and the softmax in at least float32; `noise` is the standard
    deviation of what is added to the logits."""
    # Two experts' logits often differ by less than a bfloat16 step, so autocast does not reach the gate.
    with torch.autocast(x.device.type, enabled=False):
        logits: Tensor = gate(x.to(gate.weight.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if noise:
            logits = logits + noise * torch.randn_like(logits)
        return logits.softmax(dim=-1)


def _masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid tokens of x (B, T, H), summed in at least float32; 0 for a sentence without any."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if valid is None and x.shape[1] > 0:
        return x.mean(dim=1, dtype=dtype)
    if valid is None:
        return x.sum(dim=1, dtype=dtype)
    total = x.masked_fill(~valid.unsqueeze(-1), 0).sum(dim=1, dtype=dtype)
    return total / valid.sum(dim=1, keepdim=True).clamp(min=1).to(dtype)
