"""Configurations of transformers' own models with experts in the place of their feed-forwards (MPOE, Switch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    BertConfig,
    CamembertConfig,
    GPT2Config,
    LongT5Config,
    MT5Config,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
    UMT5Config,
    XLMRobertaConfig,
)

from moebert_kernels.errors import UserError
from moebert_kernels.models.configuration import MOST_EXPERTS, check_labels
from moebert_kernels.models.fields import Field, check_fields, choice, flag, integer, mapping, number
from moebert_kernels.nn.experts import BIASES
from moebert_kernels.nn.mpo_weight import check_factors

FORMAT_VERSION = 1
EXPERTS = ("mpo", "dense")
HASH_ROUTERS = ("hash-random", "hash-balance")
ROUTERS = ("switch", "top2", "gate-token", *HASH_ROUTERS)

FIELDS: dict[str, Field] = {
    "experts": choice(EXPERTS),
    "router": choice(ROUTERS),
    "expert_bias": choice(BIASES[1:]),
    "num_experts": integer(1, MOST_EXPERTS),
    "load_balance": number(0),
    "router_options": mapping,
    "route_padding": flag,
}


@dataclass(kw_only=True, repr=False)
class MPOEOptions:
    """What the configuration of an MPOE model has beside the fields of the dense model's.

    Args:
        num_experts: E, experts of each layer.
        experts: "mpo": both weights of the experts share central tensors (MPOE, 2203.01104); "dense": each expert has
            weights of its own (Switch Transformers, 2101.03961).
        w1_factors, w2_factors: with "mpo", the row and column factors of w1 (I or 2I, H) and w2 (H, I).
        max_bond: with "mpo", caps of the bonds; None: full ones.
        expert_bias: "expert" or "shared", where the dense model has biases.
        router: "switch", "top2", "gate-token", or by token ids "hash-random" and "hash-balance".
        router_options: keyword arguments of the router (`jitter`, `capacity_factor`, ...).
        load_balance: weight of the routers' balance loss in `loss`. None: 0.01, and 0 under hash routing.
        route_padding: route padding, and count it in the balance loss, instead of skipping it.
        format_version: of the checkpoint's keys.
    """

    # what Trainer leaves out of predictions, beside the dense models'
    keys_to_ignore_at_inference = ["past_key_values", "balance_loss"]  # noqa: RUF012 - transformers reads it

    num_experts: int = 8
    experts: str = "mpo"
    w1_factors: list | tuple | None = None
    w2_factors: list | tuple | None = None
    max_bond: int | list | tuple | None = None
    expert_bias: str = "expert"
    router: str = "switch"
    router_options: dict = field(default_factory=dict)
    load_balance: float | None = None
    route_padding: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        check_labels(getattr(self, "id2label", None), kwargs.get("num_labels", 1))
        if self.load_balance is None:
            self.load_balance = 0.0 if self.router in HASH_ROUTERS else 0.01
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @property
    def experts_per_token(self) -> int:
        """2 under top-2 routing, else 1."""
        return 2 if self.router == "top2" else 1

    def check(self) -> None:
        """Raise a UserError that names the first field no model can be built from."""
        check_fields(self, FIELDS)
        if self.router in HASH_ROUTERS and self.load_balance:
            raise UserError(f"load_balance: expected 0 with router={self.router!r}, got {self.load_balance!r}")
        if self.router in HASH_ROUTERS and self.router_options:
            raise UserError(f"router_options: expected none with router={self.router!r}, got {self.router_options!r}")
        if chunk := getattr(self, "chunk_size_feed_forward", 0):
            raise UserError(f"chunk_size_feed_forward: expected 0, got {chunk}")
        if self.experts == "mpo":
            check_factors("w1_factors", self.w1_factors)
            check_factors("w2_factors", self.w2_factors)
        if self.format_version != FORMAT_VERSION:
            raise UserError(f"format_version: expected {FORMAT_VERSION}, got {self.format_version!r}")


class MPOET5Config(MPOEOptions, T5Config):
    model_type = "mpoe-t5"


class MPOEMT5Config(MPOEOptions, MT5Config):
    model_type = "mpoe-mt5"


class MPOEUMT5Config(MPOEOptions, UMT5Config):
    model_type = "mpoe-umt5"


class MPOELongT5Config(MPOEOptions, LongT5Config):
    model_type = "mpoe-longt5"


class MPOEGPT2Config(MPOEOptions, GPT2Config):
    model_type = "mpoe-gpt2"


class MPOEBertConfig(MPOEOptions, BertConfig):
    model_type = "mpoe-bert"


class MPOERobertaConfig(MPOEOptions, RobertaConfig):
    model_type = "mpoe-roberta"


class MPOEXLMRobertaConfig(MPOEOptions, XLMRobertaConfig):
    model_type = "mpoe-xlm-roberta"


class MPOECamembertConfig(MPOEOptions, CamembertConfig):
    model_type = "mpoe-camembert"


# configuration of the dense model -> of the MPOE model
CONFIGS: dict[type[PreTrainedConfig], Any] = {
    config.__bases__[1]: config
    for config in (
        MPOET5Config,
        MPOEMT5Config,
        MPOEUMT5Config,
        MPOELongT5Config,
        MPOEGPT2Config,
        MPOEBertConfig,
        MPOERobertaConfig,
        MPOEXLMRobertaConfig,
        MPOECamembertConfig,
    )
}
