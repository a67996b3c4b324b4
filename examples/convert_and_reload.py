"""A dense BERT gets mixtures of experts in place, is saved, and is loaded by transformers' own AutoModel.

A small random BERT and random sentences stand in for your fine-tuned checkpoint and your training data.
"""

import copy
import tempfile

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from moebert_kernels.accuracy import error_and_bound
from moebert_kernels.convert import convert_to_moe, importance_scores  # lets AutoModel* load converted models
from moebert_kernels.layers import MoEConfig, moe_config

torch.manual_seed(0)
config = BertConfig(
    vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
)
teacher = BertForSequenceClassification(config).eval()
batches = [
    {
        "input_ids": torch.randint(0, 500, (8, 20)),
        "attention_mask": torch.ones(8, 20, dtype=torch.long),
        "labels": torch.randint(0, 3, (8,)),
    }
    for _ in range(4)
]

importance = importance_scores(teacher, batches)  # (layers, neurons), one backward pass per batch
config = MoEConfig.moebert(num_experts=4, expert_size=16, num_shared_neurons=8)
student = convert_to_moe(copy.deepcopy(teacher), config, importance=importance)  # a copy: conversion is in place

with tempfile.TemporaryDirectory() as folder:
    student.save_pretrained(folder)
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()

assert isinstance(reloaded, BertForSequenceClassification) and moe_config(reloaded.config) == moe_config(student.config)
same = all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in student.state_dict().items())
print("importance", tuple(importance.shape), "- the same weights and tables after a reload:", same)
assert same

inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
with torch.no_grad():
    logits, before = reloaded(**inputs).logits, student(**inputs).logits
    error, bound = error_and_bound(logits, before, exact=student.double()(**inputs).logits)
print(f"error of its logits {error.max():.1e}, at most {bound:.1e}")
assert error.max() <= bound
