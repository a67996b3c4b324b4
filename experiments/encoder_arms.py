"""The students that experiments/base_encoder.py compares: how each is made of a teacher, and what it follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from moebert_kernels.convert import SiteChoice, StudentShape, convert_to_moe, count_tokens, dense_student, make_student
from moebert_kernels.convert.sites import common_width, find_sites
from moebert_kernels.layers import MoEConfig

TEACHER = "teacher"
# forms of `prepare`, see Cell.prepared
DTYPES = ("float32", "bfloat16", "int8", "int8-calibrated", "int8-token", "int8-bfloat16")


class Made(Protocol):
    """What conversions need of a task, a seed and a teacher."""

    seed: int
    teacher: Any

    def texts(self) -> list[dict[str, Tensor]]:
        """Batches of training text to choose experts by."""
        ...

    def chosen(self, part: int, experts: int = 4) -> list[SiteChoice]:
        """So many experts of that part of the neurons, and their tables, by this text."""
        ...

    def correcting(self) -> list[dict[str, Tensor]] | None:
        """Batches of this text to correct layers in turn by; None: they are not."""
        ...

    def importance(self, split: str) -> Tensor:
        """(L, D) of the teacher's neurons, by the labels of a split."""
        ...


@dataclass(frozen=True)
class Arm:
    """A student.

    Attributes:
        timed_as: the arm whose latency this one has, because it differs in its weights alone.
        objective, weights: arguments of `MoETrainingArguments`.
        dropout: in student and teacher, as the original code has it.
        packs: whether `prepare` knows its experts.
    """

    label: str
    make: Callable[[Made], Any]
    timed_as: str = ""
    objective: str = "layerwise"
    weights: Mapping[str, float] = field(default_factory=dict)
    dropout: bool = False
    packs: bool = True


def chosen_config(teacher: Any, part: int, experts: int = 4) -> MoEConfig:
    """Experts of that part of the neurons of a feed-forward."""
    return MoEConfig.chosen(num_experts=experts, expert_size=max(common_width(find_sites(teacher)) // part, 1))


def _converted(made: Made, config: MoEConfig, **options: Any) -> Any:
    return convert_to_moe(copy.deepcopy(made.teacher), config, seed=made.seed, **options)


def _chosen(made: Made, part: int = 4, experts: int = 4) -> Any:
    config = chosen_config(made.teacher, part, experts)
    return _converted(made, config, chosen=made.chosen(part, experts), batches=made.correcting())


def _dealt(made: Made, split: str = "train", options: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """MoEBERT's: the neurons in turns by importance, all experts with the most important ones."""
    return _converted(made, MoEConfig.moebert(**changes), importance=made.importance(split), **(options or {}))


def _dealt_chosen(made: Made) -> Any:
    config = MoEConfig.moebert(router="hash-chosen")
    return _converted(made, config, importance=made.importance("train"), batches=made.texts())


def _clustered_random(made: Made) -> Any:
    config = replace(chosen_config(made.teacher, 4), router="hash-random")
    return _converted(made, config, batches=made.texts())


def _balanced(made: Made) -> Any:
    counts = count_tokens(made.texts(), made.teacher.get_input_embeddings().num_embeddings)
    return _dealt(made, router="hash-balance", options={"token_counts": counts})


def _random_importance(made: Made) -> Any:
    sites = find_sites(made.teacher)
    scores = torch.rand(len(sites), common_width(sites), generator=torch.Generator().manual_seed(made.seed))
    return _converted(made, MoEConfig.moebert(), importance=scores)


def _dense(made: Made, part: int = 4) -> Any:
    return dense_student(made.teacher, chosen=made.chosen(part), batches=made.correcting())


def _half_depth(made: Made) -> Any:
    sizes = made.teacher.config
    shape = StudentShape(
        max(sizes.num_hidden_layers // 2, 1), sizes.hidden_size, sizes.intermediate_size, sizes.num_attention_heads
    )
    return make_student(made.teacher, shape, "layers", seed=made.seed)


ARMS: dict[str, Arm] = {
    "continued": Arm("teacher, trained as its students", lambda made: copy.deepcopy(made.teacher), timed_as=TEACHER),
    "moe": Arm("MoE, 4 experts of 1/4, chosen", _chosen),
    "paper": Arm("MoE, 4 experts of 1/4, MoEBERT's", _dealt),
    "dense": Arm("dense of the same FLOPs, 1/4", _dense),
    "half-depth": Arm("half depth", _half_depth),
    "original": Arm("MoEBERT's recipe as published", lambda made: _dealt(made, "held-out", route_padding=True),
                    timed_as="paper", dropout=True),
    "moe-8": Arm("MoE, 8 experts of 1/4, chosen", lambda made: _chosen(made, experts=8)),
    "moe-eighth": Arm("MoE, 4 experts of 1/8, chosen", lambda made: _chosen(made, 8)),
    "dense-eighth": Arm("dense of the same FLOPs, 1/8", lambda made: _dense(made, 8)),
    "random-importance": Arm("MoEBERT's, random importance", _random_importance, timed_as="paper"),
    "no-sharing": Arm("MoEBERT's, no shared neurons", lambda made: _dealt(made, num_shared_neurons=0),
                      timed_as="paper"),
    "no-layers": Arm("chosen, no layer-wise term", _chosen, timed_as="moe", weights={"hidden": 0.0}),
    "dealt-chosen": Arm("MoEBERT's experts, chosen tables", _dealt_chosen, timed_as="moe"),
    "clustered-random": Arm("chosen experts, random tables", _clustered_random, timed_as="paper"),
    "balanced": Arm("MoEBERT's experts, balanced tables", _balanced, timed_as="paper"),
    "gate-token": Arm("MoEBERT's experts, a gate for each token", lambda made: _dealt(made, router="gate-token")),
    "mpoe": Arm("MPOE", lambda made: _converted(made, MoEConfig.mpoe()), packs=False),
    "microbert": Arm("MicroBERT-style, half depth", _half_depth, timed_as="half-depth", objective="microbert"),
}  # fmt: skip
