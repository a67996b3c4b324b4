"""Whole encoders of BERT-base's size with random weights: dense, ideal (dense with the expert's width), ours, original.

The original's layer stands in the same transformers encoder and has the same weights and tables as ours. Token ids are
uniform, so experts are about equally loaded, but for padding, which is one token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks import baselines
from benchmarks.measuring import Case, Outputs, Provider, Requirement, Target
from moebert_kernels import reference
from moebert_kernels.models import MoEBertConfig, MoEBertModel

SECONDS = 25.0
REAL_TOKENS = 40  # of 128, about MNLI's mean length
SMOKE = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
}  # fmt: skip


def cases(target: Target) -> list[Case]:
    smoke = target.smoke
    T, real = (16, 5) if smoke else (128, REAL_TOKENS)
    whole = ("moebert_kernels", "dense", "ideal", "original")
    padded = ("moebert_kernels", "padding_routed", "original")
    return [
        _case("encoder-B8", whole, smoke, 8, T, T, "dense", Requirement("moebert_kernels", "ideal", 0.95),
              Requirement("moebert_kernels", "original", 1.0)),
        _case("encoder-B1", whole, smoke, 1, T, T, "dense", Requirement("moebert_kernels", "dense", 1.65),
              Requirement("moebert_kernels", "original", 1.0)),
        _case("encoder-B8-padded", padded, smoke, 8, T, real, "padding_routed",
              Requirement("moebert_kernels", "padding_routed", 1.2)),
    ]  # fmt: skip


def _case(
    name: str, providers: tuple[str, ...], smoke: bool, B: int, T: int, real: int, baseline: str, *requires: Requirement
) -> Case:
    expert_size = 32 if smoke else 768
    return Case(
        name=f"{name}-T{T}",
        parameters={"dtype": "float32", "B": B, "T": T, "real_tokens": real, "E": 4, "I": expert_size,
                    "model": "smoke" if smoke else "bert-base"},
        providers=providers,
        build=lambda: _build(providers, SMOKE if smoke else {}, B, T, real, expert_size),
        baseline=baseline,
        requires=requires,
        seconds=SECONDS,
    )  # fmt: skip


def _build(
    providers: tuple[str, ...], sizes: dict[str, int], B: int, T: int, real: int, expert_size: int
) -> dict[str, Provider]:
    torch.manual_seed(0)
    config = BertConfig(**sizes)
    token_ids = torch.randint(1, config.vocab_size, (B, T))
    mask = None
    if real < T:
        mask = torch.ones(B, T, dtype=torch.int64)
        mask[:, real:] = 0
        token_ids[:, real:] = config.pad_token_id

    moe = MoEBertModel(MoEBertConfig(**sizes, num_experts=4, expert_size=expert_size)).eval()
    baselines.randomise_constants(moe)
    # both references keep the fast model's weights, tables and everything else
    skipping, routing = (_naive_reference(moe, token_ids, mask, skip) for skip in (mask is not None, False))
    built: dict[str, Provider] = {}
    for name in providers:
        if name == "moebert_kernels":
            built[name] = Provider(_forward(moe, token_ids, mask), skipping)
        elif name == "padding_routed":
            routed = copy.deepcopy(moe)
            routed.config.route_padding = True
            built[name] = Provider(_forward(routed, token_ids, mask), routing)
        elif name == "original":
            original, set_token_ids = _with_experts(moe, _original_layer, lambda ids, table: table[ids])
            set_token_ids(token_ids)
            built[name] = Provider(_forward(original, token_ids, mask), routing)
        else:
            width = {"intermediate_size": expert_size} if name == "ideal" else {}
            dense = BertModel(BertConfig(**(sizes | width))).eval()
            baselines.randomise_constants(dense)
            built[name] = Provider(_forward(dense, token_ids, mask), _in_dtype(dense, token_ids, mask))
    return built


def _forward(model: nn.Module, token_ids: Tensor, mask: Tensor | None) -> Callable[[], Outputs]:
    def run() -> Outputs:
        with torch.no_grad():
            return (model(input_ids=token_ids, attention_mask=mask).last_hidden_state,)

    return run


def _in_dtype(model: nn.Module, token_ids: Tensor, mask: Tensor | None) -> Callable[[torch.dtype], Outputs]:
    return lambda dtype: _forward(copy.deepcopy(model).to(dtype), token_ids, mask)()


def _with_experts(
    moe: MoEBertModel, make_experts: Callable[[list[Tensor]], baselines.ExpertFunction],
    route: Callable[[Tensor, Tensor], Tensor],
) -> tuple[BertModel, Callable[[Tensor], None]]:  # fmt: skip
    """Transformers' BERT with the weights and tables of `moe`, computed another way."""

    def layer(number: int) -> tuple[Tensor, baselines.ExpertFunction]:
        source = moe.encoder.layer[number]
        return source.router.table.long(), make_experts(list(source.experts.parameters()))

    fields = BertConfig().to_dict()
    config = BertConfig(**{k: v for k, v in moe.config.to_dict().items() if k in fields and k != "model_type"})
    config.intermediate_size = 1  # built and replaced
    attention_state = {
        key: t for key, t in moe.state_dict().items() if ".experts." not in key and ".router." not in key
    }
    return baselines.bert_with_experts(config, attention_state, layer, route)


def _original_layer(weights: list[Tensor]) -> baselines.ExpertFunction:
    return baselines.OriginalExperts(*weights)


def _naive_reference(
    moe: MoEBertModel, token_ids: Tensor, mask: Tensor | None, skip_padding: bool
) -> Callable[[torch.dtype], Outputs]:
    """The encoder with `reference.fused_moe_ffn_add_norm` in every layer."""

    def naive_layer(weights: list[Tensor]) -> baselines.ExpertFunction:
        return lambda x, expert_ids: reference.fused_moe_ffn_add_norm(x, expert_ids, *(w.to(x.dtype) for w in weights))

    def outputs(dtype: torch.dtype) -> Outputs:
        flat_mask = mask.flatten() if skip_padding and mask is not None else None
        model, set_token_ids = _with_experts(
            moe, naive_layer, lambda ids, table: reference.hash_route(ids, table, flat_mask)
        )
        set_token_ids(token_ids)
        return _forward(model.to(dtype), token_ids, mask)()

    return outputs


def test_encoder(case, provider, run_provider):
    run_provider(case, provider)
