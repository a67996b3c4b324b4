"""A router and its experts in the place of a dense feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebert_kernels.nn.experts import Experts
from moebert_kernels.nn.gate_router import GateRouter
from moebert_kernels.nn.hash_router import HashRouter
from moebert_kernels.nn.switch_router import SwitchRouter
from moebert_kernels.nn.top2_router import Top2Router

Router = SwitchRouter | Top2Router | GateRouter | HashRouter


class RoutedFeedForward(nn.Module):
    """y = experts(x), each token by the experts that the router chooses.

    Padding gets y = 0, and a token that `SwitchRouter` dropped gets y = x, as in the original. Residual connection and
    norm are the caller's.
    """

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(
        self, x: Tensor, token_ids: Tensor | None = None, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Route and compute.

        Args:
            x: (B, T, H) float.
            token_ids: (B, T) integer; needed by hash routing.
            token_mask: (B, T), 0 where a token is padding, or None.

        Returns:
            y (B, T, H), and the balance loss, a scalar, or None under hash routing.

        Raises:
            ValueError: no token ids under hash routing.
        """
        router = self.router
        if isinstance(router, HashRouter):
            if token_ids is None:
                raise ValueError("token_ids: expected those that hash routing routes by, got None")
            return self.experts(x, router(token_ids, token_mask)), None
        if isinstance(router, SwitchRouter):
            expert_ids, factor, loss, dropped = router(x, token_mask)
            scaled = x if factor is None else x * factor.unsqueeze(-1)
            y = self.experts(scaled, expert_ids)
            if router.capacity_factor is not None:
                y = torch.where(dropped.unsqueeze(-1), scaled.to(y.dtype), y)
            return y, loss
        expert_ids, weights, loss = router(x, token_mask)
        return self.experts(x, expert_ids, weights), loss
