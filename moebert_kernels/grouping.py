"""`Grouping`: which rows belong to which expert, made once from expert ids and used by every kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Grouping:
    """The assignments of T tokens to `top_k` experts each, sorted by expert.

    An assignment `a = t * top_k + j` is the j-th expert of token t; a row `r` is a position in the grouped order.
    Routed rows come first, by expert and stable in token order; skipped assignments (ids outside [0, E)) follow.

    Attributes:
        offsets: (E + 1,) int32. Rows of expert e are `offsets[e]:offsets[e + 1]`; `offsets[E]` rows are routed.
        row_to_assignment: (T * top_k,) int32. Assignment held by each row, a full permutation (top_k = 1: the token).
        assignment_to_row: (T * top_k,) int32. The inverse of `row_to_assignment`.
        top_k: experts per token.
    """

    offsets: Tensor
    row_to_assignment: Tensor
    assignment_to_row: Tensor
    top_k: int = 1

    @classmethod
    def from_counts(cls, counts: Tensor) -> Grouping:
        """The grouping of tokens that are sorted by expert already, as an all-to-all leaves them.

        Args:
            counts: (E,) integer, the tokens of each expert. They are read on the host: T is their sum.

        Raises:
            ValueError: another shape or dtype, or a negative count.
        """
        if not isinstance(counts, Tensor):
            raise ValueError(f"counts: expected a tensor, got {type(counts).__name__}")
        if counts.ndim != 1 or counts.shape[0] < 1 or counts.is_floating_point() or counts.dtype == torch.bool:
            raise ValueError(f"counts: expected integers (E,), got {counts.dtype} of shape {tuple(counts.shape)}")
        if int(counts.min()) < 0:
            raise ValueError(f"counts: expected at least 0 for each expert, got {int(counts.min())}")
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        rows = torch.arange(int(offsets[-1]), dtype=torch.int32, device=counts.device)
        return cls(offsets, rows, rows)

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def num_rows(self) -> int:
        """T * top_k: routed and skipped assignments together."""
        return self.row_to_assignment.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.num_rows // self.top_k

    def to(self, device: torch.device | str) -> Grouping:
        return Grouping(
            self.offsets.to(device), self.row_to_assignment.to(device), self.assignment_to_row.to(device), self.top_k
        )


def _flatten(grouping: Grouping) -> tuple[list[Any], Any]:
    return [grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row], grouping.top_k


def _unflatten(values: Any, top_k: Any) -> Grouping:
    offsets, row_to_assignment, assignment_to_row = values
    return Grouping(offsets, row_to_assignment, assignment_to_row, top_k)


pytree.register_pytree_node(
    Grouping,
    _flatten,
    _unflatten,
    serialized_type_name="moebert_kernels.Grouping",
    flatten_with_keys_fn=lambda grouping: (
        [
            (pytree.GetAttrKey(name), getattr(grouping, name))
            for name in ("offsets", "row_to_assignment", "assignment_to_row")
        ],
        grouping.top_k,
    ),
)
