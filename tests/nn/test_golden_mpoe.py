"""MPOE's layers and training rule against arrays that the original code computed (values and all gradients)."""

import pytest
import torch

from moebert_kernels.layers import MoEFeedForward
from moebert_kernels.nn import GradientMask, MPOExperts, SwitchRouter, Top2Router, shared_fold
from tests.golden_arrays import assert_golden, golden

FACTORS = {"w1": ([2, 2, 4, 3, 2], [3, 2, 2, 2, 2]), "w2": ([3, 2, 2, 2, 2], [2, 2, 4, 3, 2])}
NAMES = {"w1": "wi", "w2": "wo"}
AUX = (0, 1, 3, 4)  # the numbers of the auxiliary sites


def experts_of(sites, bias="none", num_experts=4):
    """Experts with the stored site tensors: `sites(weight, k)` gives site k of "w1" or "w2"."""
    experts = MPOExperts(48, 96, num_experts, bias=bias, w1_factors=FACTORS["w1"], w2_factors=FACTORS["w2"])
    for name in FACTORS:
        weight = getattr(experts, name)
        weight.central.data.copy_(sites(name, 2))
        for parameter, k in zip(weight.aux, AUX, strict=True):
            parameter.data.copy_(sites(name, k))
    return experts


def switch_layer(arrays, prefix="", **options):
    central = {True: f"{{}}{prefix}central", False: f"{{}}{prefix}aux{{}}"}
    experts = experts_of(lambda name, k: arrays[central[k == 2].format(NAMES[name] + ("." if not prefix else ""), k)])
    router = SwitchRouter(48, 4, **options)
    router.gate.weight.data.copy_(arrays["router_weight"])
    router.gate.bias.data.copy_(arrays["router_bias"])
    return MoEFeedForward(router, experts)


def check_gradients(experts, arrays, pattern):
    """All stored gradients of the sites; NaN stands for an expert without tokens in the original."""
    found = 0
    for name, theirs in NAMES.items():
        weight = getattr(experts, name)
        for k, parameter in [(2, weight.central), *zip(AUX, weight.aux, strict=True)]:
            key = pattern(name, theirs, k)
            if key in arrays:
                assert_golden(parameter.grad, arrays[key].nan_to_num(0.0), name=key)
                found += 1
    return found


@pytest.mark.parametrize("case, scaling", [("switch_noscale", "ratio"), ("switch_scale", "probability")])
def test_switch_layer(case, scaling):
    arrays = golden("mpoe_switch")
    layer = switch_layer(arrays, scaling=scaling)
    wanted = golden("mpoe_switch", case + ".")
    x = arrays["x"].clone().requires_grad_()
    y = layer(x)
    (y * arrays["grad_y"]).sum().backward()

    expert_ids, *_ = layer.router(x)
    assert torch.equal(expert_ids.flatten().int(), wanted["routes"].int())
    assert_golden(y, wanted["y"], name="y")
    assert_golden(x.grad, wanted["grad_x"], name="dx")
    assert_golden(layer.router.gate.weight.grad, wanted["grad_router_weight"], name="drouter weight")
    assert_golden(layer.router.gate.bias.grad, wanted["grad_router_bias"], name="drouter bias")
    sites = check_gradients(
        layer.experts, wanted, lambda _, theirs, k: f"grad_{theirs}_" + ("central" if k == 2 else f"aux{k}")
    )
    assert sites == (10 if case == "switch_noscale" else 4)


def test_switch_layer_drops_what_is_over_capacity():
    arrays, wanted = golden("mpoe_switch"), golden("mpoe_switch", "drop.")
    layer = switch_layer(arrays, capacity_factor=wanted["capacity_factor"].item())
    x = arrays["x"]
    y = layer(x)
    dropped = layer.router(x)[3].flatten()
    assert dropped.sum() == wanted["n_dropped"].item()
    kept = [int((layer.router(x)[0] == e).sum()) for e in range(4)]
    assert max(kept) == wanted["capacity"].item()  # which ones is random in the original
    assert torch.equal(y.view(21, 48)[dropped], x.view(21, 48)[dropped])
    assert_golden(y.view(21, 48)[~dropped], arrays["switch_noscale.y"].view(21, 48)[~dropped], name="y")


@pytest.mark.parametrize("policy", ["all", "none", "random"])
def test_top2_layer(policy):
    arrays, wanted = golden("mpoe_top2"), golden("mpoe_top2", f"policy_{policy}.")
    experts = experts_of(lambda name, k: arrays[f"{name}.T{k}"], bias="shared")
    experts.b1.data.copy_(arrays["b1"])
    experts.b2.data.copy_(arrays["b2"])
    router = Top2Router(48, 4, eval_policy=policy, eval_capacity_factor=2.0).eval()
    router.gate.weight.data.copy_(arrays["w_gating"].T)
    x = arrays["x"].clone().requires_grad_()
    expert_ids, weights, loss = router(x, draws=wanted["second_expert_uniform_draw"])
    y = experts(x, expert_ids, weights)
    ((y * arrays["grad_y"]).sum() + 1e-2 * loss).backward()

    dispatched = wanted["dispatch"].sum(-1)  # (B, T, E)
    for e in range(4):
        assert torch.equal((expert_ids == e).any(-1), dispatched[..., e] != 0)
    assert_golden(loss[None], wanted["aux_loss_raw"], name="balance loss")
    assert_golden(y, wanted["y"], name="y")
    assert_golden(x.grad, wanted["grad_x"], name="dx")
    assert_golden(router.gate.weight.grad, wanted["grad_w_gating"].T, name="dgate")
    assert_golden(experts.b1.grad, wanted["grad_b1"], name="db1")
    assert_golden(experts.b2.grad, wanted["grad_b2"], name="db2")
    sites = check_gradients(experts, wanted, lambda name, _, k: f"grad_{name}_T{k}")
    assert sites == (10 if policy == "all" else 0)


RULES = [
    ("none", "sgd"), ("none", "adamw_zero"),
    ("ruleA", "sgd"), ("ruleA", "adamw_zero"), ("ruleA", "adamw_skip"),
    ("ruleB", "sgd"), ("ruleB", "adamw_zero"),
]  # fmt: skip


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize("rule, optimizer", RULES)
def test_gradient_mask_trajectory(rule, optimizer, shared, monkeypatch):
    arrays = golden("mpoe_gradmask")
    wanted = golden("mpoe_gradmask", f"{rule}.{optimizer}.")
    init = {key.removeprefix("init."): value for key, value in arrays.items() if key.startswith("init.")}
    layer = switch_layer(init, prefix="_")
    unit = "expert" if rule == "ruleB" else "step"
    mask = GradientMask(
        layer, 0.0 if rule == "none" else 0.5, unit=unit, form="skip" if optimizer == "adamw_skip" else "zero"
    )
    if rule != "none":
        drawn = arrays[f"draw_{rule}"] < 0.5
        monkeypatch.setattr(mask, "draw", lambda step, E: tuple(drawn[step].expand(E).tolist()))
    if optimizer == "sgd":
        steps = torch.optim.SGD(layer.parameters(), lr=0.05)
    else:
        steps = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.01)
    losses, norms = [], []
    for step in range(6):
        with mask.step(step), shared_fold(layer) if shared else torch.enable_grad():
            loss = 0.5 * (layer(arrays["x"]) - arrays["target"]).square().mean()
            loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
        norms.append([layer.experts.w1.central.norm().item(), layer.experts.w2.central.norm().item()])

    assert_golden(torch.tensor(losses, dtype=torch.float64), wanted["losses"], name="losses")
    assert_golden(torch.tensor(norms, dtype=torch.float64), wanted["central_norms_wi_wo"], name="central norms")
    w1 = layer.experts.w1
    assert_golden(w1.central.flatten()[:64], wanted["central_wi_final_first64"], name="central tensor")
    assert_golden(w1.aux[1][0].flatten()[:64], wanted["aux1_wi_final_first64_expert0"], name="auxiliary tensor")
