"""Expert feed-forwards that own parameters: shared-core (MPOE) experts, and dense ones with the same interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.activation import ACTIVATIONS, is_gated
from moebert_kernels.errors import UserError
from moebert_kernels.grouping import Grouping
from moebert_kernels.nn.hot_experts import HotExperts
from moebert_kernels.nn.mpo_weight import KeptFolds, MPOWeight, check_factors
from moebert_kernels.ops._checks import autocast_dtype
from moebert_kernels.ops._routing import resolve_routing
from moebert_kernels.ops.fused_moe_ffn import fused_moe_ffn
from moebert_kernels.ops.fused_moe_ffn_add_norm import fused_moe_ffn_add_norm

BIASES = ("none", "expert", "shared")


class Experts(nn.Module):
    """y[t] = sum_j p[t, j] (w2[e] dropout(act(w1[e] x[t] + b1[e])) + b2[e]): what all kinds of experts share.

    Args:
        hidden_size: H.
        expert_size: I.
        num_experts: E.
        activation: a name of `fused_moe_ffn`; gated ones double the rows of w1, gate rows first.
        bias: "none"; "expert": b1 (E, I or 2I) and b2 (E, H); "shared": b1 (I or 2I,) and b2 (H,) for all experts.
        hidden_dropout: probability of dropping an activation in training.

    Raises:
        UserError: an unknown activation or bias.
    """

    adds_residual = False  # whether the outputs have the residual and a LayerNorm in them
    b1: Tensor | None
    b2: Tensor | None

    def __init__(
        self, hidden_size: int, expert_size: int, num_experts: int, *,
        activation: str = "relu", bias: str = "none", hidden_dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, allowed in (("activation", activation, ACTIVATIONS), ("bias", bias, BIASES)):
            if value not in allowed:
                raise UserError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        self.num_experts = num_experts
        self.activation = activation
        self.hidden_dropout = hidden_dropout
        self.rows = 2 * expert_size if is_gated(activation) else expert_size
        for name, size in (("b1", self.rows), ("b2", hidden_size)):
            shape = (size,) if bias == "shared" else (num_experts, size)
            self.register_parameter(name, None if bias == "none" else nn.Parameter(torch.zeros(shape)))

    def weights(self, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """w1 (E, I or 2I, H) and w2 (E, H, I); those of experts without rows in `offsets` may be zeros."""
        raise NotImplementedError

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """b1 (E, I or 2I) and b2 (E, H), or None."""
        b1, b2 = self.b1, self.b2
        if b1 is not None and b1.ndim == 1:  # one for all experts
            b1 = b1.expand(self.num_experts, -1)
        if b2 is not None and b2.ndim == 1:
            b2 = b2.expand(self.num_experts, -1)
        return b1, b2

    def forward(self, x: Tensor, routing: Grouping | Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """Apply each token's experts; see `fused_moe_ffn`.

        Args:
            x: (..., H) float.
            routing: a Grouping of the flattened tokens, or expert ids (...) or (..., top_k).
            routing_weights: p, of the shape of the ids and the dtype of x; None means 1.
        """
        grouping = resolve_routing(x, routing, self.num_experts, max_top_k=None)
        w1, w2 = self.weights(grouping.offsets)
        return self._feed_forward(x, grouping, routing_weights, w1, w2, *self.biases())

    def _feed_forward(
        self, x: Tensor, routing: Grouping | Tensor, routing_weights: Tensor | None,
        w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None,
    ) -> Tensor:  # fmt: skip
        dropout = self.hidden_dropout if self.training else 0.0
        return fused_moe_ffn(
            x, routing, w1, b1, w2, b2,
            routing_weights=routing_weights, activation=self.activation, hidden_dropout_p=dropout,
        )  # fmt: skip

    def extra_repr(self) -> str:
        bias = "none" if self.b1 is None else "shared" if self.b1.ndim == 1 else "expert"
        return (
            f"num_experts={self.num_experts}, activation={self.activation!r}, bias={bias!r}, "
            f"hidden_dropout={self.hidden_dropout}"
        )


class DenseExperts(Experts):
    """Experts with weights of their own, as in Switch Transformers (2101.03961).

    Parameters: w1 (E, I or 2I, H), w2 (E, H, I), and the biases of `Experts`.
    """

    def __init__(self, hidden_size: int, expert_size: int, num_experts: int, **options: Any) -> None:
        super().__init__(hidden_size, expert_size, num_experts, **options)
        self.w1 = nn.Parameter(torch.empty(num_experts, self.rows, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, w2_std: float | None = None) -> None:
        """Draw the weights with these standard deviations; biases 0."""
        nn.init.normal_(self.w1, std=std)
        nn.init.normal_(self.w2, std=std if w2_std is None else w2_std)
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def weights(self, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.w1, self.w2

    def forward(
        self, x: Tensor, routing: Grouping | Tensor, routing_weights: Tensor | None = None, *, add_norm: Any = None,
        in_order: bool = False,
    ) -> Tensor:  # fmt: skip
        """As `Experts.forward`; or LayerNorm(x + dropout(FFN_e(x))) in one op, of at most one expert for a token.

        Args:
            add_norm: weight and bias, each (H,) or (E, H), of the LayerNorm, its eps, and the probability of dropping
                an output in training. A token without an expert is then x, as in `fused_moe_ffn_add_norm`.
            in_order: with `add_norm`, x holds rows; see `fused_moe_ffn_add_norm`.
        """
        if add_norm is None:
            return super().forward(x, routing, routing_weights)
        norm_weight, norm_bias, eps, dropout_p = add_norm
        b1, b2 = self.biases()
        return fused_moe_ffn_add_norm(
            x, routing, self.w1, b1, self.w2, b2,
            norm_weight.expand(self.num_experts, -1), norm_bias.expand(self.num_experts, -1),
            routing_weights=routing_weights, eps=eps, activation=self.activation,
            dropout_p=dropout_p if self.training else 0.0,
            hidden_dropout_p=self.hidden_dropout if self.training else 0.0, in_order=in_order,
        )  # fmt: skip


class MPOExperts(Experts):
    """Experts that share the central tensors of both weights and own small auxiliary ones (MPOE, 2203.01104).

    Args:
        hidden_size, expert_size, num_experts, options: as for `Experts`.
        w1_factors, w2_factors: row and column factors of w1 (I or 2I, H) and w2 (H, I); see `MPOWeight`.
        max_bond: as for `MPOWeight`.

    Parameters: w1 and w2, each an `MPOWeight`; and the biases of `Experts`.

    Weights are folded inside autograd once per forward, or once per optimizer step under `shared_fold`; when neither
    training nor a gradient needs it, once until a parameter changes. A write through `parameter.data` moves no
    version counter and is not seen: call `unfold` after it.

    Raises:
        UserError: no factors, or some that do not multiply to the shapes; what `Experts` and `MPOWeight` raise.
    """

    def __init__(
        self, hidden_size: int, expert_size: int, num_experts: int, *,
        w1_factors: Sequence[Sequence[int]], w2_factors: Sequence[Sequence[int]],
        max_bond: int | Sequence[int] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, expert_size, num_experts, **options)
        check_factors("w1_factors", w1_factors, (self.rows, hidden_size))
        check_factors("w2_factors", w2_factors, (hidden_size, expert_size))
        (rows, cols), (rows2, cols2) = w1_factors, w2_factors
        self.w1 = MPOWeight(num_experts, rows, cols, max_bond)
        self.w2 = MPOWeight(num_experts, rows2, cols2, max_bond)
        self._hot: HotExperts | None = None
        self._kept: KeptFolds | None = None

    def reset_parameters(self, std: float = 0.02, w2_std: float | None = None) -> None:
        """Draw the sites so that the folded weights have these standard deviations; biases 0."""
        self.w1.reset_parameters(std)
        self.w2.reset_parameters(std if w2_std is None else w2_std)
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def weights(self, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.w1(offsets), self.w2(offsets)
        kept = self._kept
        folded = None if kept is None else kept.folded()
        if folded is None:
            folded = self.w1(offsets), self.w2(offsets)
            self._kept = KeptFolds.of(self.w1, self.w2)
        return folded

    def forward(self, x: Tensor, routing: Grouping | Tensor, routing_weights: Tensor | None = None) -> Tensor:
        hot = self._hot
        if hot is None or self.training or torch.is_grad_enabled():
            return super().forward(x, routing, routing_weights)
        grouping = resolve_routing(x, routing, self.num_experts, max_top_k=None)
        y = torch.zeros_like(x, dtype=autocast_dtype(x) or x.dtype)
        with hot.lock:
            for ids, experts, w1, w2 in hot.batches(grouping, self.w1, self.w2):
                b1, b2 = (None if b is None else b[experts] for b in self.biases())
                y = y + self._feed_forward(x, ids.view(*x.shape[:-1], -1), routing_weights, w1, w2, b1, b2)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | self._nothing_kept()  # copies and pickles fold for themselves

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__ |= self._nothing_kept()
        return replica

    def _nothing_kept(self) -> dict[str, Any]:
        return {"_kept": None, "_hot": None if self._hot is None else HotExperts(self._hot.size)}

    def fold(self, hot_experts: int | None = None) -> None:
        """Make ready for inference.

        Args:
            hot_experts: keep the weights of at most this many experts, the last used ones, and fold others when tokens
                need them. Every forward then reads back from the device which experts are in use.
        """
        if hot_experts is None:
            self._hot = None
            self.w1.fold()
            self.w2.fold()
        else:
            self.unfold()
            self._hot = HotExperts(min(hot_experts, self.num_experts))

    def unfold(self) -> None:
        """Drop folded weights."""
        self._hot = None
        self.w1.unfold()
        self.w2.unfold()


def fold(module: nn.Module, hot_experts: int | None = None) -> None:
    """Fold the weights of all `MPOExperts` inside for inference, or keep those of `hot_experts` experts per layer.

    Without it the first forward in eval mode folds and keeps all. See `MPOExperts.fold`.
    """
    for inside in module.modules():
        if isinstance(inside, MPOExperts):
            inside.fold(hot_experts)


def unfold(module: nn.Module) -> None:
    """Drop what the `MPOExperts` inside have folded and kept."""
    for inside in module.modules():
        if isinstance(inside, MPOExperts):
            inside.unfold()
