"""The layer that takes the place of a dense feed-forward: a router and experts [+ residual + norm]."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.grouping import Grouping
from moebert_kernels.nn.context import current
from moebert_kernels.nn.experts import DenseExperts, Experts
from moebert_kernels.nn.hash_router import HashRouter
from moebert_kernels.nn.switch_router import SwitchRouter
from moebert_kernels.nn.task_router import TaskRouter


class NormedExperts(DenseExperts):
    """MoEBERT's experts: y = p * LayerNorm_e(x + dropout(FFN_e(x))); y = x where a token is skipped.

    Args:
        hidden_size, expert_size, num_experts, options: as for `Experts`.
        eps: added to the variance in the LayerNorms.
        output_dropout: probability of dropping an output of FFN_e in training.

    Parameters: those of `DenseExperts`, norm_weight and norm_bias (E, H).
    """

    adds_residual = True

    def __init__(
        self, hidden_size: int, expert_size: int, num_experts: int, *,
        eps: float = 1e-12, output_dropout: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, expert_size, num_experts, **options)
        self.eps = eps
        self.output_dropout = output_dropout
        self.norm_weight = nn.Parameter(torch.ones(num_experts, hidden_size))
        self.norm_bias = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward(
        self, x: Tensor, routing: Grouping | Tensor, routing_weights: Tensor | None = None, *, add_norm: Any = None,
        in_order: bool = False,
    ) -> Tensor:  # fmt: skip
        """As `DenseExperts.forward`, with residual and norm; at most one expert for a token."""
        own = self.norm_weight, self.norm_bias, self.eps, self.output_dropout
        return super().forward(x, routing, routing_weights, add_norm=add_norm or own, in_order=in_order)


class MoEFeedForward(nn.Module):
    """y = experts(x), each token by the experts that the router chooses, where transformers' code calls a feed-forward.

    The token ids and the padding mask are those of the forward that runs; see `moebert_kernels.nn.context`. Under hash
    routing the grouping was made before the first layer.

    Args:
        router: chooses the experts of each token.
        experts: compute them. `NormedExperts` also add the residual and normalise.
        output_dropout: probability of dropping an output in training, before the residual.
        norm: the LayerNorm behind the residual, or None. Under hash routing of experts with weights of their own it
            runs in one op with them; a token that is skipped is then x, as with `NormedExperts`.
    """

    def __init__(
        self, router: nn.Module, experts: Experts, *, output_dropout: float = 0.0, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.output_dropout = output_dropout
        self.norm = norm
        self.is_told_tokens = False  # whether a model around the layer tells it which tokens are padding

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., H) -> (..., H), the dtype of `hidden_states` (as autocast has it).

        Args:
            hidden_states: (B, T, H), or (B * T, H) where the model flattens them.
            residual: of the same shape, where the model leaves the addition to the feed-forward; else None.

        Raises:
            ValueError: outside of a forward of the model that gets the token ids, where there is one.
        """
        if self.experts.adds_residual:
            return self._experts(hidden_states)
        if residual is hidden_states and (add_norm := self._add_norm()) is not None:
            return self._experts(hidden_states, add_norm=add_norm)
        y = F.dropout(self._experts(hidden_states), self.output_dropout, self.training)
        if residual is not None:
            y = residual + y
        return y if self.norm is None else cast(Tensor, self.norm(y))

    def _add_norm(self) -> tuple[Tensor, Tensor, float, float] | None:
        """What the experts need to normalise too; None where that would not be the same, or the norm is not there."""
        norm: Any = self.norm
        if type(self.experts) is not DenseExperts or type(norm) is not nn.LayerNorm or norm.bias is None:
            return None
        if not isinstance(self.router, HashRouter) or norm.weight.is_meta or norm.weight.dtype != self.experts.w1.dtype:
            return None
        return norm.weight, norm.bias, norm.eps, self.output_dropout

    @property
    def can_read_in_order(self) -> bool:
        """Whether the experts, with residual and norm, can be one op that reads its tokens in their order."""
        return isinstance(self.router, HashRouter) and (
            type(self.experts) is NormedExperts or self._add_norm() is not None
        )

    def _experts(self, x: Tensor, **options: Any) -> Tensor:
        call = current()
        tokens = call.tokens
        if tokens is None and self.is_told_tokens:
            raise ValueError(
                "forward: expected to run inside the forward of the model that gets the token ids, got a call of the "
                "layer alone; recompute layers with model.gradient_checkpointing_enable()"
            )
        if isinstance(self.router, HashRouter):
            if tokens is None or tokens.token_ids is None:
                raise ValueError("input_ids: expected a forward with token ids, which hash routing needs, got none")
            if not torch.compiler.is_compiling() and tokens.in_order:
                written, by = tokens.in_order.pop()
                if written is not x or not (options or self.experts.adds_residual):
                    raise ValueError(
                        "hidden_states: expected the tensor that the attention wrote in the order of the experts, got "
                        "another one or another residual; turn that order off with set_expert_order(model, False)"
                    )
                in_order: Tensor = self.experts(x, by, in_order=True, **options)
                return in_order
            if tokens.token_ids.numel() * x.shape[-1] != x.numel():
                raise UserError(
                    f"hidden_states: expected the tokens of input_ids, {tuple(tokens.token_ids.shape)}, got "
                    f"{tuple(x.shape[:-1])}; if the model pads its texts itself, as Longformer does, pad them before, "
                    "to a multiple of its window (pad_to_multiple_of)"
                )
            grouping = None if torch.compiler.is_compiling() else tokens.groupings.of(self)
            if grouping is None:  # nor where one step could not make those of all, as with tables on several devices
                ids, mask = tokens.token_ids.to(x.device), tokens.token_mask
                mask = None if mask is None else mask[:, -ids.shape[-1] :].to(x.device)
                grouping = self.router(ids, mask).view(x.shape[:-1])
            y: Tensor = self.experts(x, grouping, **options)
            return y
        mask = None if tokens is None else tokens.token_mask
        shape = x.shape
        if x.ndim == 2:  # a model that flattens its tokens
            known = () if tokens is None else (mask, tokens.token_ids, tokens.task_ids)
            # a shape may be a symbol, which len is not
            sequences = next((tensor.shape[0] for tensor in known if tensor is not None), 1)
            x = x.view(sequences, -1, x.shape[-1])
        if mask is not None:
            mask = mask[:, -x.shape[1] :]  # with a key-value cache it covers earlier tokens too
        if isinstance(self.router, TaskRouter):
            assert tokens is not None and tokens.task_ids is not None
            y = self.experts(x, *self.router(tokens.task_ids, x, mask, check=False))
            return y.view(shape)
        if isinstance(self.router, SwitchRouter):
            expert_ids, factor, loss, dropped = self.router(x, mask)
            scaled = x if factor is None else x * factor.unsqueeze(-1)
            y = self.experts(scaled, expert_ids)
            if self.router.capacity_factor is not None:  # what an expert has no room for passes, as in the original
                y = torch.where(dropped.unsqueeze(-1), scaled.to(y.dtype), y)
        else:
            expert_ids, weights, loss = self.router(x, mask)
            y = self.experts(x, expert_ids, weights)
        if call.losses is not None:
            call.losses.append(loss)
        return y.view(shape)

    def extra_repr(self) -> str:
        return f"output_dropout={self.output_dropout}"
