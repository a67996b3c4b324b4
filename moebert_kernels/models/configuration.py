"""Configuration of MoEBERT models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from moebert_kernels.errors import UserError
from moebert_kernels.models.fields import (
    Field,
    check_fields,
    choice,
    flag,
    integer,
    mapping,
    number,
    numbered,
    optional,
    probability,
    shown,
    texts,
)
from moebert_kernels.nn.mpo_weight import check_factors

FORMAT_VERSION = 1
HASH_ROUTERS = ("hash-random", "hash-balance")
GATE_ROUTERS = ("gate-token", "gate-sentence")
TASK_ROUTER = "task"
ROUTERS = (*HASH_ROUTERS, *GATE_ROUTERS, TASK_ROUTER)
NORMS = ("expert", "layer")
PRESETS = ("default", "paper")
STYLES = ("bert", "roberta")

# transformers' name -> the ops' name
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "linear": "identity",
}


MOST_EXPERTS = 1 << 20
_MOST_LAYERS = 10_000
_MOST_LABELS = 1 << 20  # each has a name in the configuration

FIELDS: dict[str, Field] = {
    "router": choice(ROUTERS),
    "preset": choice(PRESETS),
    "style": choice(STYLES),
    "hidden_act": choice(ACTIVATIONS),
    "norm": choice(NORMS),
    "num_experts": integer(1, MOST_EXPERTS),
    "expert_size": integer(1),
    "num_hidden_layers": integer(1, _MOST_LAYERS),
    "hidden_size": integer(1),
    "vocab_size": integer(1),
    "top_k": integer(1),
    "num_attention_heads": integer(1),
    "max_position_embeddings": integer(1),
    "type_vocab_size": integer(1),
    "shared": integer(0),
    "pad_token_id": optional(integer(0)),
    "initializer_range": number(0),
    "layer_norm_eps": number(0),
    "load_balance": number(0),
    "hidden_dropout_prob": probability,
    "attention_probs_dropout_prob": probability,
    "expert_dropout": optional(probability),
    "classifier_dropout": optional(probability),
    "route_padding": flag,
    "original_batch1": flag,
    "tasks": optional(texts),
    "task_labels": optional(mapping),
}


class MoEBertConfig(PreTrainedConfig):
    """A BERT or RoBERTa encoder whose feed-forward layers are mixtures of experts.

    The fields of transformers' BertConfig, and:

    Args:
        num_experts: E, experts per layer.
        expert_size: I, neurons of each expert.
        shared: neurons that conversion copied into every expert. For information only.
        router: "hash-random" or "hash-balance" (a table of experts by token id in each layer), "gate-token" or
            "gate-sentence" (a learned gate), or "task" (learned logits per task: a task's tokens share their experts).
        tasks: names of the tasks, by task id; with router="task" alone.
        task_labels: of each task the names of its classes, none for a score: one head per task in
            `MoEBertForMultiTaskClassification`.
        top_k: experts per token; above 1 with norm="layer" alone. None: 2 with router="task" and norm="layer", else 1.
        norm: "expert" (MoEBERT's: residual and LayerNorm in each expert) or "layer" (one LayerNorm around the experts;
            with router="task" alone). None: "layer" with router="task", else "expert".
        w1_factors, w2_factors, max_bond: with router="task" alone: both weights of the experts share central tensors;
            see `MoEFeedForward`.
        expert_dropout: dropout on the experts' output. None: `hidden_dropout_prob`.
        load_balance: weight of the gates' balance loss in `loss`.
        preset: "default" skips padding where an attention mask says so; "paper" routes and computes it, as published.
        route_padding: the same switch by itself. None: what `preset` says.
        style: "bert" or "roberta": position ids, heads and their names as in transformers' models of that name.
        original_batch1: gate-sentence leaves the probability out at batch size 1, as the original code does.
        format_version: of the checkpoint's keys.

    Raises:
        UserError: a value that no model can be built from.
    """

    model_type = "moebert"
    keys_to_ignore_at_inference = ["balance_loss"]  # noqa: RUF012 - transformers reads it from the class

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    # transformers' attention modules read these two; a MoEBERT is always an encoder.
    is_decoder: bool = False
    add_cross_attention: bool = False

    num_experts: int = 4
    expert_size: int = 768
    shared: int = 512
    router: str = "hash-random"
    tasks: list[str] | None = None
    task_labels: dict[str, list[str]] | None = None
    top_k: int | None = None
    norm: str | None = None
    w1_factors: list[list[int]] | None = None
    w2_factors: list[list[int]] | None = None
    max_bond: int | list[int] | None = None
    expert_dropout: float | None = None
    load_balance: float = 0.0
    preset: str = "default"
    route_padding: bool | None = None
    style: str = "bert"
    original_batch1: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        check_labels(self.id2label, kwargs.get("num_labels", 1))
        if self.route_padding is None:
            self.route_padding = self.preset == "paper"
        if self.norm is None:
            self.norm = "layer" if self.is_task_routed else "expert"
        if self.top_k is None:
            self.top_k = 2 if self.is_task_routed and self.norm == "layer" else 1
        super().__post_init__(**kwargs)
        self.architectures = self.architectures or []  # transformers' Auto classes iterate over it
        self.check()
        if self.task_labels is not None:  # one classifier for all tasks, of which each has some rows
            names = [(task, self.task_labels[task]) for task in self.tasks or ()]
            rows = [f"{task}: {label}" if label else task for task, labels in names for label in labels or [""]]
            self.id2label = dict(enumerate(rows))
            self.label2id = {row: number for number, row in enumerate(rows)}

    @property
    def is_hash_routed(self) -> bool:
        return self.router in HASH_ROUTERS

    @property
    def is_task_routed(self) -> bool:
        return self.router == TASK_ROUTER

    @property
    def outputs_per_task(self) -> list[int]:
        """With `task_labels`: of each task the number of classes, 1 for a score."""
        return [len((self.task_labels or {})[name]) or 1 for name in self.tasks or ()]

    def task_id(self, name: str) -> int:
        """The number of a task.

        Raises:
            UserError: there is no such task, or the model does not route by task.
        """
        if name not in (self.tasks or ()):
            have = ", ".join(self.tasks) if self.tasks else f"none (router={self.router!r})"
            raise UserError(f"task: expected one of the model's tasks, {have}, got {name!r}")
        return self.tasks.index(name)

    def check(self) -> None:
        """Raise a UserError that names the first field no model can be built from."""
        check_fields(self, FIELDS)
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise UserError(f"pad_token_id: expected one below vocab_size={self.vocab_size}, got {self.pad_token_id}")
        self._check_tasks()
        if self.is_decoder or self.add_cross_attention:
            raise UserError("is_decoder: expected False, MoEBERT is an encoder, got True")
        if self.format_version != FORMAT_VERSION:
            raise UserError(f"format_version: expected {FORMAT_VERSION}, got {self.format_version!r}")

    def _check_tasks(self) -> None:
        if not self.is_task_routed:
            others = {"norm": "expert", "top_k": 1}
            for name in ("tasks", "task_labels", "w1_factors", "w2_factors", "max_bond", *others):
                only = others.get(name)
                if getattr(self, name) != only:
                    got = getattr(self, name)
                    raise UserError(f"{name}: expected {only!r} with router={self.router!r}, got {got!r}")
            return
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"tasks: expected different names with router='task', got {self.tasks!r}")
        if self.task_labels is not None:
            if self.task_labels.keys() != set(self.tasks):
                raise UserError(f"task_labels: expected labels of {', '.join(self.tasks)}, got {self.task_labels!r}")
            for task, labels in self.task_labels.items():
                if wanted := texts(labels):
                    raise UserError(f"task_labels: expected {wanted} for {task}, got {shown(labels)}")
        if (self.w1_factors is None) != (self.w2_factors is None):
            raise UserError(f"w2_factors: expected some as w1_factors={self.w1_factors}, got {self.w2_factors}")
        if self.w1_factors is not None:
            check_factors("w1_factors", self.w1_factors)
            check_factors("w2_factors", self.w2_factors)
        most = 1 if self.norm == "expert" else self.num_experts
        if self.top_k > most:
            raise UserError(
                f"top_k: expected at most {most} with num_experts={self.num_experts} and norm={self.norm!r}, "
                f"got {self.top_k}"
            )


def check_labels(id2label: Any, num_labels: Any) -> None:
    """Raise a UserError unless both can be what they are called; `id2label` may be None.

    To be called before transformers' `PreTrainedConfig` makes names of classes of them.
    """
    named = {"id2label": (id2label, optional(numbered)), "num_labels": (num_labels, integer(1, _MOST_LABELS))}
    for name, (value, field) in named.items():
        if wanted := field(value):
            raise UserError(f"{name}: expected {wanted}, got {shown(value)}")
