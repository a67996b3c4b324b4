import copy

import pytest
import torch

from moebert_kernels.convert import convert_to_mpoe, mpoe_report, parameter_counts, to_dense_experts
from moebert_kernels.convert.mpo_plan import PUBLISHED
from moebert_kernels.errors import UserError
from moebert_kernels.models import MPOE_CLASSES, MPOET5Config
from moebert_kernels.models.mpoe_layers import slots
from moebert_kernels.nn import DenseExperts, MPOExperts
from tests.convert import mpoe_models as tiny

ROUTERS = {
    "switch": {},
    "top2": {},
    "hash-random": {},
    "hash-balance": {"token_counts": torch.arange(tiny.V)},
}


def assert_same_outputs(a, b):
    """The bound that the issue of such conversions is: 5e-6, of the largest value where that is above 1."""
    assert (a - b).abs().max() <= 5e-6 * max(1.0, b.abs().max().item())


def layers_of(model):
    return [slot.module for slot in slots(model)]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_starts_as_the_dense_model(name):
    dense, batch = tiny.dense(name), tiny.inputs(name)
    before = copy.deepcopy(dense.state_dict())
    random_state = torch.get_rng_state()
    moe = convert_to_mpoe(dense, num_experts=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(moe).__name__ == f"MPOE{type(dense).__name__}" and isinstance(moe, type(dense)) and not moe.training
    assert_same_outputs(tiny.outputs(moe, name, batch), tiny.outputs(dense, name, batch))
    assert all(isinstance(layer.experts, MPOExperts) for layer in layers_of(moe))
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())


@pytest.mark.parametrize("experts", ["mpo", "dense"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ["t5", "gpt2", "bert"])
def test_every_router_and_kind_of_experts(name, router, experts):
    dense, batch = tiny.dense(name), tiny.inputs(name)
    moe = convert_to_mpoe(dense, num_experts=4, router=router, experts=experts, sites=3, **ROUTERS[router])
    assert_same_outputs(tiny.outputs(moe, name, batch), tiny.outputs(dense, name, batch))
    if router.startswith("hash"):
        tables = torch.stack([layer.router.table for layer in layers_of(moe)])
        assert set(tables.unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["t5-gelu", "gpt2", "bert-bare"])
def test_export_to_dense_experts_computes_the_same(name):
    moe = convert_to_mpoe(tiny.dense(name), num_experts=3, noise=0.2)
    exported = to_dense_experts(moe)
    batch = tiny.inputs(name)
    assert all(isinstance(layer.experts, DenseExperts) for layer in layers_of(exported))
    assert_same_outputs(tiny.outputs(exported, name, batch), tiny.outputs(moe, name, batch))
    again = to_dense_experts(exported)
    assert torch.equal(tiny.outputs(again, name, batch), tiny.outputs(exported, name, batch))


def test_noise_tells_experts_apart_and_depends_on_the_seed():
    dense = tiny.dense("gpt2")
    same = convert_to_mpoe(dense, num_experts=3)
    weight = layers_of(same)[0].experts.w1
    assert all(torch.equal(aux[0], aux[2]) for aux in weight.aux)
    noisy, again, other = (convert_to_mpoe(dense, num_experts=3, noise=0.01, seed=seed) for seed in (1, 1, 2))
    for (key, a), b, c in zip(
        noisy.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
        if ".aux." in key:
            assert not torch.equal(a, c) and not torch.equal(a[0], a[1])
        elif ".central" in key:
            assert torch.equal(a, c)
    clean, aux = weight.aux[1][0], layers_of(noisy)[0].experts.w1.aux[1]
    difference = (aux - clean).square().mean().sqrt() / clean.square().mean().sqrt()
    assert difference.item() == pytest.approx(0.01, rel=0.3)


def test_gated_weights_have_the_gates_rows_first():
    dense = tiny.dense("t5-gelu")
    experts = layers_of(convert_to_mpoe(dense, num_experts=2))[0].experts
    ffn = dense.encoder.block[0].layer[1].DenseReluDense
    with torch.no_grad():
        torch.testing.assert_close(experts.w1()[1], torch.cat([ffn.wi_0.weight, ffn.wi_1.weight]))


@pytest.mark.parametrize("bias, shape", [("expert", (3, 24)), ("shared", (24,))])
def test_biases_per_expert_or_shared(bias, shape):
    moe = convert_to_mpoe(tiny.dense("bert"), num_experts=3, expert_bias=bias)
    assert layers_of(moe)[0].experts.b1.shape == shape
    assert layers_of(convert_to_mpoe(tiny.dense("t5"), num_experts=3))[0].experts.b1 is None


def test_cut_bonds_and_given_factors():
    dense = tiny.dense("gpt2")
    factors = {"w1_factors": ([4, 4, 4], [2, 4, 2]), "w2_factors": ([2, 4, 2], [4, 4, 4])}
    moe = convert_to_mpoe(dense, 2, max_bond=5, force=True, **factors)
    assert moe.config.w1_factors == [[4, 4, 4], [2, 4, 2]]
    assert [tuple(s.shape[-4:]) for s in layers_of(moe)[0].experts.w1.sites] == [
        (1, 4, 2, 5),
        (5, 4, 4, 5),
        (5, 4, 2, 1),
    ]
    batch = tiny.inputs("gpt2")
    exact = convert_to_mpoe(dense, 2, **factors)
    assert_same_outputs(tiny.outputs(exact, "gpt2", batch), tiny.outputs(dense, "gpt2", batch))
    assert (tiny.outputs(moe, "gpt2", batch) - tiny.outputs(dense, "gpt2", batch)).abs().max() > 1e-3


def test_half_precision_and_mode_are_kept():
    dense = tiny.dense("gpt2").to(torch.bfloat16).train()
    moe = convert_to_mpoe(dense, 2)
    assert moe.training and {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    batch = tiny.inputs("gpt2", padded=False)
    moe, dense = moe.eval(), dense.eval()
    a, b = tiny.outputs(moe, "gpt2", batch), tiny.outputs(dense, "gpt2", batch)
    assert (a - b).abs().max() <= 0.05 * b.abs().max()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"w2_factors": ([4, 4, 1],)}, r"w2_factors: expected row and column factors .* got \(\[4, 4, 1\],\)"),
        ({"w1_factors": 5}, "w1_factors: expected row and column factors .* got 5"),
        ({"w1_factors": (4, 4)}, r"w1_factors: expected row and column factors .* got \(4, 4\)"),
        ({"w1_factors": ([8, 8], [16])}, r"w1_factors: expected .* as many of both, .* got \(\[8, 8\], \[16\]\)"),
        ({"w1_factors": ([64], [16])}, r"w1_factors: expected .* at least two, got \(\[64\], \[16\]\)"),
        ({"w2_factors": ([16, -1], [8, 8])}, r"w2_factors: expected .* integers >= 1 .* got \(\[16, -1\], \[8, 8\]\)"),
        ({"w1_factors": ([4, 4, 4], [2, 2, 2])}, r"w1_factors: expected products \(64, 16\), got \(64, 8\)"),
        ({"w2_factors": ([4, 4], [4, 4])}, r"w2_factors: expected products \(16, 64\), got \(16, 16\)"),
        ({"noise": float("nan")}, "noise: expected a finite number of at least 0, got nan"),
        ({"noise": -0.1}, "noise: expected a finite number of at least 0, got -0.1"),
        ({"max_bond": 0}, "max_bond: expected integers >= 1, got 0"),
        ({"max_bond": 1}, "max_bond: expected caps at which building the weight pays, got bonds .*FLOPs per token"),
        ({"num_experts": 0}, "num_experts: expected an integer of at least 1, got 0"),
        ({"router": "nearest"}, "router: expected one of switch, top2, .* got 'nearest'"),
        ({"router": "hash-balance"}, r"token_counts: expected shape \(V=60,\) with router='hash-balance', got none"),
        ({"router": "hash-random", "load_balance": 0.1}, "load_balance: expected 0 with router='hash-random', got 0.1"),
        (
            {"router": "hash-random", "router_options": {"jitter": 0.1}},
            "router_options: expected none with router='hash-random', got {'jitter': 0.1}",
        ),
        ({"tables": torch.zeros(60)}, "tables: expected none with router='switch', got some"),
        ({"experts": "sparse"}, "experts: expected one of mpo, dense, got 'sparse'"),
        ({"experts": "dense", "max_bond": 4}, "max_bond: expected none with experts='dense', got 4"),
        (
            {"experts": "dense", "w1_factors": ([8, 8], [4, 4])},
            r"w1_factors: expected none with experts='dense', got \(\[8, 8\], \[4, 4\]\)",
        ),
        ({"sites": 9}, "sites: expected 2 to 6, got 9"),
        ({"top_k": 2}, "top_k: expected an option of convert_to_mpoe or a field of MPOEOptions, got neither"),
        ({"router_options": {"jiter": 0.1}}, "router_options: expected options of router 'switch', got .*jiter"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        convert_to_mpoe(tiny.dense("gpt2"), **options)


def test_models_that_cannot_be_converted():
    moe = convert_to_mpoe(tiny.dense("gpt2"), 2)
    with pytest.raises(UserError, match="model: expected a dense model, got MPOEGPT2LMHeadModel, which has experts"):
        convert_to_mpoe(moe)
    with pytest.raises(UserError, match=r"model: expected one of the families t5, .* got Linear"):
        convert_to_mpoe(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="model: expected an MPOE model, got GPT2LMHeadModel"):
        to_dense_experts(tiny.dense("gpt2"))


def test_report_counts_what_is_there():
    dense = tiny.dense("gpt2")
    moe, switch = (convert_to_mpoe(dense, 3, experts=experts) for experts in ("mpo", "dense"))
    report = mpoe_report(moe)
    assert report.parameters == moe.num_parameters() and report.switch_parameters == switch.num_parameters()
    assert report.dense == 2 * (2 * 16 * 64)  # two layers of two matrices
    sites = [parameter for name, parameter in moe.named_parameters() if "central" in name or ".aux." in name]
    assert report.central + report.auxiliary == sum(site.numel() for site in sites)
    assert report.ratio == pytest.approx(report.central / (3 * report.dense) + report.aux_share)
    assert report.folded_mib == pytest.approx(3 * report.dense * 4 / 2**20)
    assert mpoe_report(switch).ratio == 1 and mpoe_report(switch).folded_mib == 0
    assert parameter_counts(moe)["active_parameters"] == report.parameters - report.auxiliary * 2 // 3 - 2 * 2 * (
        64 + 16
    )
    assert report.as_dict()["ratio"] == report.ratio
    with pytest.raises(UserError, match="model: expected an MPOE model, got GPT2LMHeadModel"):
        mpoe_report(dense)


def test_report_of_the_published_shape():
    config = MPOET5Config(num_experts=16, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12)
    config.w1_factors, config.w2_factors = ([list(f) for f in PUBLISHED[s]] for s in ((3072, 768), (768, 3072)))
    with torch.device("meta"):
        report = mpoe_report(MPOE_CLASSES["MPOET5ForConditionalGeneration"](config))
    assert report.ratio == pytest.approx(1 / 16 + 0.0783, abs=1e-4)
    assert "365.1M, with 16 dense experts 1,921.9M (5.26 times)" in str(report)
