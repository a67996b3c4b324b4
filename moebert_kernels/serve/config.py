"""What a checkpoint says of a prepared model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import MoEConfig
from moebert_kernels.serve.dtypes import DTYPES

METHOD = "moebert-prepared"  # the `quant_method` by which transformers finds what loads a prepared model
FORMAT_VERSION = 1


@dataclass(kw_only=True)
class PreparedConfig(QuantizationConfigMixin):
    """A prepared model: `quantization_config` in its checkpoint's `config.json`.

    Args:
        dtype, tokens: as for `prepare`.
        token_scales: names of the products of an int8 model whose inputs get a scale for each token; None: it was not
            calibrated. A linear layer has its own name, the first product of the fourth expert its module's with w1.3.
        moe: the fields of the `MoEConfig` of a converted model; None: a dense one.
        format_version: of the checkpoint's keys.
    """

    dtype: str
    tokens: int = 128
    token_scales: list[str] | None = None
    moe: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    quant_method: str = METHOD  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise UserError(f"tokens: expected an integer of at least 1, got {self.tokens!r}")
        names = self.token_scales
        if names is not None:
            if self.dtype != "int8":
                raise UserError(f"token_scales: expected them with dtype 'int8' alone, got {self.dtype!r}")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(f"token_scales: expected a list of names, got {names!r}")
        if self.moe is not None:
            MoEConfig.from_dict(self.moe)
        if self.format_version != FORMAT_VERSION:
            raise UserError(f"format_version: expected {FORMAT_VERSION}, got {self.format_version!r}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration of a checkpoint.

        Raises:
            UserError: a field that is unknown, or of a wrong value.
        """
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(config_dict) - known):
            raise UserError(f"{unknown[0]}: expected a field of PreparedConfig ({', '.join(sorted(known))})")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config
