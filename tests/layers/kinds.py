"""A small model of each kind, with experts that differ, batches for it, and what of its outputs counts."""

import torch
import transformers as tf

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.layers import MoEConfig, moe_layers
from tests.convert import mpoe_models

V = mpoe_models.V
_ROUTERS = {
    "hash": "hash-random", "switch": "switch", "top2": "top2", "gate": "gate-token", "sentence": "gate-sentence",
    "task": "task",
}  # fmt: skip
MPOE = ("mpoe-bert-hash", "mpoe-bert-switch", "mpoe-gpt2-hash", "mpoe-gpt2-top2", "mpoe-t5-hash", "mpoe-t5-switch")
SPLIT = ("split-bert-hash", "split-bert-gate", "split-bert-sentence", "split-bert-task")
CLASSIFIERS = ("mpoe-bert-hash", "mpoe-bert-switch", *SPLIT)
KINDS = (*MPOE, *SPLIT)
HASHED = tuple(kind for kind in KINDS if kind.endswith("hash"))
LEARNED = tuple(kind for kind in KINDS if kind.endswith(("switch", "top2", "gate", "sentence")))


def model(kind, vocab_size=V, checkpointing=None, **changes):
    """In eval mode, the same in every call; classifiers have three labels.

    Args:
        checkpointing: arguments of `gradient_checkpointing_enable`, called before the conversion; None: it is not.
        changes: of the MoEConfig.
    """
    torch.manual_seed(0)
    method, family, router = kind.split("-")
    if family == "bert":
        config = tf.BertConfig(**mpoe_models._BERT | {"vocab_size": vocab_size, "initializer_range": 0.4}, num_labels=3)
        dense = tf.BertForSequenceClassification(config).eval()
    else:
        dense = mpoe_models.dense(family)
    if checkpointing is not None:
        dense.gradient_checkpointing_enable(checkpointing)
    if method == "mpoe":
        config = MoEConfig.mpoe(**{"num_experts": 3, "router": _ROUTERS[router]} | changes)
        return convert_to_moe(dense, config, num_sites=3, noise=1.0)
    fields = {"num_experts": 3, "router": _ROUTERS[router]}
    fields |= {"tasks": ["a", "b"]} if router == "task" else {"expert_size": 12, "num_shared_neurons": 6}
    moe = convert_to_moe(dense, MoEConfig(**fields | changes), importance=torch.arange(48.0).sin().view(2, 24) + 1)
    for layer in moe_layers(moe):
        if router in ("gate", "sentence", "task"):  # new ones are almost even
            torch.nn.init.normal_(layer.router.logits if router == "task" else layer.router.gate.weight)
    return moe


def batch(kind, seed=0, length=8, labels=False):
    """Three sequences, the first one padded; of another task for odd seeds."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind.endswith("task"):
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
