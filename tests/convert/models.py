"""Tiny random models, dense and converted, batches for them and labels for their heads."""

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CamembertConfig,
    CamembertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.layers import MoEConfig

V, H, D, L = 60, 16, 48, 2
SIZES = dict(
    vocab_size=V, hidden_size=H, intermediate_size=D, num_hidden_layers=L, num_attention_heads=2,
    max_position_embeddings=24, initializer_range=0.3,
)  # fmt: skip

ROUTERS = ("hash-random", "hash-balance", "gate-token", "gate-sentence", "switch", "top2", "task")
CLASSES = {
    "bert": (BertConfig, BertModel),
    "bert-cls": (BertConfig, BertForSequenceClassification),
    "bert-qa": (BertConfig, BertForQuestionAnswering),
    "bert-mlm": (BertConfig, BertForMaskedLM),
    "bert-tokens": (BertConfig, BertForTokenClassification),
    "roberta": (RobertaConfig, RobertaModel),
    "roberta-cls": (RobertaConfig, RobertaForSequenceClassification),
    "roberta-qa": (RobertaConfig, RobertaForQuestionAnswering),
    "roberta-mlm": (RobertaConfig, RobertaForMaskedLM),
    "roberta-tokens": (RobertaConfig, RobertaForTokenClassification),
    "camembert-cls": (CamembertConfig, CamembertForSequenceClassification),
    "xlm-roberta-tokens": (XLMRobertaConfig, XLMRobertaForTokenClassification),
}


def dense_model(name: str, **options):
    """A random model in eval mode, every parameter (biases and norms too) away from its initial value."""
    config_class, model_class = CLASSES[name]
    if name.endswith(("-cls", "-tokens")) and not {"num_labels", "id2label"} & options.keys():
        options["num_labels"] = 3
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch_size: int = 4, T: int = 14, seed: int = 0, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Token ids with padding at the end of every second sentence."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (batch_size, T), generator=generator)
    mask = torch.ones(batch_size, T, dtype=torch.int64)
    mask[1::2, T // 2 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, pad_token_id), "attention_mask": mask}


def labels(name: str, batch: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Labels that fit the head of model `name`."""
    generator = torch.Generator().manual_seed(seed)
    B, T = batch["input_ids"].shape
    if name.endswith("-cls"):
        return {"labels": torch.randint(0, 3, (B,), generator=generator)}
    if name.endswith("-qa"):
        ends = torch.randint(0, T, (2, B), generator=generator)
        return {"start_positions": ends[0], "end_positions": ends[1]}
    classes = V if name.endswith("-mlm") else 3
    tokens = torch.randint(0, classes, (B, T), generator=generator)
    hidden = torch.rand(B, T, generator=generator) < 0.5
    return {"labels": tokens.masked_fill(hidden | (batch["attention_mask"] == 0), -100)}


def moe_model(name: str = "bert-cls", *, router: str = "hash-random", dense: dict | None = None, **fields):
    """A converted model in eval mode: 4 experts of 12 neurons, of which they share 4.

    Args:
        dense: options of `dense_model`.
        fields: of MoEConfig.
    """
    if router == "task":
        fields.setdefault("tasks", ["only"])  # which a model takes when it is told none
    if fields.get("experts", "split") == "split":
        fields = {"expert_size": 12, "num_shared_neurons": 4} | fields
    generator = torch.Generator().manual_seed(3)
    scores, counts = torch.rand(L, D, generator=generator), torch.arange(V)
    config = MoEConfig(router=router, **fields)
    return convert_to_moe(dense_model(name, **dense or {}), config, importance=scores, token_counts=counts)
