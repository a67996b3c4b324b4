"""Inference with little memory: the folded weights of the experts that were used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.errors import UserError
from moebert_kernels.grouping import Grouping
from moebert_kernels.nn.mpo_weight import MPOWeight


class HotExperts:
    """Slots for the folded weights of `size` experts, refilled least recently used first.

    Attributes:
        lock: to be held while `batches` is used: the slots are refilled in place.

    Raises:
        UserError: no slot.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UserError(f"hot_experts: expected at least 1, got {size}")
        self.size = size
        self.lock = threading.Lock()
        self._slots: OrderedDict[int, int] = OrderedDict()  # expert -> slot, least recently used first
        self._key: Any = None
        self._sites: list[Tensor] = []
        self._weights: tuple[Tensor, ...] = ()

    def batches(self, grouping: Grouping, *weights: MPOWeight) -> Iterator[tuple[Tensor, ...]]:
        """The experts in use, at most `size` at a time and those in slots first.

        Yields:
            ids (T, top_k) of slots, -1 for an assignment that is not in this batch; experts (size,) of the slots; and
            of each of `weights` the folded ones (size, out, in).
        """
        self._reset_if_changed(weights)
        device = grouping.offsets.device
        used = grouping.offsets.diff().nonzero().flatten().tolist()
        used.sort(key=lambda expert: expert not in self._slots)
        row_ids = torch.searchsorted(grouping.offsets[1:], torch.arange(grouping.num_rows, device=device), right=True)
        expert_ids = row_ids[grouping.assignment_to_row.long()].view(-1, grouping.top_k)  # E where skipped
        for first in range(0, len(used), self.size):
            batch = used[first : first + self.size]
            self._fill(batch, weights)
            slot_of = [self._slots[e] if e in batch else -1 for e in range(grouping.num_experts)]
            experts = torch.zeros(self.size, dtype=torch.int64)
            for expert, slot in self._slots.items():
                experts[slot] = expert
            ids = torch.tensor([*slot_of, -1], device=device)[expert_ids]
            yield ids, experts.to(device), *self._weights

    def __reduce__(self) -> tuple[Any, ...]:
        return HotExperts, (self.size,)  # a lock cannot be pickled

    def _fill(self, batch: list[int], weights: tuple[MPOWeight, ...]) -> None:
        for expert in batch:
            if expert in self._slots:
                self._slots.move_to_end(expert)
        missing = [expert for expert in batch if expert not in self._slots]
        for expert in missing:
            slot = len(self._slots) if len(self._slots) < self.size else self._slots.popitem(last=False)[1]
            self._slots[expert] = slot
        if missing:
            slots = [self._slots[expert] for expert in missing]
            for kept, weight in zip(self._weights, weights, strict=True):
                kept[slots] = weight.fold_experts(missing)

    def _reset_if_changed(self, weights: tuple[MPOWeight, ...]) -> None:
        key = tuple(weight.cache_key() for weight in weights)
        if key != self._key:
            # which live as long as the key, so that no others get their addresses
            self._key, self._sites = key, [site.detach() for weight in weights for site in weight.all_sites()]
            self._slots.clear()
            with torch.inference_mode(False):  # or what is kept could be written in inference mode alone
                self._weights = tuple(
                    w.central.new_zeros(self.size, *w.shape[1:], dtype=dtype)
                    for w, (dtype, *_) in zip(weights, key, strict=True)
                )
