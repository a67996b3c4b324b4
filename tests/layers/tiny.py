"""Tiny random models, and inputs for each head."""

import torch

from moebert_kernels.models import (
    MoEBertConfig,
    MoEBertForMaskedLM,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
)

V, B, T = 60, 3, 9
HEADS = {
    "sequence": MoEBertForSequenceClassification,
    "token": MoEBertForTokenClassification,
    "qa": MoEBertForQuestionAnswering,
    "mlm": MoEBertForMaskedLM,
}
ROUTERS = ("hash-random", "hash-balance", "gate-token", "gate-sentence", "task")
STYLES = ("bert", "roberta")


def config(**changes):
    fields = {
        "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 24, "expert_size": 12, "initializer_range": 0.2,
    }  # fmt: skip
    if changes.get("router") == "task":
        fields["tasks"] = ["only"]  # which a model takes when it is told none
    return MoEBertConfig(**(fields | changes))


def model(head="sequence", **changes):
    """In eval mode; QA has two outputs, the other heads three labels unless told otherwise."""
    changes.setdefault("num_labels", 2 if head == "qa" else 3)
    return HEADS[head](config(**changes)).eval()


def inputs(batch=B, length=T):
    """Token ids and a mask; the first sequence is padded."""
    ids = torch.randint(2, V, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels(head, batch=B, length=T):
    if head == "qa":
        return {name: torch.randint(0, length, (batch,)) for name in ("start_positions", "end_positions")}
    return {"labels": torch.randint(0, 3, (batch,) if head == "sequence" else (batch, length))}
