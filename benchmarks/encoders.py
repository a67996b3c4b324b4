"""Whole encoders with random weights at real shapes: dense ones, ours, the original's layer, and the naive reference.

The original's layers and the reference stand in the same transformers encoder and have the same weights and tables as
our model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks import baselines, real_text
from benchmarks.measuring import Outputs, Target
from benchmarks.model import Cost, encoder_cost
from moebert_kernels import reference
from moebert_kernels.convert import convert_to_moe
from moebert_kernels.layers import MoEConfig, MoEFeedForward

NUM_EXPERTS = 4
EXPERT_PARAMETERS = ("w1", "b1", "w2", "b2", "norm_weight", "norm_bias")  # in the order of the layer's op
# what differs from BERT-base's configuration; an expert has a quarter of the dense layer's neurons
SIZES: dict[str, dict[str, int]] = {
    "bert-base": {},
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "smoke": {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 128, "max_position_embeddings": 128},
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Token ids (B, T) int64, and a mask (B, T) that is 0 at padding, or None where nothing is padded."""

    ids: Tensor
    mask: Tensor | None


def padded_batch(target: Target, model: str, lengths: list[int]) -> Batch:
    """Uniform ids, each sequence padded on the right to the longest."""
    config = BertConfig(**SIZES[model])
    generator = torch.Generator().manual_seed(0)
    ids = real_text.token_ids(lengths, config.vocab_size, config.pad_token_id, generator).to(target.device)
    return Batch(ids, None if min(lengths) == max(lengths) else (ids != config.pad_token_id).long())


def dense_model(target: Target, model: str, **changed: int) -> BertModel:
    """Transformers' BertModel of that size, `changed` fields of its configuration aside."""
    torch.manual_seed(0)
    return _ready(BertModel(BertConfig(**(SIZES[model] | changed))), target)


def moe_model(target: Target, model: str) -> BertModel:
    """Transformers' BertModel of that size, converted by random importance; no two experts have equal constants."""
    torch.manual_seed(0)
    dense = BertModel(BertConfig(**SIZES[model]))
    return _ready(convert_to_moe(dense, moe_config(model), importance=importance(model)), target)


def expert_size(model: str) -> int:
    return BertConfig(**SIZES[model]).intermediate_size // NUM_EXPERTS


def moe_config(model: str) -> MoEConfig:
    """MoEBERT's; two thirds of an expert's neurons are in all experts, as in the paper."""
    size = expert_size(model)
    return MoEConfig.moebert(num_experts=NUM_EXPERTS, expert_size=size, num_shared_neurons=size * 2 // 3)


def importance(model: str) -> Tensor:
    """Random scores (L, D)."""
    config = BertConfig(**SIZES[model])
    shape = (config.num_hidden_layers, config.intermediate_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def expert_weights(layer: MoEFeedForward) -> list[Tensor]:
    """The parameters of a layer's experts, in the order of `EXPERT_PARAMETERS`."""
    return [getattr(layer.experts, name) for name in EXPERT_PARAMETERS]


def num_layers(model: str) -> int:
    return BertConfig(**SIZES[model]).num_hidden_layers


def moe_cost(
    target: Target, model: str, lengths: list[list[int]], skip_padding: bool = True, direction: str = "forward"
) -> Cost:
    """FLOPs and bytes of our model over all batches, once in that direction."""
    config = BertConfig(**SIZES[model])
    return _cost(target, config, lengths, NUM_EXPERTS, expert_size(model), skip_padding, direction)


def dense_cost(
    target: Target, model: str, lengths: list[list[int]], direction: str = "forward", **changed: int
) -> Cost:
    """The same of the dense model, with `changed` fields of its configuration."""
    config = BertConfig(**(SIZES[model] | changed))
    return _cost(target, config, lengths, 1, config.intermediate_size, False, direction)


def _cost(
    target: Target, config: BertConfig, lengths: list[list[int]], E: int, I: int, skip_padding: bool, direction: str
) -> Cost:  # fmt: skip
    sizes = {"L": config.num_hidden_layers, "H": config.hidden_size, "E": E, "I": I, "dtype": target.dtype}
    total = Cost()
    for batch in lengths:
        B, S = len(batch), max(batch)
        routed = sum(batch) if skip_padding else B * S
        total += encoder_cost(direction, B=B, S=S, routed_tokens=routed, **sizes)
    return total


def forward(model: nn.Module, batches: list[Batch]) -> Callable[[], Outputs]:
    """A callable that returns the last hidden states of each batch."""

    def run() -> Outputs:
        with torch.no_grad():
            return tuple(model(input_ids=b.ids, attention_mask=b.mask).last_hidden_state for b in batches)

    return run


def in_dtype(model: nn.Module, batches: list[Batch]) -> Callable[[torch.dtype], Outputs]:
    """The reference of a dense model: itself in another dtype."""
    return lambda dtype: forward(copy.deepcopy(model).to(dtype), batches)()


def naive(moe: BertModel, batches: list[Batch], skip_padding: bool) -> Callable[[torch.dtype], Outputs]:
    """The reference of ours: `reference.fused_moe_ffn_add_norm` in every layer, everything else transformers' own."""

    def outputs(dtype: torch.dtype) -> Outputs:
        model, route = with_naive_experts(moe, skip_padding)
        model.to(dtype)
        results: list[Tensor] = []
        for batch in batches:
            route(batch)
            results += forward(model, [batch])()
        return tuple(results)

    return outputs


def original(moe: BertModel, batches: list[Batch]) -> Callable[[], Outputs]:
    """Our model's weights and tables with the original's layers, which route padding like every token."""
    model, route = _with_experts(moe, lambda weights: baselines.OriginalExperts(*weights), skip_padding=False)

    def run() -> Outputs:
        results: list[Tensor] = []
        for batch in batches:
            route(batch)
            results += forward(model, [batch])()
        return tuple(results)

    return run


def with_naive_experts(moe: BertModel, skip_padding: bool) -> tuple[BertModel, Callable[[Batch], None]]:
    """Transformers' BERT that computes what `moe` does, naively, and a function that tells it the batch to come."""

    def layer(weights: list[Tensor]) -> baselines.ExpertFunction:
        return lambda x, expert_ids: reference.fused_moe_ffn_add_norm(x, expert_ids, *(w.to(x.dtype) for w in weights))

    return _with_experts(moe, layer, skip_padding)


def _with_experts(
    moe: BertModel, make_experts: Callable[[list[Tensor]], baselines.ExpertFunction], skip_padding: bool
) -> tuple[BertModel, Callable[[Batch], None]]:
    masks: list[Tensor | None] = [None]

    def layer(number: int) -> tuple[Tensor, baselines.ExpertFunction]:
        source: Any = moe.encoder.layer[number].output
        return source.router.table.long(), make_experts(expert_weights(source))

    def route(ids: Tensor, table: Tensor) -> Tensor:
        return reference.hash_route(ids, table, masks[0]) if skip_padding else table[ids]

    config = copy.deepcopy(moe.config)
    del config.quantization_config
    config.intermediate_size = 1  # built and replaced
    state = {key: t for key, t in moe.state_dict().items() if ".experts." not in key and ".router." not in key}
    model, set_token_ids = baselines.bert_with_experts(config, state, layer, route)

    def set_batch(batch: Batch) -> None:
        set_token_ids(batch.ids)
        masks[0] = None if batch.mask is None else batch.mask.flatten()

    return model.to(device=moe.device, dtype=moe.dtype), set_batch


def _ready(model: Any, target: Target) -> Any:
    baselines.randomise_constants(model)
    return model.to(device=target.device, dtype=target.dtype).eval()
