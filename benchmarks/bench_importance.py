"""Importance of all FFN neurons on one batch: one backward pass against the original's 2 L B.

Both must give the exact top neurons of every layer. The original's way takes minutes at BERT-base's size, so it
is timed once, on the call that is checked, and on a CPU with a smaller batch. Scores are float32 on a GPU too: a
half-precision model's top neurons are not the exact ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import baselines, encoders
from benchmarks.measuring import Case, Outputs, Provider, Requirement, Target
from moebert_kernels.convert import importance_scores

SECONDS = 30.0
PROVIDERS = ("moebert_kernels", "original")


def cases(target: Target) -> list[Case]:
    model = "smoke" if target.smoke else "bert-base"
    B, T, top = (2, 8, 16) if target.smoke else (8, 128, 512) if target.on_gpu else (4, 64, 512)
    return [
        Case(
            name=f"importance-B{B}-T{T}",
            parameters={"dtype": "float32", "B": B, "T": T, "top": top, "model": model},
            providers=PROVIDERS,
            build=lambda: _build(target.device, model, B, T, top),
            baseline="original",
            seconds=SECONDS,
            requires=() if target.on_gpu else (Requirement("moebert_kernels", "original", 25.0),),
        )
    ]


def _build(device: torch.device, size: str, B: int, T: int, top: int) -> dict[str, Provider]:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**encoders.SIZES[size], num_labels=3)).eval()
    baselines.randomise_constants(model)
    model.to(device)
    batch = {
        "input_ids": torch.randint(1, model.config.vocab_size, (B, T)).to(device),
        "attention_mask": torch.ones(B, T, dtype=torch.int64, device=device),
        "labels": torch.randint(0, 3, (B,)).to(device),
    }

    def with_top(outputs: Outputs) -> Outputs:
        """Scores (L, D), and 1 where a neuron is among its layer's `top`: those must be the exact ones."""
        scores = outputs[0].cpu()
        return scores, torch.zeros_like(scores).scatter_(1, scores.topk(top, dim=1).indices, 1.0)

    def original() -> Outputs:
        return (baselines.original_importance(*_ffn_weights(model), _losses(model, batch)),)

    def exact(dtype: torch.dtype) -> Outputs:
        converted = copy.deepcopy(model).to(dtype)
        scores = baselines.importance_by_definition(*_ffn_weights(converted), _one_by_one(converted, batch))
        return with_top((scores,))

    return {
        "moebert_kernels": Provider(
            lambda: (importance_scores(model, [batch]),), exact, arrange=with_top, capture=False
        ),
        "original": Provider(original, exact, arrange=with_top, slow=True),
    }


def _ffn_weights(model: BertForSequenceClassification) -> tuple[list[Tensor], list[Tensor]]:
    layers = model.bert.encoder.layer
    return [layer.intermediate.dense.weight for layer in layers], [layer.output.dense.weight for layer in layers]


def _losses(model: BertForSequenceClassification, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def _one_by_one(model: BertForSequenceClassification, batch: dict[str, Tensor]) -> Iterator[Tensor]:
    for i in range(len(batch["labels"])):
        yield _losses(model, {name: tensor[i : i + 1] for name, tensor in batch.items()})[0]
