"""Outputs of MoE models: transformers' own, with the routers' balance loss.

In all of them `balance_loss` is None where no learned gate routes, and else (B,): the sum over layers, the same number
for every sequence of the batch. So it can be indexed, cut, concatenated and gathered as logits can, and the mean of
what was gathered is that of the batches. loss = task loss + config.load_balance * balance loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)


@dataclass
class MoEBertModelOutput(BaseModelOutputWithPooling):
    balance_loss: Tensor | None = None


@dataclass
class MoEBertSequenceClassifierOutput(SequenceClassifierOutput):
    balance_loss: Tensor | None = None


@dataclass
class MoEBertTokenClassifierOutput(TokenClassifierOutput):
    balance_loss: Tensor | None = None


@dataclass
class MoEBertMaskedLMOutput(MaskedLMOutput):
    balance_loss: Tensor | None = None


@dataclass
class MoEBertQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    balance_loss: Tensor | None = None


def _extended(output_class: type) -> Any:
    added: list[Any] = [("balance_loss", Tensor | None, field(default=None))]
    return make_dataclass(
        f"MPOE{output_class.__name__}", added, bases=(output_class,), namespace={"__module__": __name__}
    )


# What the forwards of MPOE models return, by what the dense models' return.
MPOE_OUTPUTS: dict[type, Any] = {
    output_class: _extended(output_class)
    for output_class in (
        BaseModelOutput,
        BaseModelOutputWithPastAndCrossAttentions,
        BaseModelOutputWithPoolingAndCrossAttentions,
        CausalLMOutputWithCrossAttentions,
        MaskedLMOutput,
        QuestionAnsweringModelOutput,
        Seq2SeqLMOutput,
        Seq2SeqModelOutput,
        Seq2SeqQuestionAnsweringModelOutput,
        Seq2SeqSequenceClassifierOutput,
        SequenceClassifierOutput,
        SequenceClassifierOutputWithPast,
        TokenClassifierOutput,
    )
}
globals().update({made.__name__: made for made in MPOE_OUTPUTS.values()})  # where pickle looks for them


def with_balance_loss(output: Any, losses: Sequence[Tensor], weight: float) -> Any:
    """The output of a dense model's forward with its layers' balance losses (), and `weight` times them in `loss`."""
    values = {entry.name: getattr(output, entry.name) for entry in fields(output)}
    first = next(value for name, value in values.items() if name != "loss" and isinstance(value, Tensor))
    balance = by_sequence(losses, first.shape[0])
    if balance is not None and weight and values.get("loss") is not None:
        values["loss"] = values["loss"] + weight * _one(balance)
    return MPOE_OUTPUTS[type(output)](**values, balance_loss=balance)


def by_sequence(losses: Sequence[Tensor], batch_size: int) -> Tensor | None:
    """`balance_loss` (B,) of the layers' balance losses (); None of none."""
    if not losses:
        return None
    total = losses[0]
    for loss in losses[1:]:
        total = total.to(loss.device) + loss
    return total.expand(batch_size)


def balance_term(output: Any) -> Tensor | None:
    """The balance loss () of one forward's output, or None."""
    balance = getattr(output, "balance_loss", None)
    return None if balance is None else _one(balance)


def _one(balance: Tensor) -> Tensor:
    return balance[:1].sum()  # a mean of equal numbers would round
