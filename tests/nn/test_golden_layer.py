"""One MoE layer, every routing, against arrays that the original code computed (values and all gradients)."""

import pytest
import torch

from moebert_kernels.layers import NormedExperts
from moebert_kernels.nn import GateRouter, HashRouter
from tests.golden_arrays import assert_golden, golden

EXPERTS = {"w1": "w1", "b1": "b1", "w2": "w2", "b2": "b2", "norm_weight": "ln_w", "norm_bias": "ln_b"}
HASH = {"hash_random": 2e-5, "hash_random_f64": 1e-11, "hash_empty_expert": 2e-5, "hash_padded": 2e-5}
GATE = {"gate_token": 2e-5, "gate_token_f64": 1e-7, "gate_sentence": 2e-5, "gate_sentence_b1": 2e-5}


def load(case):
    """Inputs, expert module and wanted arrays; a float64 case has the inputs of its float32 case."""
    arrays = golden("b_layer", case.removesuffix("_f64") + ".")
    if case.endswith("_f64"):
        arrays = {k: v.double() if v.is_floating_point() else v for k, v in arrays.items()}
        arrays |= golden("b_layer", case + ".")
    E, I, H = arrays["w1"].shape
    experts = NormedExperts(H, I, E, activation="gelu", bias="expert").to(arrays["w1"].dtype)
    experts.load_state_dict({ours: arrays[theirs] for ours, theirs in EXPERTS.items()})
    return arrays, arrays["x"].clone().requires_grad_(), experts


def check(arrays, tolerance, x, y, experts):
    assert_golden(y, arrays["y"], tolerance, "y")
    assert_golden(x.grad, arrays["grad_x"], tolerance, "dx")
    for ours, theirs in EXPERTS.items():
        # NaN: the original has no gradient, for an expert without a token.
        wanted = arrays[f"grad_{theirs}"].nan_to_num(0.0)
        assert_golden(getattr(experts, ours).grad, wanted, tolerance, f"d{ours}")


@pytest.mark.parametrize("case", HASH)
def test_hash_routing(case):
    arrays, x, experts = load(case)
    router = HashRouter(arrays["hash_list"], arrays["w1"].shape[0])
    expert_ids = router(arrays["ids"])
    y = experts(x, expert_ids)
    (y * arrays["up"]).sum().backward()
    assert expert_ids.flatten().bincount(minlength=4).tolist() == arrays["load"].tolist()
    check(arrays, HASH[case], x, y, experts)


@pytest.mark.parametrize("case", GATE)
def test_gate_routing(case):
    arrays, x, experts = load(case)
    E, _, H = arrays["w1"].shape
    per = "token" if case.startswith("gate_token") else "sentence"
    router = GateRouter(H, E, per, original_batch1=True, route_padding=True).to(x.dtype)
    router.gate.weight.data.copy_(arrays["gate_w"])
    expert_ids, weights, balance_loss = router(x, arrays["mask"])
    y = experts(x, expert_ids, weights)
    ((y * arrays["up"]).sum() + 0.7 * balance_loss).backward()

    if "balance_loss" in arrays:
        assert_golden(balance_loss[None], arrays["balance_loss"], GATE[case], "balance loss")
        assert_golden(router.gate.weight.grad, arrays["grad_gate_w"], GATE[case], "dgate")
    else:
        assert balance_loss == 0 and weights is None and router.gate.weight.grad is None
    routed = expert_ids if per == "token" else expert_ids[:, 0]
    assert routed.flatten().bincount(minlength=E).tolist() == arrays["load"].tolist()
    check(arrays, GATE[case], x, y, experts)


def test_sentence_gate_alone_is_as_in_a_batch():
    arrays, x, experts = load("gate_sentence")
    E, _, H = arrays["w1"].shape
    router = GateRouter(H, E, "sentence", route_padding=True)
    router.gate.weight.data.copy_(arrays["gate_w"])
    with torch.no_grad():
        for i in range(len(x)):
            expert_ids, weights, _ = router(x[i : i + 1], arrays["mask"][i : i + 1])
            assert_golden(experts(x[i : i + 1], expert_ids, weights)[0], arrays["y"][i], name=f"sentence {i}")
