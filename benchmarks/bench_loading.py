"""Converting a dense model into a MoE model, and loading the result against loading the dense model.

Random weights at BERT-base's size, in files of a temporary folder that were just written: the system's file cache is
warm, as it is for a model that is loaded again.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel

from benchmarks import encoders
from benchmarks.measuring import Case, Outputs, Provider, Target
from moebert_kernels.convert import convert_to_moe
from moebert_kernels.layers import moe_layers

CONVERSION = ("moebert_kernels", "deepcopy_of_dense", "expert_by_expert")
LOADING = ("moebert_kernels", "dense")


def cases(target: Target) -> list[Case]:
    model = "smoke" if target.smoke else "bert-base"
    config = encoders.moe_config(model)
    parameters = {"model": model, "dtype": target.dtype_name, "E": config.num_experts, "I": config.expert_size,
                  "num_shared_neurons": config.num_shared_neurons}  # fmt: skip
    return [
        Case(
            f"convert-{model}", parameters, CONVERSION, lambda: _conversion(target, model), "deepcopy_of_dense",
            seconds=5.0,
        ),
        Case(f"load-{model}", parameters, LOADING, lambda: _loading(target, model), "dense", seconds=5.0),
    ]  # fmt: skip


def _conversion(target: Target, model: str) -> dict[str, Provider]:
    dense = encoders.dense_model(target, model)
    config, importance = encoders.moe_config(model), encoders.importance(model)
    E, experts, shared = config.num_experts, config.expert_size, config.num_shared_neurons

    def neurons(layer: int) -> list[Tensor]:
        """The neurons of each expert: MoEBERT (2204.07675), section 3.1."""
        by_importance = importance[layer].argsort(descending=True)
        return [torch.cat([by_importance[:shared], by_importance[shared:][e::E]])[:experts] for e in range(E)]

    def of_every_expert() -> list[list[Tensor]]:
        """The six parameters of each expert, layer by layer."""
        found = []
        for number, layer in enumerate(dense.encoder.layer):
            first, second, norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm
            for kept in (indices.to(target.device) for indices in neurons(number)):
                found.append([first.weight[kept], first.bias[kept], second.weight[:, kept], second.bias,
                              norm.weight, norm.bias])  # fmt: skip
        return found

    def stacked() -> Outputs:
        """w1, b1, w2, ... of each layer, as the MoE layer has them."""
        flat = of_every_expert()
        by_layer = [flat[i : i + E] for i in range(0, len(flat), E)]
        return tuple(torch.stack(of_kind) for layer in by_layer for of_kind in zip(*layer, strict=True))

    def ours() -> Outputs:
        """The copy's feed-forwards are replaced, so that the next call finds the dense model again."""
        moe = convert_to_moe(copy.deepcopy(dense), config, importance=importance)
        return tuple(tensor.detach() for layer in moe_layers(moe) for tensor in encoders.expert_weights(layer))

    def expert_by_expert() -> Outputs:
        """As the original: two linear modules and a norm for each expert, filled with rows of the dense ones."""
        with torch.no_grad():
            rest = copy.deepcopy(dense)
            modules = [_expert_modules(*weights) for weights in of_every_expert()]
            for number, layer in enumerate(rest.encoder.layer):
                layer.intermediate, layer.output = nn.Identity(), nn.ModuleList(modules[number * E : (number + 1) * E])
        return tuple(parameter.detach() for module in modules for parameter in module.parameters())

    def restacked(outputs: Outputs) -> Outputs:
        kinds = len(encoders.EXPERT_PARAMETERS)
        of_layers = [outputs[i : i + kinds * E] for i in range(0, len(outputs), kinds * E)]
        return tuple(torch.stack(layer[kind::kinds]) for layer in of_layers for kind in range(kinds))

    def weights(parameters: Any) -> Outputs:
        return tuple(parameter.detach() for parameter in parameters)

    def exactly(outputs: Callable[[], Outputs]) -> Callable[[torch.dtype], Outputs]:
        return lambda dtype: tuple(tensor.detach().to(dtype) for tensor in outputs())

    split = exactly(stacked)
    return {
        "moebert_kernels": Provider(ours, split, capture=False),
        "deepcopy_of_dense": Provider(
            lambda: weights(copy.deepcopy(dense).parameters()), exactly(lambda: weights(dense.parameters())),
            capture=False,
        ),
        "expert_by_expert": Provider(expert_by_expert, split, arrange=restacked, capture=False),
    }  # fmt: skip


def _expert_modules(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> nn.Module:
    modules = [nn.Linear(w1.shape[1], w1.shape[0]), nn.Linear(w2.shape[1], w2.shape[0]), nn.LayerNorm(len(b2))]
    expert = nn.ModuleList(module.to(device=w1.device, dtype=w1.dtype) for module in modules)
    for parameter, values in zip(expert.parameters(), (w1, b1, w2, b2, norm_weight, norm_bias), strict=True):
        parameter.copy_(values)
    return expert


def _loading(target: Target, model: str) -> dict[str, Provider]:
    models: dict[str, nn.Module] = {
        "moebert_kernels": encoders.moe_model(target, model), "dense": encoders.dense_model(target, model)
    }  # fmt: skip
    return {name: _loaded(saved, target) for name, saved in models.items()}


def _loaded(saved: Any, target: Target) -> Provider:
    folder = tempfile.TemporaryDirectory()  # goes when the provider goes
    saved.save_pretrained(folder.name)

    def state(model: nn.Module) -> Outputs:
        tensors = dict(sorted(model.state_dict().items()))
        return tuple(tensor for tensor in tensors.values() if tensor.is_floating_point())

    def load() -> Outputs:
        return state(BertModel.from_pretrained(Path(folder.name), dtype=target.dtype).to(target.device))

    return Provider(load, lambda dtype: tuple(tensor.to(dtype) for tensor in state(saved)), capture=False)
