"""A small model of each kind, with experts that differ, batches for it, and what of its outputs counts."""

import torch
import transformers as tf

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.layers import MoEConfig
from moebert_kernels.models import MoEBertForSequenceClassification
from tests.convert import mpoe_models
from tests.models import tiny

V = tiny.V
_ROUTERS = {"hash": "hash-random", "switch": "switch", "top2": "top2", "gate": "gate-token"}
MOEBERT = ("moebert-hash", "moebert-gate", "moebert-task")
MPOE = ("mpoe-bert-hash", "mpoe-bert-switch", "mpoe-gpt2-hash", "mpoe-gpt2-top2", "mpoe-t5-hash", "mpoe-t5-switch")
SPLIT = ("split-bert-hash", "split-bert-gate")
IN_PLACE = (*MPOE, *SPLIT)
CLASSIFIERS = (*MOEBERT, "mpoe-bert-hash", "mpoe-bert-switch", *SPLIT)
KINDS = (*MOEBERT, *IN_PLACE)
HASHED = tuple(kind for kind in KINDS if kind.endswith("hash"))


def model(kind, vocab_size=V):
    """In eval mode, the same in every call; classifiers have three labels."""
    torch.manual_seed(0)
    if kind in MOEBERT:
        routing = {
            "moebert-hash": {},
            "moebert-gate": {"router": "gate-token", "load_balance": 0.1},
            "moebert-task": {"router": "task", "tasks": ["a", "b"]},
        }[kind]
        config = tiny.config(**routing, num_labels=3, vocab_size=vocab_size, initializer_range=0.4)
        return MoEBertForSequenceClassification(config).eval()
    method, family, router = kind.split("-")
    if family == "bert":
        config = tf.BertConfig(**mpoe_models._BERT | {"vocab_size": vocab_size, "initializer_range": 0.4}, num_labels=3)
        dense = tf.BertForSequenceClassification(config).eval()
    else:
        dense = mpoe_models.dense(family)
    if method == "split":
        config = MoEConfig(num_experts=3, expert_size=12, num_shared_neurons=6, router=_ROUTERS[router])
        return convert_to_moe(dense, config, importance=torch.arange(48.0).sin().view(2, 24) + 1)
    return convert_to_moe(dense, MoEConfig.mpoe(num_experts=3, router=_ROUTERS[router]), num_sites=3, noise=1.0)


def batch(kind, seed=0, length=8, labels=False):
    """Three sequences, the first one padded; of another task for odd seeds."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "moebert-task":
        inputs["task_ids"] = torch.full((3,), seed % 2)
    if "t5" in kind:
        inputs["decoder_input_ids"] = torch.randint(2, V, (3, 4), generator=generator)
    if labels:
        inputs["labels"] = inputs.get("decoder_input_ids", ids) if kind not in CLASSIFIERS else torch.arange(3)
    return inputs


def logits(net, kind, inputs):
    """The logits, (3, ...) or those of all real tokens."""
    y = net(**inputs).logits
    return y[inputs["attention_mask"] != 0] if "gpt2" in kind else y


def replica(net):
    """What `nn.DataParallel` runs on a device: shallow copies without parameters of their own, which become plain
    tensors; as torch's `replicate`, without the copy to another device."""
    copies = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, copied in copies.items():
        copied._former_parameters = {}
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                setattr(copied, name, parameter.view_as(parameter))
    return copies[net]
