"""MPOE's gradient mask: steps in which the shared central tensors are not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moebert_kernels.errors import UserError
from moebert_kernels.nn.mpo_weight import MPOWeight

UNITS = ("step", "expert")
FORMS = ("skip", "zero")


class GradientMask:
    """Leave the central tensors out of the gradient by chance (MPOE, 2203.01104, section 3.2).

    The central tensors get gradients from every expert, the auxiliary ones from their own tokens. So in each optimizer
    step a draw below `probability` keeps the central tensors fixed; the auxiliary ones always learn. Use it as

        with mask.step(step):
            ...  # forwards and backwards of all micro-batches
        optimizer.step()

    Draws depend on `seed` and the step alone: equal in all processes and in all micro-batches, and a resumed run needs
    no more than its step. One draw holds for all weights of the model. Masked central tensors enter the fold detached,
    so that the GEMM of their gradient is not run.

    Under DistributedDataParallel, which waits for a gradient of every parameter, a masked tensor gets zeros (without
    the GEMM), which leaving the context takes away again: `find_unused_parameters` stays False.

    Args:
        model: any module with `MPOWeight`s in it.
        probability: p_b, of masking; 0 never, 1 always.
        unit: "step" masks a whole step; "expert" draws for each expert, and leaves out what masked ones would add.
        form: of a gradient that is wholly masked. "skip": None, so that AdamW touches neither the tensor nor its
            moments. "zero": zeros, with which moments decay and weight decay applies.
        seed: of the draws.

    Raises:
        UserError: a value out of its range, or a model without such weights.
    """

    def __init__(
        self, model: nn.Module, probability: float = 0.5, *, unit: str = "step", form: str = "skip", seed: int = 0
    ) -> None:
        if not 0 <= probability <= 1:
            raise UserError(f"probability: expected a number in [0, 1], got {probability!r}")
        for name, value, allowed in (("unit", unit, UNITS), ("form", form, FORMS)):
            if value not in allowed:
                raise UserError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        self.weights = [module for module in model.modules() if isinstance(module, MPOWeight)]
        if not self.weights:
            raise UserError(f"model: expected experts with central tensors, got none in a {type(model).__name__}")
        self.probability, self.unit, self.form, self.seed = probability, unit, form, seed

    @property
    def masked(self) -> tuple[tuple[bool, ...], ...]:
        """Which experts of each weight are masked now."""
        return tuple(weight.masked for weight in self.weights)

    def draw(self, step: int, num_experts: int) -> tuple[bool, ...]:
        """Whether each expert is masked in this step."""
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + step) % 2**63)
        masked = torch.rand(num_experts, generator=generator, dtype=torch.float64) < self.probability
        return tuple(masked.tolist()) if self.unit == "expert" else (bool(masked[0]),) * num_experts

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Mask the forwards and backwards of optimizer step `step`; gradients are complete at its end.

        Raises:
            ValueError: inside `shared_fold`, whose folds were made without the mask: open that one inside.
        """
        if any(weight.has_leaf for weight in self.weights):
            raise ValueError("shared_fold: expected it inside the mask's step, got it around it")
        for weight in self.weights:
            weight.masked = self.draw(step, weight.num_experts)
        try:
            yield
            for weight in self.weights:
                if all(weight.masked) and weight.central.requires_grad:
                    weight.central.grad = torch.zeros_like(weight.central) if self.form == "zero" else None
        finally:
            for weight in self.weights:
                weight.masked = (False,) * weight.num_experts

    def identity(self) -> dict[str, Any]:
        """What decides its draws and effect, for comparison with a checkpoint's."""
        return {"probability": self.probability, "unit": self.unit, "form": self.form, "seed": self.seed}
