"""Experts that are whole feed-forwards, MPOE's and copies: what they start as, their report, the export."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from moebert_kernels.convert import convert_to_moe, mpoe_report, parameter_counts, to_dense_experts
from moebert_kernels.convert.mpo_plan import PUBLISHED
from moebert_kernels.convert.replace import replace_feed_forwards
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers
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


def converted(name, num_experts=3, *, num_sites=5, force=False, noise=0.0, seed=0, token_counts=None, **fields):
    how = {"num_sites": num_sites, "force": force, "noise": noise, "seed": seed, "token_counts": token_counts}
    return convert_to_moe(tiny.dense(name), MoEConfig.mpoe(num_experts=num_experts, **fields), **how)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_starts_as_the_dense_model(name):
    dense, batch = tiny.dense(name), tiny.inputs(name)
    model, wanted = tiny.dense(name), tiny.outputs(dense, name, batch)
    random_state = torch.get_rng_state()
    moe = convert_to_moe(model, MoEConfig.mpoe(num_experts=3))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert moe is model and type(moe).__name__ == type(dense).__name__ and isinstance(moe, type(dense))
    assert not moe.training
    assert_same_outputs(tiny.outputs(moe, name, batch), wanted)
    assert all(isinstance(layer.experts, MPOExperts) for layer in moe_layers(moe))
    before, after = dense.state_dict(), moe.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after.keys() & before.keys())


@pytest.mark.parametrize("experts", ["mpo", "copy"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ["t5", "gpt2", "bert"])
def test_every_router_and_kind_of_experts(name, router, experts):
    dense, batch = tiny.dense(name), tiny.inputs(name)
    moe = converted(name, 4, router=router, experts=experts, num_sites=3, **ROUTERS[router])
    assert_same_outputs(tiny.outputs(moe, name, batch), tiny.outputs(dense, name, batch))
    if router.startswith("hash"):
        tables = torch.stack([layer.router.table for layer in moe_layers(moe)])
        assert set(tables.unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["t5-gelu", "gpt2", "bert-bare"])
def test_export_to_dense_experts_computes_the_same(name, tmp_path):
    moe, batch = converted(name, noise=0.2), tiny.inputs(name)
    wanted = tiny.outputs(moe, name, batch)
    exported = to_dense_experts(moe)
    assert exported is moe and all(isinstance(layer.experts, DenseExperts) for layer in moe_layers(moe))
    assert exported.config.quantization_config.experts == "copy"
    got = tiny.outputs(exported, name, batch)
    assert_same_outputs(got, wanted)
    assert torch.equal(tiny.outputs(to_dense_experts(exported), name, batch), got)
    exported.save_pretrained(tmp_path)
    assert_same_outputs(tiny.outputs(type(tiny.dense(name)).from_pretrained(tmp_path), name, batch), got)


def test_noise_tells_experts_apart_and_depends_on_the_seed():
    weight = moe_layers(converted("gpt2"))[0].experts.w1
    assert all(torch.equal(aux[0], aux[2]) for aux in weight.aux)
    noisy, again, other = (converted("gpt2", noise=0.01, seed=seed) for seed in (1, 1, 2))
    for (key, a), b, c in zip(
        noisy.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
        if ".aux." in key:
            assert not torch.equal(a, c) and not torch.equal(a[0], a[1])
        elif ".central" in key:
            assert torch.equal(a, c)
    clean, aux = weight.aux[1][0], moe_layers(noisy)[0].experts.w1.aux[1]
    difference = (aux - clean).square().mean().sqrt() / clean.square().mean().sqrt()
    assert difference.item() == pytest.approx(0.01, rel=0.3)


def test_gated_weights_have_the_gates_rows_first():
    dense = tiny.dense("t5-gelu")
    experts = moe_layers(converted("t5-gelu", 2))[0].experts
    ffn = dense.encoder.block[0].layer[1].DenseReluDense
    with torch.no_grad():
        torch.testing.assert_close(experts.w1()[1], torch.cat([ffn.wi_0.weight, ffn.wi_1.weight]))


@pytest.mark.parametrize("bias, shape", [("expert", (3, 24)), ("common", (24,))])
def test_biases_per_expert_or_shared(bias, shape):
    moe = converted("bert", expert_bias=bias)
    assert moe_layers(moe)[0].experts.b1.shape == shape
    assert moe_layers(converted("t5"))[0].experts.b1 is None


def test_cut_bonds_and_given_factors():
    dense = tiny.dense("gpt2")
    factors = {"w1_factors": ([4, 4, 4], [2, 4, 2]), "w2_factors": ([2, 4, 2], [4, 4, 4])}
    moe = converted("gpt2", 2, max_bond=5, force=True, **factors)
    assert moe.config.quantization_config.w1_factors == [[4, 4, 4], [2, 4, 2]]
    assert [tuple(s.shape[-4:]) for s in moe_layers(moe)[0].experts.w1.sites] == [
        (1, 4, 2, 5),
        (5, 4, 4, 5),
        (5, 4, 2, 1),
    ]
    batch = tiny.inputs("gpt2")
    exact = converted("gpt2", 2, **factors)
    assert_same_outputs(tiny.outputs(exact, "gpt2", batch), tiny.outputs(dense, "gpt2", batch))
    assert (tiny.outputs(moe, "gpt2", batch) - tiny.outputs(dense, "gpt2", batch)).abs().max() > 1e-3


def test_half_precision_and_mode_are_kept():
    dense = tiny.dense("gpt2").to(torch.bfloat16).train()
    moe = convert_to_moe(tiny.dense("gpt2").to(torch.bfloat16).train(), MoEConfig.mpoe(num_experts=2))
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
        ({"router": "nearest"}, "router: expected one of .*switch, top2.* got 'nearest'"),
        ({"router": "hash-balance"}, r"token_counts: expected shape \(V=60,\) with router='hash-balance', got none"),
        ({"router": "hash-random", "load_balance": 0.1}, "load_balance: expected none with router=.hash-random."),
        (
            {"router": "hash-random", "router_options": {"jitter": 0.1}},
            "router_options: expected none with router='hash-random', got {'jitter': 0.1}",
        ),
        ({"experts": "sparse"}, "experts: expected one of split, clustered, copy, mpo, got 'sparse'"),
        ({"experts": "split", "noise": 0.1}, "noise: expected 0 with experts='split', got 0.1"),
        ({"experts": "copy", "max_bond": 4}, "max_bond: expected none with experts='copy', got 4"),
        (
            {"experts": "copy", "w1_factors": ([8, 8], [4, 4])},
            r"w1_factors: expected none with experts='copy', got \(\[8, 8\], \[4, 4\]\)",
        ),
        ({"num_sites": 9}, "sites: expected 2 to 6, got 9"),
        ({"router": "top2", "num_experts": 1}, "num_experts: expected at least 2"),
        ({"router_options": {"jiter": 0.1}}, "router_options: expected options of router 'switch', got .*jiter"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        converted("gpt2", **options)


@pytest.mark.filterwarnings("ignore:no importance scores given")
def test_models_of_which_nothing_can_be_said():
    split = convert_to_moe(tiny.dense("gpt2"), MoEConfig())
    for ask in (to_dense_experts, mpoe_report):
        for model, got in ((tiny.dense("gpt2"), "GPT2LMHeadModel$"), (split, "GPT2LMHeadModel with experts='split'$")):
            with pytest.raises(UserError, match=f"model: expected a model converted with experts='mpo' .*, got {got}"):
                ask(model)
    with pytest.raises(UserError, match="model: expected feed-forward layers of a known shape, found none in Linear"):
        convert_to_moe(torch.nn.Linear(2, 2), MoEConfig.mpoe())
    with pytest.raises(UserError, match="tables: expected none with router='switch', got some"):
        convert_to_moe(tiny.dense("gpt2"), MoEConfig.mpoe(), tables=torch.zeros(60))


def test_report_counts_what_is_there():
    moe, switch = (converted("gpt2", experts=experts) for experts in ("mpo", "copy"))
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


def published(num_experts, **fields):
    """T5 base with a dense feed-forward's shape that the paper has, without memory for it."""
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12))
    replace_feed_forwards(model, MoEConfig.mpoe(num_experts=num_experts, norm="layer", **fields))
    return model


FACTORS = {f"w{n}_factors": [list(f) for f in PUBLISHED[shape]] for n, shape in ((1, (3072, 768)), (2, (768, 3072)))}


def test_report_of_the_published_shape():
    report = mpoe_report(published(16, **FACTORS))
    assert report.ratio == pytest.approx(1 / 16 + 0.0783, abs=1e-4)
    assert "365.1M, with 16 dense experts 1,921.9M (5.26 times)" in str(report)


@pytest.mark.parametrize("num_experts, mpo, switch", [(4, 258.4, 562.7), (8, 294.0, 1015.8), (16, 365.1, 1921.9)])
def test_parameters_of_the_t5_base_shape(num_experts, mpo, switch):
    models = published(num_experts, **FACTORS), published(num_experts, experts="copy")
    assert [round(model.num_parameters() / 1e6, 1) for model in models] == [mpo, switch]
