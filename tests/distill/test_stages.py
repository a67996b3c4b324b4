"""Recipes of several stages on tiny models: what is refused, and that it is refused before anything is trained."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill.microbert import MicroBertObjective
from moebert_kernels.distill.recipe import Recipe, Stage
from moebert_kernels.distill.run import train_stages
from moebert_kernels.distill.teacher import teacher_info
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_config, set_task
from tests.distill.tiny import tiny_bert
from tests.distill.tiny_run import (
    SCORES,
    SETTINGS,
    TASK,
    assert_same_tensors,
    constant,
    interrupt,
    log,
    saved_weights,
    tiny_split,
)
from tests.distill.tiny_trainer import mostly_slow

COMMON = SETTINGS | {"objective": "microbert", "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1}
FEATURES = {"task": 0.0, "embedding": 1.0, "hidden": 1.0, "alignment": 1.0}
PREDICTIONS = {"task": 0.5, "soft": 1.0, "adversarial": 0.1}


def stage(name, weights, **settings):
    return Stage(name, COMMON | {"loss_weights": weights} | settings)


TWO_STAGES = Recipe("two", (stage("features", FEATURES), stage("predictions", PREDICTIONS)))


def train(folder, recipe=TWO_STAGES, student=None, teacher=None, task=TASK, data=None, **options):
    student = tiny_bert(0, dropout=0.1) if student is None else student
    teacher = tiny_bert(1, layers=3, hidden=32) if teacher is None else teacher
    data = tiny_split(16, task=task) if data is None else data
    options = {"evaluate": constant([0.0] * 99), "best_metric": "score"} | options
    return train_stages(student, recipe, data, output_dir=folder, teacher=teacher, **options)


OPTIONS = "predictions.objective_options"


@pytest.mark.parametrize(("values", "options", "message"), [
    ({f"{OPTIONS}.layer_map": {2: 9}}, {}, "layer_map: expected teacher states between 0 and 3"),
    ({f"{OPTIONS}.layer_map": {1: 2}}, {}, "layer_map: expected the student's last layer, 2, for the term 'adver"),
    ({f"{OPTIONS}.adversary.input": "logits"},
     {"task": SCORES, "student": tiny_bert(0, num_labels=1), "teacher": tiny_bert(1, num_labels=1)},
     "discriminator_input: expected 'pooled' for a regression task, got 'logits'"),
    ({"predictions.loss_weights.balance": 0.01}, {}, "balance: expected the weight 0 for a model without gates"),
    ({f"{OPTIONS}.project": "false"}, {}, "project: expected True for a student of hidden_size 16"),
    ({"predictions.loss_weights.relation": 1.0, f"{OPTIONS}.relation_heads": 3}, {},
     "relation_heads: expected a divisor"),
    ({"predictions.loss_weights.relation": 1.0, f"{OPTIONS}.relation_layer": 7}, {},
     "relation_layer: expected 1 to 3"),
    ({"predictions.router_learning_rate": 0.1}, {}, "router_learning_rate: expected a model with trained routers"),
    ({}, {"teacher": tiny_bert(1, positions=8)}, "teacher: expected positions for 13 tokens, .*, got 8"),
])  # fmt: skip
@pytest.mark.parametrize("cached", [False, True])
def test_a_later_stage_is_refused_before_the_first_one_trains(values, options, message, cached, tmp_path):
    recipe = TWO_STAGES.with_values(values | ({"teacher_outputs": str(tmp_path / "cache")} if cached else {}))
    if cached and "predictions.loss_weights.relation" in values:
        message = "teacher: expected a model for the term 'relation', got cached outputs"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "o", recipe, **options)
    assert not list(tmp_path.glob("o/features/*"))


def test_a_cache_of_too_few_layers_is_refused_before_the_first_stage_trains(tmp_path):
    teacher, data = tiny_bert(1, layers=3), tiny_split(16)
    cache = TeacherCache.build(teacher, data.batches(4), tmp_path / "cache", layers=[0, 2, 3])
    narrow = TWO_STAGES.with_values({f"{OPTIONS}.layer_map": {2: 1}})
    with pytest.raises(UserError, match=r"teacher: expected hidden states \[1\], got only \[0, 2, 3\]"):
        train(tmp_path / "o", narrow, teacher=cache)
    with pytest.raises(UserError, match="teacher_outputs: expected none with a teacher's kept outputs, got "):
        train(tmp_path / "o", TWO_STAGES.with_values({"teacher_outputs": str(tmp_path / "other")}), teacher=cache)
    assert not list(tmp_path.glob("o/*")) and not (tmp_path / "other").exists()


def test_a_folder_of_another_run_is_refused_before_the_first_stage_trains(tmp_path):
    train(tmp_path, Recipe("one", TWO_STAGES.stages[1:]).with_values({"num_train_epochs": 1}))
    with pytest.raises(UserError, match=r"of other num_train_epochs \(it was 1.* and is 2 now\)"):
        train(tmp_path)
    assert not (tmp_path / "features").exists()
    assert train(tmp_path, resume=False).step == 8


def test_a_stage_that_nobody_judges_does_not_stop_early(tmp_path):
    assert train(tmp_path, TWO_STAGES.with_values({"early_stopping_patience": 9})).step == 8


def test_stages_are_not_named_as_the_folders_of_a_run():
    for name in ("best", "final", "a/b", ".", ""):
        with pytest.raises(UserError, match="stages: expected names of letters, digits, - and _ other than best, fin"):
            Stage(name)


@pytest.mark.parametrize("at", mostly_slow([9, 14], {14}))
def test_maps_go_on_in_the_next_stage_and_resume_is_exact(at, tmp_path, monkeypatch):
    """Stage 2 starts from the map of the last layer as stage 1 left it, also where it was interrupted."""
    first = []

    def noting(self, *arguments):
        build(self, *arguments)
        first.append({name: weight.clone() for name, weight in self.maps.state_dict().items()})

    build = MicroBertObjective.build
    monkeypatch.setattr(MicroBertObjective, "build", noting)
    recipe = TWO_STAGES.with_values({"objective_options.adversary.warmup": 0.0})
    whole = tiny_bert(0, dropout=0.1)
    assert train(tmp_path / "whole", recipe, whole).step == 8
    left = load_file(tmp_path / "whole/features/maps.safetensors")
    assert set(left) == {"layers.0.weight", "layers.1.weight", "layers.2.weight"}
    assert set(first[-1]) == {"layers.2.weight"} and torch.equal(first[-1]["layers.2.weight"], left["layers.2.weight"])
    assert not torch.equal(first[-1]["layers.2.weight"], first[0]["layers.2.weight"])
    assert set(saved_weights(tmp_path / "whole/features/final")) == set(whole.state_dict())

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, at)  # the first stage has eight steps
        train(tmp_path / "stopped", recipe)
    assert (tmp_path / "stopped/features/final").exists() and list((tmp_path / "stopped").glob("checkpoint-*"))
    train(tmp_path / "stopped", recipe)
    assert_same_tensors(saved_weights(tmp_path / "stopped/best"), saved_weights(tmp_path / "whole/best"))
    ends = [load_file(tmp_path / name / "maps.safetensors") for name in ("whole", "stopped")]
    assert torch.equal(ends[0]["layers.2.weight"], ends[1]["layers.2.weight"])
    (tmp_path / "stopped/features/maps.safetensors").unlink()
    with pytest.raises(UserError, match=r"stages: expected the maps of the finished one in .*features.*, got none"):
        train(tmp_path / "stopped", recipe)


def test_a_map_of_other_states_starts_anew():
    objective = MicroBertObjective("classification", ("hidden",), layer_map={1: 2, 2: 3})
    weight = torch.full((32, 16), 0.5)
    objective.first_maps = {(1, 1): weight, (2, 3): weight}
    objective.build(tiny_bert(0), teacher_info(tiny_bert(1, layers=3, hidden=32)), seed=0)
    assert torch.equal(objective.maps.layers["2"].weight, weight)
    assert not torch.equal(objective.maps.layers["1"].weight, weight)


@pytest.mark.parametrize("router", mostly_slow(["gate-token", "hash-random"], {"gate-token"}))
def test_a_student_with_experts(router, tmp_path):
    """One head, any router: all terms, and with gates their balance loss."""
    with pytest.warns(UserWarning, match="ranked at random"):
        config = MoEConfig.moebert(num_experts=2, expert_size=16, num_shared_neurons=8, router=router)
        student = convert_to_moe(tiny_bert(0), config)
    weights = FEATURES | PREDICTIONS | {"relation": 1.0} | ({"balance": 0.1} if router == "gate-token" else {})
    result = train(tmp_path, Recipe("all", (stage("all", weights, num_train_epochs=4),)), student)
    first, *_, last = log(tmp_path)
    assert last["hidden"] < first["hidden"] and last["relation"] > 0 and ("balance" in last) == ("balance" in weights)
    assert moe_config(AutoConfig.from_pretrained(result.model_dir)).router == router


@pytest.mark.parametrize("cached", [False, True])
def test_models_with_several_heads_are_refused_by_name(cached, tmp_path):
    routed = convert_to_moe(tiny_bert(0), MoEConfig.task({"one": ["a", "b", "c"], "two": []}, experts="copy"))
    set_task(routed, "one")
    recipe = TWO_STAGES.with_values({"teacher_outputs": str(tmp_path / "cache")} if cached else {})
    for name in ("student", "teacher"):
        what = {"student": "model", "teacher": "teacher"}[name]
        with pytest.raises(
            UserError, match=rf"{what}: expected a model with one head, got a .* with heads for one, two"
        ):
            train(tmp_path / "o", recipe, **{name: routed})
    assert not list(tmp_path.glob("o/*"))


@pytest.mark.slow
def test_one_cache_serves_all_stages(tmp_path):
    """Of the layers that any of them follows; and the run from it ends as with the teacher."""
    ends = []
    for options in ({}, {"teacher_outputs": str(tmp_path / "cache")}):
        student = tiny_bert(0)
        train(tmp_path / str(len(options)), TWO_STAGES.with_values(options), student)
        ends.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-6, msg=name)
