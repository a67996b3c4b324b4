"""A list of parameters for libraries that load a module's parameters when it is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class CalledParameters(nn.ParameterList):
    """A parameter list that is called whenever it is read, because accelerate loads offloaded parameters in a call."""

    __call__ = nn.Module.__call__

    def forward(self) -> list[Tensor]:
        return list(super().__iter__())

    def __iter__(self) -> Iterator[Any]:
        return iter(self())

    @property
    def are_offloaded(self) -> bool:
        return any(site is not None and site.is_meta for site in self._parameters.values())
