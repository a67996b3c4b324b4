import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from moebert_kernels.errors import UserError
from moebert_kernels.nn import DenseExperts, GradientMask, mpo_weight, shared_fold
from tests.helpers import ROOT
from tests.nn import masked_run
from tests.nn.mpo import E, H, I, small_experts


def one_step(experts, mask, step):
    x, ids = torch.randn(8, H), torch.arange(8) % E
    experts.zero_grad()
    with mask.step(step):
        experts(x, ids).square().sum().backward()


def masked_step(mask, wanted=True):
    return next(s for s in range(1000) if all(mask.draw(s, E)) == wanted and len(set(mask.draw(s, E))) == 1)


def test_draws_depend_on_seed_and_step_and_hit_the_probability():
    experts = small_experts()
    mask, same = GradientMask(experts, 0.3, seed=1), GradientMask(small_experts(), 0.3, seed=1)
    drawn = [mask.draw(step, E) for step in range(2000)]
    assert drawn == [same.draw(step, E) for step in range(2000)]
    assert all(len(set(step)) == 1 for step in drawn)
    assert sum(step[0] for step in drawn) / 2000 == pytest.approx(0.3, abs=0.03)
    assert drawn != [GradientMask(experts, 0.3, seed=2).draw(step, E) for step in range(2000)]
    each = GradientMask(experts, 0.3, unit="expert", seed=1)
    flat = [m for step in range(2000) for m in each.draw(step, E)]
    assert sum(flat) / len(flat) == pytest.approx(0.3, abs=0.02)
    assert {len(set(each.draw(step, E))) for step in range(100)} == {1, 2}
    state = torch.get_rng_state()
    mask.draw(0, E)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["skip", "zero"])
def test_masked_steps_leave_the_central_tensors_out(form):
    experts = small_experts()
    mask = GradientMask(experts, 0.5, form=form)
    one_step(experts, mask, masked_step(mask))
    for weight in (experts.w1, experts.w2):
        assert all(a.grad.any() for a in weight.aux)
        if form == "skip":
            assert weight.central.grad is None
        else:
            assert weight.central.grad is not None and not weight.central.grad.any()
    one_step(experts, mask, masked_step(mask, wanted=False))
    assert experts.w1.central.grad.any()


def test_masked_experts_add_nothing():
    experts = small_experts()
    x, ids = torch.randn(8, H), torch.arange(8) % E
    mask = GradientMask(experts, 0.5, unit="expert")
    step = next(s for s in range(100) if mask.draw(s, E) == (True, False, True, False))

    def central_gradient(tokens):
        experts.zero_grad()
        experts(x[tokens], ids[tokens]).square().sum().backward()
        return experts.w1.central.grad.clone(), [a.grad.clone() for a in experts.w1.aux]

    unmasked, _ = central_gradient((ids == 1) | (ids == 3))
    _, aux = central_gradient(ids >= 0)
    experts.zero_grad()
    with mask.step(step):
        experts(x, ids).square().sum().backward()
    torch.testing.assert_close(experts.w1.central.grad, unmasked)
    for parameter, wanted in zip(experts.w1.aux, aux, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_no_gradient_of_a_masked_tensor_is_computed(monkeypatch):
    experts = small_experts()
    mask = GradientMask(experts, 1.0)
    wants = []
    real = mpo_weight.mpo_expert_weights
    monkeypatch.setattr(
        mpo_weight, "mpo_expert_weights", lambda c, a, **k: wants.append(c.requires_grad) or real(c, a, **k)
    )
    one_step(experts, mask, 0)
    assert wants == [False, False]


def test_an_error_ends_the_mask():
    experts = small_experts()
    mask = GradientMask(experts, 1.0)
    with pytest.raises(RuntimeError, match="stop"), mask.step(0):
        raise RuntimeError("stop")
    assert not any(experts.w1.masked)


def test_shared_fold_opens_inside_the_masks_step():
    experts = small_experts()
    mask = GradientMask(experts, 1.0)
    inside = pytest.raises(ValueError, match="shared_fold: expected it inside the mask's step")
    with shared_fold(experts), inside, mask.step(0):
        pass


@pytest.mark.parametrize("unit", ["step", "expert"])
def test_accumulation_and_shared_folds_change_nothing(unit):
    wanted = masked_run.train(masked_run.layer(), unit, shared=False)
    got = masked_run.train(masked_run.layer(), unit, shared=True)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, msg=name)
    drawn = [GradientMask(small_experts(), 0.5, unit=unit, seed=3).draw(s, E) for s in range(masked_run.STEPS)]
    assert wanted["steps"].item() == sum(not all(m) for m in drawn) < masked_run.STEPS


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    processes = []
    for rank in range(2):
        environment = os.environ | {"WORLD_SIZE": "2", "RANK": str(rank), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.nn.masked_run", str(tmp_path / "out")]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    results = [load_file(f"{tmp_path}/out.{rank}") for rank in range(2)]
    for case, (unit, _) in masked_run.CASES.items():
        for name, wanted in masked_run.train(masked_run.layer(), unit, shared=False).items():
            for result in results:
                torch.testing.assert_close(result[f"{case}.{name}"], wanted, msg=f"{case}: {name}")


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: GradientMask(small_experts(), 1.5), r"probability: expected a number in \[0, 1\], got 1.5"),
        (lambda: GradientMask(small_experts(), unit="layer"), "unit: expected one of step, expert, got 'layer'"),
        (lambda: GradientMask(small_experts(), form="none"), "form: expected one of skip, zero, got 'none'"),
        (lambda: GradientMask(DenseExperts(H, I, E)), "model: expected experts with central tensors, got none"),
    ],
)
def test_wrong_options_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
