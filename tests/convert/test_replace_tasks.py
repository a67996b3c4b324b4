"""Family by family: routing by task, what a task's experts merge into, and students with fewer neurons."""

import copy

import pytest
import torch
from transformers import AutoModel

from moebert_kernels.convert import convert_to_moe, dense_student, merge
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers, set_task
from moebert_kernels.nn.context import plain_class
from tests.convert.families import FAMILIES, IMAGES, ONE_OF_EACH_SHAPE, make, make_inputs, valid
from tests.convert.test_sites import assert_near, hidden, scores_of, slow_unless

FAST = (*ONE_OF_EACH_SHAPE, "llama")
TEXT = [family for family in slow_unless(FAST) if getattr(family, "values", (family,))[0] not in IMAGES]
KINDS = {
    "split": {},
    "shared": {"num_shared_neurons": 8, "expert_size": 18, "top_k": 3},
    "copy": {"experts": "copy", "num_experts": 3},
    "mpo": {"experts": "mpo", "num_experts": 3},
    "norm of each expert": {"norm": "expert"},
}


def by_task(model, spread, **fields):
    """A converted copy, with routers that are more or less equal."""
    config = MoEConfig.task(["a", "b"], **fields)
    moe = convert_to_moe(copy.deepcopy(model), config, importance=scores_of(model))
    for layer in moe_layers(moe):
        torch.nn.init.normal_(layer.router.logits, std=spread)
    return moe


def kinds_of(model):
    post_norm = all(site.norm is not None for site in find_sites(model))
    return {name: fields for name, fields in KINDS.items() if post_norm or fields.get("norm") != "expert"}


@pytest.mark.parametrize("family", TEXT)
def test_equal_to_dense_before_training_and_to_its_merged_model_after(family, tmp_path):
    model, inputs = make(family), make_inputs(family)
    expected = valid(family, hidden(model, inputs), inputs)
    for kind, fields in kinds_of(model).items():
        if kind in ("copy", "mpo", "norm of each expert"):
            whole = {"norm": "expert", "experts": "copy"} if kind.startswith("norm") else fields
            for top_k in (1, 2) if "norm" not in whole else (1,):
                moe = by_task(model, 0.0, **whole | {"top_k": top_k})
                for task in range(2):
                    got = valid(family, hidden(moe, inputs | {"task_ids": task}), inputs)
                    assert_near(got, expected, 1e-5)
        moe = by_task(model, 2.0, **fields)
        for parameter in moe.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        set_task(moe, "b")
        by_name = valid(family, hidden(moe, inputs), inputs)
        for number, task in enumerate("ab"):
            wanted = valid(family, hidden(moe, inputs | {"task_ids": number}), inputs)
            plain = merge(moe, task)
            assert type(plain) is plain_class(type(moe)) is type(model)
            assert_near(valid(family, hidden(plain, inputs), inputs), wanted, 1e-5)
        assert_near(wanted, by_name, 0.0)
        plain.save_pretrained(tmp_path / kind)
        again = AutoModel.from_pretrained(tmp_path / kind)
        assert_near(valid(family, hidden(again, inputs), inputs), wanted, 1e-5)


@pytest.mark.parametrize("family", TEXT)
def test_a_batch_of_several_tasks_saved_and_loaded(family, tmp_path):
    """Each sample is as in a batch of its own task."""
    model, inputs = make(family), make_inputs(family)
    for kind, fields in kinds_of(model).items():
        moe = by_task(model, 2.0, **fields)
        for parameter in moe.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        moe.save_pretrained(tmp_path / kind)
        loaded = AutoModel.from_pretrained(tmp_path / kind).eval()
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in moe.state_dict().items())
        both = hidden(loaded, inputs | {"task_ids": torch.tensor([1, 0])})
        for sample, task in ((0, 1), (1, 0)):
            alone = hidden(moe, inputs | {"task_ids": task})
            assert_near(both[sample], alone[sample], 1e-5)
        with pytest.raises(UserError, match="task_ids: expected an id for each of a, b, or set_task before, got None"):
            moe(**inputs)


@pytest.mark.parametrize("family", slow_unless(FAST))
def test_students_keep_the_most_important_neurons(family):
    model, inputs = make(family), make_inputs(family)
    scores = scores_of(model)
    if family == "dinov2":  # its width is a ratio of integers to the hidden size
        with pytest.raises(UserError, match="model: cannot build a Dinov2Model with feed-forwards of another width"):
            dense_student(model, scores, 20)
        return
    whole = dense_student(model, scores, 48)
    assert_near(valid(family, hidden(whole, inputs), inputs), valid(family, hidden(model, inputs), inputs), 1e-5)
    student = dense_student(model, scores, 20)
    assert type(student) is type(model) and sum(p.numel() for p in student.parameters()) < model.num_parameters()
    one = MoEConfig(router="gate-token", num_experts=1, expert_size=20, num_shared_neurons=20)
    merged = merge(convert_to_moe(model, one, importance=scores))
    assert_near(hidden(merged, inputs), hidden(student, inputs), 1e-6)


def test_images_have_no_tasks():
    with pytest.raises(UserError, match=r"router: task routes in models with token ids, and .* of ViTModel gets none"):
        convert_to_moe(make("vit"), MoEConfig.task(["a"], experts="copy"))
    assert len(FAMILIES) == 32 and set(FAST) <= FAMILIES.keys()
