"""MoEBERT models for transformers. Importing this module makes `AutoConfig` and `AutoModel*` know them."""

# ruff: noqa: E402  what is missing is named before the imports that need it
from moebert_kernels.errors import require_extra

require_extra("train", "transformers")

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
from moebert_kernels.models.multi_task import MoEBertForMultiTaskClassification

__all__ = [
    "MoEBertConfig",
    "MoEBertForMaskedLM",
    "MoEBertForMultiTaskClassification",
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
    # which of the two is the configuration's `architectures`
    (AutoModelForSequenceClassification, (MoEBertForSequenceClassification, MoEBertForMultiTaskClassification)),
    (AutoModelForTokenClassification, MoEBertForTokenClassification),
):
    _auto.register(MoEBertConfig, _model, exist_ok=True)
