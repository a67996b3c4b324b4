"""Outputs of MoEBERT models: transformers' own, with the routers' balance loss.

In all of them `balance_loss` is None where no learned gate routes, and else (B,): the sum over layers, the same number
for every sequence of the batch. So it can be indexed, cut, concatenated and gathered as logits can, and the mean of
what was gathered is that of the batches. loss = task loss + config.load_balance * balance loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from moebert_kernels.layers import summed_losses


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


def by_sequence(losses: Sequence[Tensor], batch_size: int) -> Tensor | None:
    """`balance_loss` (B,) of the layers' balance losses (); None of none."""
    return summed_losses(losses).expand(batch_size) if losses else None


def balance_term(output: Any) -> Tensor | None:
    """The balance loss () of one forward's output, or None."""
    balance = getattr(output, "balance_loss", None)
    return None if balance is None else balance[:1].sum()  # a mean of equal numbers would round
