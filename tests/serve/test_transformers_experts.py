"""Prepared Mixture-of-Experts models of transformers itself, against their own eager experts."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification

from moebert_kernels.serve import describe, prepare
from moebert_kernels.serve.dtypes import DTYPES
from moebert_kernels.serve.modules import PackedLinear
from moebert_kernels.serve.packed import available
from moebert_kernels.serve.transformers_experts import PackedTransformersExperts
from tests.integrations.experts import make_experts, routing
from tests.serve.test_prepare import CLOSE, distance

SMALL = dict(vocab_size=60, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
FAMILIES = {
    "openai_privacy_filter": dict(
        intermediate_size=20, num_local_experts=16, num_experts_per_tok=4, head_dim=16, pad_token_id=0, eos_token_id=0
    ),
    "gpt_oss": dict(intermediate_size=20, num_local_experts=16, num_experts_per_tok=2, head_dim=16, pad_token_id=0),
    "mixtral": dict(intermediate_size=20, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(moe_intermediate_size=20, num_experts=16, num_experts_per_tok=2, head_dim=16),
}
IDS = torch.arange(2 * 9).view(2, 9) * 7 % 60


@pytest.fixture(autouse=True)
def one_engine(monkeypatch):
    monkeypatch.setattr("moebert_kernels.serve.packed.available", lambda dtype: available(dtype)[-1:])


def tiny(family, auto=AutoModel):
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def hidden(model):
    with torch.no_grad():
        return model(IDS)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_families(family, dtype, tmp_path):
    model = tiny(family)
    expected = hidden(model)
    prepared = prepare(copy.deepcopy(model), dtype)
    got = hidden(prepared)
    # one token in twenty may choose another expert where two are close
    close = CLOSE[dtype] if dtype == "float32" else 5 * CLOSE[dtype]
    assert distance(got, expected) < close
    experts = [module for module in prepared.modules() if isinstance(module, PackedTransformersExperts)]
    assert len(experts) == 2 and "experts" in describe(prepared)
    prepared.save_pretrained(tmp_path)
    for one in (AutoModel.from_pretrained(tmp_path, attn_implementation="eager"), copy.deepcopy(prepared)):
        assert torch.equal(hidden(one), got)


def test_a_head_and_the_routers():
    model = tiny("openai_privacy_filter", AutoModelForTokenClassification)
    expected = hidden(model)
    prepared = prepare(model, "float32")
    assert distance(hidden(prepared), expected) < 1e-5
    layer = prepared.model.layers[0]
    assert type(layer.mlp.router).__name__ == "OpenAIPrivacyFilterTopKRouter" and layer.mlp.router.weight.numel()
    assert isinstance(layer.self_attn.q_proj, PackedLinear)
    half = prepare(tiny("openai_privacy_filter"), "bfloat16").layers[0]
    # transformers loads the sinks in float32 whatever the dtype
    assert half.self_attn.sinks.dtype == torch.float32 and half.mlp.router.weight.dtype == torch.bfloat16


def test_a_router_that_is_a_linear_layer_inside_a_module_is_left():
    """Which of 16 logits are the largest is not asked of 8 bits."""
    config = AutoConfig.for_model(
        "afmoe", **SMALL, intermediate_size=20, moe_intermediate_size=20, num_experts=16, num_experts_per_tok=2,
        head_dim=16, num_dense_layers=0, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    layer = prepare(AutoModel.from_config(config, experts_implementation="eager").eval(), "int8").layers[0]
    assert isinstance(layer.mlp.experts, PackedTransformersExperts) and type(layer.mlp.router.gate) is torch.nn.Linear
    assert isinstance(layer.self_attn.q_proj, PackedLinear)


@pytest.mark.parametrize("options", [
    {}, {"has_gate": False}, {"has_bias": True}, {"is_transposed": True, "has_bias": True},
    {"act": "relu2"}, {"own_gate": lambda self, h: torch.tanh(h[..., ::2]) * h[..., 1::2], "is_concatenated": False},
    {"has_post_expert_norm": True},
], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
@pytest.mark.parametrize("tokens", [0, 1, 37, 400])
def test_every_option_of_the_decorator(options, tokens):
    experts = make_experts(**options)
    experts.config._experts_implementation = "eager"
    x, (ids, p) = torch.randn(tokens, 24), routing(tokens)
    p = torch.where((ids >= 0) & (ids < 5), p, 0)
    with torch.no_grad():
        expected = experts(x, ids, p)
        made = PackedTransformersExperts.of(experts, "float32")
        made.pack(lambda shape, of_experts: "plain")
        assert (made(x, ids, p) - expected).abs().max() < 1e-4 if tokens else made(x, ids, p).shape == (0, 24)
