"""transformers' models on our ops against their own eager experts: values, gradients, dtypes, skipped ids, errors."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moebert_kernels.integrations import transformers as integration
from tests.helpers import assert_as_accurate, assert_same_model
from tests.integrations.experts import (
    TOP_K,
    E,
    H,
    I,
    T,
    assert_matches_eager,
    interleaved_gate,
    make_experts,
    routing,
    run_experts,
)

NAME = "moebert_kernels"
SMALL = dict(vocab_size=60, hidden_size=H, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=E)
# Which op runs a model's experts: all of it, or its two matrices.
FAMILIES = {
    "mixtral": ("fused_moe_ffn", dict(intermediate_size=I, num_local_experts=E)),
    "qwen2_moe": ("fused_moe_ffn", dict(moe_intermediate_size=I, shared_expert_intermediate_size=I, num_experts=E)),
    "qwen3_moe": ("fused_moe_ffn", dict(moe_intermediate_size=I, num_experts=E, head_dim=12)),
    "deepseek_v2": ("fused_moe_ffn", dict(moe_intermediate_size=I, num_experts_per_tok=TOP_K, **LATENT)),
    "deepseek_v3": (
        "fused_moe_ffn",
        dict(moe_intermediate_size=I, first_k_dense_replace=1, n_group=1, topk_group=1, **LATENT),
    ),
    "gpt_oss": ("expert_gemm", dict(intermediate_size=I, num_local_experts=E, head_dim=12)),
    "nemotron_h": (
        "fused_moe_ffn",  # relu2, no gate
        dict(moe_intermediate_size=I, layer_types=["moe", "full_attention", "moe"], head_dim=12, n_routed_experts=E),
    ),
}


@pytest.fixture(autouse=True)
def registered():
    integration.register()


@pytest.fixture
def calls(monkeypatch):
    """How often the integration called each op."""
    counted = Counter()

    def counting(op, call):
        def count(*args, **kwargs):
            counted[op] += 1
            return call(*args, **kwargs)

        return count

    for op in ("group_tokens", "fused_moe_ffn", "expert_gemm"):
        monkeypatch.setattr(integration, op, counting(op, getattr(integration, op)))
    return counted


def tiny_model(family, **options):
    config = AutoConfig.for_model(family, **{"num_experts_per_tok": TOP_K, **SMALL, **FAMILIES[family][1]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def run_model(model, implementation, dtype):
    """Logits and the gradients of all parameters, by name."""
    model = copy.deepcopy(model).to(dtype)
    model.set_experts_implementation(implementation)
    input_ids = torch.arange(2 * 9).view(2, 9) * 7 % 60
    logits = model(input_ids=input_ids).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=dtype).view(logits.shape)).sum().backward()
    return {"logits": logits} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_match_eager(family, calls):
    model = tiny_model(family)
    got = run_model(model, NAME, torch.float32)
    op = FAMILIES[family][0]
    layers = calls["group_tokens"]
    assert layers >= 1
    assert calls == Counter({"group_tokens": layers, op: layers if op == "fused_moe_ffn" else 2 * layers})
    eager, exact = (run_model(model, "eager", dtype) for dtype in (torch.float32, torch.float64))
    assert got.keys() == eager.keys()
    assert any("experts" in name for name in got)
    for name in got:
        assert_as_accurate(got[name], eager[name], exact[name], name)


def test_every_way_to_ask_for_it(tmp_path, calls):
    model = tiny_model("mixtral", experts_implementation=NAME)
    model.save_pretrained(tmp_path)
    how = {"attn_implementation": "eager", "experts_implementation": NAME}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    input_ids = torch.arange(6)[None]
    assert_same_model(loaded, model, lambda model: model(input_ids).logits)
    assert calls["fused_moe_ffn"] == 3 * 2  # layers
    with torch.no_grad():
        model.set_experts_implementation("grouped_mm")
        model(input_ids)
        assert calls["fused_moe_ffn"] == 6
        model.set_experts_implementation(NAME)
        model(input_ids)
    assert calls["fused_moe_ffn"] == 8


def test_register_twice():
    before = list(ALL_EXPERTS_FUNCTIONS)
    integration.register()
    assert list(ALL_EXPERTS_FUNCTIONS) == before
    assert ALL_EXPERTS_FUNCTIONS[NAME] is integration.experts_forward


LAYOUTS = [
    dict(zip(("has_gate", "has_bias", "is_transposed", "has_post_expert_norm"), values, strict=True))
    for values in itertools.product((True, False), repeat=4)
]


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: "-".join(k for k, v in o.items() if v) or "plain")
def test_every_layout(options):
    ids, p = routing()
    assert_matches_eager(make_experts(**options), torch.randn(T, H), ids, p)


def test_interleaved_gate_of_its_own():
    ids, p = routing()
    experts = make_experts(own_gate=interleaved_gate, is_concatenated=False, is_transposed=True, has_bias=True)
    assert_matches_eager(experts, torch.randn(T, H), ids, p)


class OtherSiLU(nn.SiLU):
    """A subclass may compute anything."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "act, gated, ungated",
    [
        ("silu", "swiglu", "silu"),
        ("swish", "swiglu", "silu"),
        ("gelu", "geglu", "gelu"),
        (nn.GELU(), "geglu", "gelu"),
        ("relu", "reglu", "relu"),
        ("gelu_pytorch_tanh", "geglu_tanh", "gelu_tanh"),
        (nn.GELU(approximate="tanh"), "geglu_tanh", "gelu_tanh"),
        ("relu2", None, "relu2"),
        (OtherSiLU(), None, None),
        (F.silu, "swiglu", "silu"),
        (F.gelu, "geglu", "gelu"),
        (torch.tanh, None, None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # a function's address is another one in each process
)
def test_activations(act, gated, ungated):
    x, (ids, p) = torch.randn(T, H), routing()
    for has_gate, name in ((True, gated), (False, ungated)):
        experts = make_experts(act, has_gate=has_gate)
        assert integration.activation_of(experts) == name
        assert_matches_eager(experts, x, ids, p)


@pytest.mark.parametrize("gate", [None, interleaved_gate], ids=["fused", "own gate"])
@pytest.mark.parametrize("tokens, top_k", [(0, 2), (1, 1), (T, 1), (T, 4)])
def test_sizes(tokens, top_k, gate):
    assert_matches_eager(make_experts(own_gate=gate), torch.randn(tokens, H), *routing(tokens, top_k))


@pytest.mark.parametrize("options", [{}, {"has_post_expert_norm": True}], ids=["fused", "norm"])
def test_skipped_ids_add_nothing_whatever_their_weight(options):
    experts = make_experts(**options)
    x, (ids, p) = torch.randn(T, H), routing()
    ids[3] = torch.tensor([-1, E])
    p[(ids < 0) | (ids >= E)] = float("nan")
    y, dx, dp, *rest = run_experts(experts, NAME, x, ids, p)
    assert all(torch.isfinite(t).all() for t in (y, dx, dp, *rest))
    assert not y[3].any() and not dx[3].any()
    assert not dp[(ids < 0) | (ids >= E)].any()


@pytest.mark.parametrize("gate", [None, interleaved_gate], ids=["fused", "own gate"])
@pytest.mark.parametrize("p_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16(gate, p_dtype):
    ids, p = routing()
    assert_matches_eager(make_experts(own_gate=gate), torch.randn(T, H), ids, p, torch.bfloat16, p_dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gate", [None, interleaved_gate], ids=["fused", "own gate"])
def test_inference_in_bfloat16_with_a_router_in_float32(gate, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    experts, x, (ids, p) = make_experts(own_gate=gate).to(dtype), torch.randn(T, H).to(dtype), routing()
    results = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for implementation in (NAME, "eager"):
            experts.config._experts_implementation = implementation
            results.append(experts(x, ids, p))
        assert results[0].dtype == results[1].dtype == dtype
    exact = experts.double()(x.double(), ids, p.double())
    assert_as_accurate(*(y.bfloat16() for y in results), exact, "y")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gate", [None, interleaved_gate], ids=["fused", "own gate"])
def test_gradient_of_a_router_in_float32_is_not_rounded(gate, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dp = run_experts(make_experts(own_gate=gate), NAME, torch.randn(T, H), *routing(), dtype, torch.float32)[2]
    assert dp.dtype == torch.float32
    assert not torch.equal(dp, dp.bfloat16().float())


@pytest.mark.parametrize("gate", [None, interleaved_gate], ids=["fused", "own gate"])
def test_weights_narrower_than_hidden_states(gate):
    """As transformers' grouped_mm has it: computed in the weights' dtype, returned in that of the hidden states."""
    experts, x, (ids, p) = make_experts(own_gate=gate).bfloat16(), torch.randn(T, H), routing(skipped=False)
    got = experts(x, ids, p)
    assert got.dtype == torch.float32
    experts.config._experts_implementation = "eager"
    x = x.bfloat16()
    exact = copy.deepcopy(experts).double()(x.double(), ids, p.double())
    assert_as_accurate(got.bfloat16(), experts(x, ids, p), exact, "y")


@pytest.mark.parametrize("gate", [None, interleaved_gate], ids=["fused", "own gate"])
def test_matrices_of_two_dtypes(gate):
    experts, (ids, p) = make_experts(own_gate=gate, has_bias=True), routing()
    experts.gate_up_proj.data = experts.gate_up_proj.bfloat16()
    y = experts(torch.randn(T, H, dtype=torch.bfloat16), ids, p)
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


@pytest.mark.parametrize("gate", [None, interleaved_gate], ids=["fused", "own gate"])
def test_autocast(gate):
    experts, x, (ids, p) = make_experts(own_gate=gate), torch.randn(T, H), routing()
    exact = run_experts(experts, "eager", x, ids, p, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = (run_experts(experts, implementation, x, ids, p) for implementation in (NAME, "eager"))
    assert got[0].dtype == torch.float32
    for a, b, c in zip(got, eager, exact, strict=True):
        assert a.dtype == b.dtype
        assert_as_accurate(a, b, c, "autocast")


def test_transposed_weights_are_views(monkeypatch):
    seen = []
    monkeypatch.setattr(integration, "fused_moe_ffn", lambda x, *weights, **_: seen.extend(weights) or x)
    experts = make_experts(is_transposed=True)
    experts(torch.randn(T, H), *routing())
    _, w1, _, w2, _ = seen
    assert w1.data_ptr() == experts.gate_up_proj.data_ptr()
    assert w2.data_ptr() == experts.down_proj.data_ptr()


@pytest.mark.parametrize("gate", [None, interleaved_gate], ids=["fused", "own gate"])
def test_same_bits_twice(gate):
    experts, x, (ids, p) = make_experts(own_gate=gate), torch.randn(T, H), routing()
    once, again = (run_experts(experts, NAME, x, ids, p) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("gate", [None, interleaved_gate], ids=["fused", "own gate"])
def test_compiles_without_graph_breaks(gate, monkeypatch):
    monkeypatch.undo()  # the compiler traces through the allocators that tests/conftest.py patches
    experts, (ids, p) = make_experts(own_gate=gate), routing()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, H, requires_grad=True)
    wanted = [x, *experts.parameters()]
    for run in (experts, compiled):
        y = run(x, ids, p)
        results = [y, *torch.autograd.grad(y.square().sum(), wanted)]
        if run is experts:
            expected = results
    torch.testing.assert_close(results, expected)
    torch._dynamo.reset()


def replaced(**attributes):
    experts = make_experts(has_bias=True)
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: replaced(gate_up_proj=None), r"Experts\.gate_up_proj: expected a tensor, got NoneType"),
        (
            lambda: replaced(down_proj=parameter(H, I)),
            r"Experts\.down_proj: expected 3 dimensions, got shape \(24, 20\)",
        ),
        (
            lambda: replaced(gate_up_proj=parameter(E, I, H)),
            r"Experts\.gate_up_proj: expected shape \(E=5, 2I=40, H=24\), got \(5, 20, 24\)",
        ),
        (
            lambda: replaced(is_transposed=True),
            r"Experts\.gate_up_proj \(transposed\): expected shape \(E=5, 2I=48, H=20\), got \(5, 24, 40\)",
        ),
        (
            lambda: replaced(gate_up_proj_bias=parameter(E, I)),
            r"Experts\.gate_up_proj_bias: expected shape \(E=5, 2I=40\), got \(5, 20\)",
        ),
        (
            lambda: replaced(down_proj_bias=parameter(E, I)),
            r"Experts\.down_proj_bias: expected shape \(E=5, H=24\), got \(5, 20\)",
        ),
        (
            lambda: replaced(down_proj=parameter(E, H, I, dtype=torch.int8)),
            r"Experts\.down_proj: expected dtype torch\.float64, .*, got torch\.int8",
        ),
        (
            lambda: make_experts(is_concatenated=False),
            r"Experts: expected an _apply_gate of its own for interleaved gates .*, got the default one",
        ),
    ],
)
def test_refuses_modules(make, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(T, H), *routing())


def test_refuses_a_class_without_the_decorator():
    with pytest.raises(ValueError, match=r"Linear: expected a class decorated .*, got one without has_gate, has_bias"):
        integration.experts_forward(nn.Linear(H, H), torch.randn(T, H), *routing())


def test_refuses_options_of_a_newer_transformers(monkeypatch):
    monkeypatch.setitem(integration._UNKNOWN_OPTIONS, "has_pre_norm", False)
    experts, inputs = make_experts(), (torch.randn(T, H), *routing())
    experts(*inputs)
    experts.has_pre_norm = True
    with pytest.raises(ValueError, match=r"Experts: expected no options but .*, got has_pre_norm=True"):
        experts(*inputs)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.randn(1, T, H)}, r"hidden_states: expected shape \(T=37, H=24\), got \(1, 37, 24\)"),
        ({"x": torch.randn(T, I)}, r"hidden_states: expected shape \(T=37, H=24\), got \(37, 20\)"),
        ({"x": torch.ones(T, H, dtype=torch.int64)}, r"hidden_states: expected dtype .*, got torch\.int64"),
        ({"ids": torch.zeros(T, dtype=torch.int64)}, r"top_k_index: expected shape \(T, top_k\), got \(37,\)"),
        ({"ids": torch.zeros(T, TOP_K)}, r"top_k_index: expected an integer dtype, got torch\.float32"),
        ({"p": torch.rand(T, 1)}, r"top_k_weights: expected shape \(T=37, top_k=2\), got \(37, 1\)"),
        ({"p": None}, r"top_k_weights: expected a tensor, got NoneType"),
    ],
)
def test_refuses_inputs(changed, message):
    ids, p = routing()
    inputs = {"x": torch.randn(T, H), "ids": ids, "p": p} | changed
    with pytest.raises(ValueError, match=message):
        make_experts()(*inputs.values())
