"""Outputs of MoEBERT models: transformers' own, with the routers' balance loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

# In all of them balance_loss is a scalar, the sum over layers (0 under hash routing), and
# loss = task loss + config.load_balance * balance_loss.


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
