"""A list of parameters for libraries that move a module's parameters around its forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class CalledParameters(nn.ParameterList):
    """Parameters whose list calls itself to be read: accelerate loads offloaded parameters around a module's call."""

    __call__ = nn.Module.__call__

    def forward(self) -> list[Tensor]:
        return list(super().__iter__())

    def __iter__(self) -> Iterator[Any]:
        return iter(self())

    @property
    def are_offloaded(self) -> bool:
        return any(site is not None and site.is_meta for site in self._parameters.values())
