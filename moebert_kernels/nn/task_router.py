"""Task-level routing: each layer has logits per task, and all tokens of a task go to the same few experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.errors import UserError
from moebert_kernels.nn._checks import check_sizes
from moebert_kernels.ops._checks import check_mask, check_tensor


class TaskRouter(nn.Module):
    """Send all tokens of a task to the `top_k` most probable experts of a softmax over that task's learned logits.

    The probabilities are the routing weights as they are: they are not made to sum to 1 over the chosen experts, so
    that the logits get a gradient at top_k = 1 too. Routing by task is that of Task-MoE (Kudugunta et al., 2110.03742);
    MicroBERT names it without an equation, so this form is our reading.

    Args:
        num_tasks: N.
        num_experts: E.
        top_k: experts per task, 1 to E.
        route_padding: route padding like any token.

    Parameters: logits (N, E).

    Raises:
        UserError: a number out of its range.
    """

    def __init__(self, num_tasks: int, num_experts: int, top_k: int = 2, *, route_padding: bool = False) -> None:
        super().__init__()
        check_sizes(num_tasks=num_tasks, num_experts=num_experts)
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= num_experts:
            raise UserError(f"top_k: expected 1 to num_experts={num_experts}, got {top_k!r}")
        self.top_k = top_k
        self.route_padding = route_padding
        self.logits = nn.Parameter(torch.empty(num_tasks, num_experts))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Almost equal logits: exactly equal ones would send every task to the same experts."""
        nn.init.normal_(self.logits, std=std)

    def forward(
        self, task_ids: Tensor | int, x: Tensor, attention_mask: Tensor | None = None, *, check: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Choose experts for every token.

        Args:
            task_ids: (B,) integers in [0, N), or one for the whole batch.
            x: (B, T, H) float; gives shape, dtype and device alone.
            attention_mask: (B, T), 0 where a token is padding. None: no padding.
            check: False for ids that `checked_task_ids` gave: a GPU's are not read back again.

        Returns:
            expert_ids (B, T, top_k) int64, -1 for padding that is not routed; routing_weights (B, T, top_k) of the
            dtype of x.

        Raises:
            UserError: task ids of another shape or dtype, or out of range.
        """
        if check:
            check_tensor("x", x)
            if x.ndim != 3:
                raise ValueError(f"x: expected shape (B, T, H), got {tuple(x.shape)}")
            check_mask(attention_mask, "x without H", x[..., 0])
            task_ids = checked_task_ids(task_ids, self.logits.shape[0], x.shape[0], x.device)
        mask = None if self.route_padding else attention_mask
        expert_ids, weights = _route_tasks(self.logits, task_ids, self.top_k, x.shape[1], mask)
        return expert_ids, weights.to(x.dtype)

    @torch.no_grad()
    def chosen(self) -> tuple[Tensor, Tensor]:
        """Of every task the experts (N, top_k) int64, most probable first, and their probabilities (N, top_k)."""
        probabilities, experts = _top_gates(self.logits, self.top_k)
        return experts, probabilities

    def extra_repr(self) -> str:
        num_tasks, num_experts = self.logits.shape
        return f"num_tasks={num_tasks}, num_experts={num_experts}, top_k={self.top_k}"


def _route_tasks(
    logits: Tensor, task_ids: Any, top_k: int, length: int, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Experts int64 and probabilities (at least float32), (B, T, top_k), of the logits (N, E) of task ids (B,)."""
    probabilities, experts = _top_gates(logits, top_k)
    probabilities, experts = (
        of_task.index_select(0, task_ids).unsqueeze(1).expand(-1, length, -1) for of_task in (probabilities, experts)
    )
    if attention_mask is not None:
        experts = experts.masked_fill((attention_mask == 0).unsqueeze(-1), -1)
    return experts, probabilities


def checked_task_ids(task_ids: Tensor | int, num_tasks: int, batch_size: int, device: torch.device) -> Tensor:
    """Task ids as (B,) int64 on `device`; one id stands for the whole batch.

    The values of a tensor on a GPU are read back for the check. While torch compiles they are not checked.

    Raises:
        UserError: another shape or dtype, or an id outside [0, num_tasks).
    """
    if isinstance(task_ids, int) and not isinstance(task_ids, bool):
        low = high = task_ids
        ids = torch.full((batch_size,), task_ids, dtype=torch.int64, device=device)
    else:
        if not isinstance(task_ids, Tensor) or task_ids.layout != torch.strided:
            came = f"a tensor of {task_ids.layout}" if isinstance(task_ids, Tensor) else type(task_ids).__name__
            raise UserError(f"task_ids: expected an integer or a dense tensor of integers, got {came}")
        if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
            raise UserError(f"task_ids: expected integers, got {task_ids.dtype}")
        if task_ids.is_meta and device.type != "meta":
            raise UserError(f"task_ids: expected values on {device}, got a tensor on meta")
        if task_ids.shape not in ((), (batch_size,)):
            raise UserError(f"task_ids: expected shape (B={batch_size},), got {tuple(task_ids.shape)}")
        if torch.compiler.is_compiling() or task_ids.is_meta or not task_ids.numel():
            low = high = 0
        else:
            low, high = int(task_ids.min()), int(task_ids.max())
        ids = task_ids.to(device=device, dtype=torch.int64).expand(batch_size)
    if low < 0 or high >= num_tasks:
        got = low if low < 0 else high
        raise UserError(f"task_ids: expected ids in [0, {num_tasks}), one for each task, got {got}")
    return ids


def _top_gates(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest softmax probabilities (..., top_k) and their experts; of equals the lower expert."""
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    ordered, experts = probabilities.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :top_k], experts[..., :top_k]
