"""MoEBERT models for transformers. Importing this module makes `AutoConfig` and `AutoModel*` know them."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from moebert_kernels.models.configuration import MoEBertConfig
from moebert_kernels.models.heads import (
    MoEBertForMaskedLM,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
)
from moebert_kernels.models.modeling import MoEBertModel

__all__ = [
    "MoEBertConfig",
    "MoEBertForMaskedLM",
    "MoEBertForQuestionAnswering",
    "MoEBertForSequenceClassification",
    "MoEBertForTokenClassification",
    "MoEBertModel",
]

AutoConfig.register(MoEBertConfig.model_type, MoEBertConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, MoEBertModel),
    (AutoModelForMaskedLM, MoEBertForMaskedLM),
    (AutoModelForQuestionAnswering, MoEBertForQuestionAnswering),
    (AutoModelForSequenceClassification, MoEBertForSequenceClassification),
    (AutoModelForTokenClassification, MoEBertForTokenClassification),
):
    _auto.register(MoEBertConfig, _model, exist_ok=True)
