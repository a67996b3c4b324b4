"""The configuration of a mixture of experts: one for all published systems, made of a router and experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from moebert_kernels.errors import UserError

METHOD = "moebert"  # the `quant_method` by which transformers finds what loads a converted model
FORMAT_VERSION = 1
CHOSEN_ROUTER = "hash-chosen"
HASH_ROUTERS = ("hash-random", "hash-balance", CHOSEN_ROUTER)
LEARNED_ROUTERS = ("gate-token", "gate-sentence", "switch", "top2")
TASK_ROUTER = "task"
ROUTERS = (*HASH_ROUTERS, *LEARNED_ROUTERS, TASK_ROUTER)
SPLITS = ("split", "clustered")  # whose experts have a part of the dense layer's neurons
EXPERTS = (*SPLITS, "copy", "mpo")
NORMS = ("expert", "layer")
BIASES = ("expert", "common")
MOST = 1 << 20  # experts, and neurons of one
Factors = Sequence[Sequence[int]]


@dataclass(kw_only=True)
class MoEConfig(QuantizationConfigMixin):
    """A mixture of experts in the place of a dense feed-forward: `router` x `experts`.

    `moebert`, `mpoe`, `switch` and `task` give the published systems. A converted model has one as its configuration's
    `quantization_config`: that is the one place where transformers lets a package replace modules before weights are
    loaded. Nothing is quantised.

    Args:
        router: how a token finds its experts. By its id: "hash-random" or "hash-balance" (Hash Layers, 2106.04426), or
            "hash-chosen", which gives each id the expert that loses least on some text (see `choose_experts`). By a
            learned gate: "gate-token" or "gate-sentence" (MoEBERT, 2204.07675), "switch" (2101.03961) or "top2"
            (GShard, 2006.16668). "task": by the sequence's task, an argument of forward (Task-MoE, 2110.03742;
            MicroBERT).
        experts: "split": each expert has a part of the dense layer's neurons (MoEBERT); "clustered": it has those that
            its tokens move on some text; "copy": each starts as the whole dense layer (Switch); "mpo": as "copy", with
            one central tensor shared by all experts of a layer (MPOE, 2203.01104).
        num_experts: E, the experts of each layer.
        expert_size: with "split" and "clustered", the neurons of an expert. None: a quarter of the dense layer's; with
            router="task" an E-th of them, so that none is lost.
        num_shared_neurons: with "split", how many of them, the most important, are in every expert. None: two thirds
            of an expert's, which of the default is a sixth of the dense layer's; with router="task" 0; with "clustered"
            as many as the text makes common.
        norm: "expert": every expert has its own copy of the residual's LayerNorm, where a model has one behind its
            feed-forward (MoEBERT); "layer": the model's stays. None: "expert" there with "split" or "clustered" and
            one expert for a token, else "layer".
        max_load: with "hash-chosen", the most tokens that an expert may get on such text, over an even share of 1/E.
            The text that chooses uses half of what this allows beyond the even share.
        correction: with "clustered", correct w2 and b2 for the neurons that were cut, by least squares on that text.
        top_k: experts of a token with router="task". None: 2, or 1 with norm="expert".
        tasks: with router="task", names of the tasks, by task id.
        task_labels: for each task the names of its classes; an empty list for a score. The model must be one for
            sequence classification, and its classifier gets rows for each task. None: all tasks share the model's own
            head.
        expert_bias: "expert" or "common": a bias for each expert, or one for all.
        w1_factors, w2_factors, max_bond: with "mpo", the row and column factors of w1 (I or 2I, H) and w2 (H, I), and
            caps of the bonds. None: chosen by `plan_factors`; full bonds.
        router_options: keyword arguments of the learned router (`jitter`, `capacity_factor`, ...).
        load_balance: weight of the balance loss in the model's `loss`. None: 0.01, and 0 for routers without one.
        expert_dropout: probability of dropping an output of the experts in training. None: the dense layer's.
        route_padding: route and compute padding like any token, as the original code of MoEBERT does.
        target_modules: names of the feed-forwards to convert. None: all that are known.
        format_version: the version of a checkpoint's keys.
    """

    router: str = "hash-random"
    experts: str = "split"
    num_experts: int = 4
    expert_size: int | None = None
    num_shared_neurons: int | None = None
    norm: str | None = None
    expert_bias: str = "expert"
    w1_factors: Factors | None = None
    w2_factors: Factors | None = None
    max_bond: int | Sequence[int] | None = None
    max_load: float = 1.1
    correction: bool = True
    top_k: int | None = None
    tasks: Sequence[str] | None = None
    task_labels: Mapping[str, Sequence[str]] | None = None
    router_options: dict[str, Any] = field(default_factory=dict)
    load_balance: float | None = None
    expert_dropout: float | None = None
    route_padding: bool = False
    target_modules: Sequence[str] | None = None
    format_version: int = FORMAT_VERSION
    quant_method: str = METHOD  # type: ignore[assignment]

    @classmethod
    def moebert(cls, **changes: Any) -> MoEConfig:
        """MoEBERT's: four experts split by importance, routed by a random hash table, a LayerNorm in each."""
        fields: dict[str, Any] = {"router": "hash-random", "experts": "split", "num_experts": 4}
        return cls(**fields | changes)

    @classmethod
    def chosen(cls, **changes: Any) -> MoEConfig:
        """Four experts that fit some text, and for each token id the expert that loses least on it."""
        fields: dict[str, Any] = {"router": CHOSEN_ROUTER, "experts": "clustered", "num_experts": 4}
        return cls(**fields | changes)

    @classmethod
    def mpoe(cls, **changes: Any) -> MoEConfig:
        """MPOE's: eight experts that share central tensors, routed by Switch's router."""
        fields: dict[str, Any] = {"router": "switch", "experts": "mpo", "num_experts": 8}
        return cls(**fields | changes)

    @classmethod
    def switch(cls, **changes: Any) -> MoEConfig:
        """Switch Transformers': eight copies of the dense layer, one for each token."""
        fields: dict[str, Any] = {"router": "switch", "experts": "copy", "num_experts": 8}
        return cls(**fields | changes)

    @classmethod
    def task(cls, tasks: Mapping[str, Sequence[str]] | Sequence[str], **changes: Any) -> MoEConfig:
        """MicroBERT's teacher: four experts that hold all neurons between them, two for each task.

        Args:
            tasks: name -> names of its classes, none for a score; or names alone, see `task_labels`.
            changes: further fields.
        """
        labels = {name: list(of_task) for name, of_task in tasks.items()} if isinstance(tasks, Mapping) else None
        fields: dict[str, Any] = {"router": TASK_ROUTER, "experts": "split", "num_experts": 4}
        return cls(**fields | {"tasks": list(tasks), "task_labels": labels} | changes)

    @property
    def is_hash_routed(self) -> bool:
        return self.router in HASH_ROUTERS

    @property
    def needs_text(self) -> bool:
        """Whether a conversion reads text to choose by."""
        return self.router == CHOSEN_ROUTER or self.experts == "clustered"

    @property
    def is_task_routed(self) -> bool:
        return self.router == TASK_ROUTER

    @property
    def is_learned(self) -> bool:
        """Whether a gate routes, which has a balance loss."""
        return self.router in LEARNED_ROUTERS

    @property
    def experts_per_token(self) -> int:
        """The experts of a token, in a model's configuration, which has every choice made."""
        return 2 if self.router == "top2" else self.top_k or 1

    @property
    def balance_weight(self) -> float:
        """The weight of the balance loss in the model's loss."""
        if self.load_balance is None:
            return 0.01 if self.is_learned else 0.0
        return self.load_balance

    @property
    def outputs_per_task(self) -> list[int]:
        """With `task_labels`: the number of classes of each task, 1 for a score."""
        return [len((self.task_labels or {})[name]) or 1 for name in self.tasks or ()]

    def task_id(self, name: str) -> int:
        """The number of a task.

        Raises:
            UserError: there is no such task, or the model does not route by task.
        """
        if name not in (self.tasks or ()):
            have = ", ".join(self.tasks) if self.tasks else f"none (router={self.router!r})"
            raise UserError(f"task: expected one of the model's tasks, {have}, got {name!r}")
        return list(self.tasks or ()).index(name)

    def __post_init__(self) -> None:
        _check_choice("router", self.router, ROUTERS)
        _check_choice("experts", self.experts, EXPERTS)
        _check_choice("expert_bias", self.expert_bias, BIASES)
        if self.norm is not None:
            _check_choice("norm", self.norm, NORMS)
        _check_integer("num_experts", self.num_experts, 1)
        for name, least in (("expert_size", 1), ("num_shared_neurons", 0)):
            value = getattr(self, name)
            if value is not None:
                _check_integer(name, value, least)
                if self.experts not in SPLITS:
                    raise UserError(f"{name}: expected none with experts={self.experts!r}, got {value}")
        for name in ("w1_factors", "w2_factors", "max_bond"):
            if getattr(self, name) is not None and self.experts != "mpo":
                raise UserError(f"{name}: expected none with experts={self.experts!r}, got {getattr(self, name)!r}")
        self._check_chosen()
        if not isinstance(self.router_options, Mapping):
            raise UserError(f"router_options: expected names and values, got {self.router_options!r}")
        _check_number("load_balance", self.load_balance)
        _check_number("expert_dropout", self.expert_dropout, below=1)
        for name in ("load_balance", "router_options"):
            if not self.is_learned and getattr(self, name):
                raise UserError(f"{name}: expected none with router={self.router!r}, got {getattr(self, name)!r}")
        self._check_tasks()
        if not isinstance(self.route_padding, bool):
            raise UserError(f"route_padding: expected true or false, got {self.route_padding!r}")
        targets = self.target_modules
        if targets is not None and not _are_texts(targets):
            raise UserError(f"target_modules: expected a list of names, got {targets!r}")
        if self.format_version != FORMAT_VERSION:
            raise UserError(f"format_version: expected {FORMAT_VERSION}, got {self.format_version!r}")

    def _check_chosen(self) -> None:
        if self.router == CHOSEN_ROUTER and self.experts not in SPLITS:
            raise UserError(
                f"router: {self.router!r} needs experts that differ, {' or '.join(SPLITS)}, got {self.experts}"
            )
        if self.experts == "clustered" and not self.is_hash_routed:
            raise UserError(f"experts: 'clustered' needs routing by token ids, as 'hash-chosen', got {self.router!r}")
        if self.experts in SPLITS and self.expert_bias != "expert":
            raise UserError(f"expert_bias: expected 'expert' with experts={self.experts!r}, got {self.expert_bias!r}")
        _check_number("max_load", self.max_load)
        if self.max_load is None or self.max_load < 1:
            raise UserError(f"max_load: expected a number of at least 1, got {self.max_load!r}")
        if not isinstance(self.correction, bool):
            raise UserError(f"correction: expected true or false, got {self.correction!r}")

    def _check_tasks(self) -> None:
        if not self.is_task_routed:
            for name in ("top_k", "tasks", "task_labels"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name}: expected none with router={self.router!r}, got {getattr(self, name)!r}")
            return
        if not _are_texts(self.tasks) or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"tasks: expected different names with router='task', got {self.tasks!r}")
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1, 1 if self.norm == "expert" else self.num_experts)
        labels = self.task_labels
        if labels is not None and not (
            isinstance(labels, Mapping) and labels.keys() == set(self.tasks) and all(map(_are_texts, labels.values()))
        ):
            raise UserError(f"task_labels: expected lists of names for {', '.join(self.tasks)}, got {labels!r}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field. transformers reads the configuration like a mapping if it gets `config=model.config`."""
        return getattr(self, name, default)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration of a checkpoint.

        Raises:
            UserError: a field that is unknown, or of a wrong type or value.
        """
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(config_dict) - known):
            raise UserError(f"{unknown[0]}: expected a field of MoEConfig ({', '.join(sorted(known))})")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


def moe_config(model_config: Any) -> MoEConfig | None:
    """Return the `MoEConfig` of a converted model's configuration; None for the configuration of another model.

    Args:
        model_config: a configuration of transformers, from a model or from `AutoConfig`.
    """
    found = getattr(model_config, "quantization_config", None)
    if isinstance(found, Mapping) and found.get("quant_method") == METHOD:
        config: MoEConfig = MoEConfig.from_dict(found)
        return config
    return found if isinstance(found, MoEConfig) else None


def _check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _check_integer(name: str, value: Any, least: int, most: int = MOST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if value > most:
        raise UserError(f"{name}: expected an integer of at most {most}, got {value!r}")


def _check_number(name: str, value: Any, below: float = math.inf) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
        limit = "" if below == math.inf else f" and below {below}"
        raise UserError(f"{name}: expected a number of at least 0{limit}, got {value!r}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(text, str) for text in value)
