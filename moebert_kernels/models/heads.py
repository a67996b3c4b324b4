"""MoEBERT with task heads, named and computed as in transformers' BERT and RoBERTa."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertOnlyMLMHead
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead, RobertaLMHead

from moebert_kernels.models.configuration import MoEBertConfig
from moebert_kernels.models.modeling import MoEBertModel, MoEBertPreTrainedModel
from moebert_kernels.models.outputs import (
    MoEBertMaskedLMOutput,
    MoEBertModelOutput,
    MoEBertQuestionAnsweringOutput,
    MoEBertSequenceClassifierOutput,
    MoEBertTokenClassifierOutput,
    balance_term,
)


class _WithHead(MoEBertPreTrainedModel):
    """What the task models share: the encoder, and the loss and flags around a head."""

    def __init__(self, config: MoEBertConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.moebert = MoEBertModel(config, add_pooling_layer=add_pooling_layer)

    def _total(self, task_loss: Tensor, encoded: MoEBertModelOutput) -> Tensor:
        balance = balance_term(encoded)
        if balance is None or not self.config.load_balance:
            return task_loss
        return task_loss + self.config.load_balance * balance

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _extras(encoded: MoEBertModelOutput) -> dict[str, Any]:
    return {
        "hidden_states": encoded.hidden_states,
        "attentions": encoded.attentions,
        "balance_loss": encoded.balance_loss,
    }


def _dropout(config: MoEBertConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class MoEBertForSequenceClassification(_WithHead):
    """Classification, or regression with one label (`config.problem_type` as in transformers)."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__(config, add_pooling_layer=config.style == "bert")
        if config.style == "roberta":
            self.classifier: nn.Module = RobertaClassificationHead(config)
        else:
            self.dropout = _dropout(config)
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | int | None = None,
    ) -> MoEBertSequenceClassifierOutput | tuple[Any, ...]:
        """`labels`: (B,) int64, or float for regression, or (B, num_labels) float for several labels at once."""
        encoded = self.moebert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, True, task_ids,
        )  # fmt: skip
        logits = self._logits(encoded)
        loss = None
        if labels is not None:
            task_loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            loss = self._total(task_loss, encoded)
        return self._output(loss, logits, encoded, return_dict)

    def _logits(self, encoded: MoEBertModelOutput) -> Tensor:
        if self.config.style == "roberta":
            return self.classifier(encoded.last_hidden_state)
        return self.classifier(self.dropout(encoded.pooler_output))

    def _output(
        self, loss: Tensor | None, logits: Tensor, encoded: MoEBertModelOutput, return_dict: bool | None
    ) -> MoEBertSequenceClassifierOutput | tuple[Any, ...]:
        return self._returned(
            MoEBertSequenceClassifierOutput(loss=loss, logits=logits, **_extras(encoded)), return_dict
        )


class MoEBertForTokenClassification(_WithHead):
    """A label for every token; label -100 is ignored."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__(config)
        self.dropout = _dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | int | None = None,
    ) -> MoEBertTokenClassifierOutput | tuple[Any, ...]:
        """`labels`: (B, T) int64."""
        encoded = self.moebert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, True, task_ids,
        )  # fmt: skip
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            task_loss = self.loss_function(logits=logits, labels=labels, config=self.config)
            loss = self._total(task_loss, encoded)
        return self._returned(MoEBertTokenClassifierOutput(loss=loss, logits=logits, **_extras(encoded)), return_dict)


class MoEBertForQuestionAnswering(_WithHead):
    """The start and the end of a span; positions past the sequence are ignored."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | int | None = None,
    ) -> MoEBertQuestionAnsweringOutput | tuple[Any, ...]:
        """`start_positions`, `end_positions`: (B,) int64."""
        encoded = self.moebert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, True, task_ids,
        )  # fmt: skip
        start_logits, end_logits = (
            logits.squeeze(-1).contiguous() for logits in self.qa_outputs(encoded.last_hidden_state).split(1, dim=-1)
        )
        loss = None
        if start_positions is not None and end_positions is not None:
            task_loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
            loss = self._total(task_loss, encoded)
        output = MoEBertQuestionAnsweringOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, **_extras(encoded)
        )
        return self._returned(output, return_dict)


class MoEBertForMaskedLM(_WithHead):
    """Predict masked tokens, with the output matrix tied to the word embeddings; label -100 is ignored."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__(config)
        head = "lm_head" if config.style == "roberta" else "cls.predictions"
        self._tied_weights_keys = {
            f"{head}.decoder.weight": "moebert.embeddings.word_embeddings.weight",
            f"{head}.decoder.bias": f"{head}.bias",
        }
        if config.style == "roberta":
            self.lm_head = RobertaLMHead(config)
        else:
            self.cls = BertOnlyMLMHead(config)
        self.post_init()

    @property
    def _head(self) -> Any:
        """The module that owns `decoder` and `bias`."""
        return self.lm_head if self.config.style == "roberta" else self.cls.predictions

    def get_output_embeddings(self) -> Any:
        return self._head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self._head.decoder = new_embeddings
        self._head.bias = new_embeddings.bias

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | int | None = None,
    ) -> MoEBertMaskedLMOutput | tuple[Any, ...]:
        """`labels`: (B, T) int64."""
        encoded = self.moebert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, True, task_ids,
        )  # fmt: skip
        logits = self._head(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            task_loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
            loss = self._total(task_loss, encoded)
        return self._returned(MoEBertMaskedLMOutput(loss=loss, logits=logits, **_extras(encoded)), return_dict)
