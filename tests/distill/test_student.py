"""Recipes of several stages on tiny models: what is refused, and that it is refused before anything is trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.data.tasks import custom_task
from moebert_kernels.distill import fit
from moebert_kernels.distill.features import Batches, Features
from moebert_kernels.distill.microbert import MicroBertObjective
from moebert_kernels.distill.recipe import Recipe, Stage
from moebert_kernels.distill.student import fit_recipe
from moebert_kernels.distill.teacher import teacher_info
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_config, set_task
from tests.distill.tiny import CONFIG, VOCAB, Interrupting, TinyBatches, assert_same_weights, log, tiny_bert, weights

TASK, SCORES = custom_task(["text"], label_names=["a", "b", "c"]), custom_task(["text"], regression=True)
FEATURES = Stage("features", embedding=1.0, hidden=1.0, alignment=1.0, epochs=2, learning_rate=1e-3, log_steps=1)
PREDICTIONS = Stage("predictions", labels=0.5, soft=1.0, adversarial=0.1, epochs=2, learning_rate=1e-3, log_steps=1)
TWO_STAGES = Recipe("two", (FEATURES, PREDICTIONS)).with_values({"batch_size": 4})


def features(examples=16, regression=False):
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, VOCAB, length).astype(np.int32) for length in generator.integers(2, 10, examples)]
    labels = np.array([int(row[0]) % 3 for row in ids], dtype=np.float32 if regression else np.int64)
    return Features(ids, {"labels": labels}, padding_id=0)


def train(folder, recipe=TWO_STAGES, student=None, teacher=None, task=TASK, data=None, **options):
    student = tiny_bert(0, dropout=0.1) if student is None else student
    teacher = tiny_bert(1, layers=3, hidden=32) if teacher is None else teacher
    metric = task.main_metric
    data = features(regression=task is SCORES) if data is None else data
    options = {"evaluate": lambda model: {metric: 0.0}} | options
    return fit_recipe(student, recipe, data, task=task, output_dir=folder, teacher=teacher, **options)


@pytest.mark.parametrize(("values", "options", "message"), [
    ({"predictions.layer_map": "2:9"}, {}, "layer_map: expected teacher states between 0 and 3"),
    ({"predictions.layer_map": "1:2"}, {}, "layer_map: expected the student's last layer, 2, for the term 'adver"),
    ({"predictions.discriminator_input": "logits"},
     {"task": SCORES, "student": tiny_bert(0, num_labels=1), "teacher": tiny_bert(1, num_labels=1)},
     "discriminator_input: expected 'pooled' for a regression task, got 'logits'"),
    ({"predictions.schedule": "foo"}, {}, "schedule: expected one of linear, "),
    ({"predictions.balance": 0.01}, {}, "balance: expected the weight 0 for a BertFor"),
    ({"predictions.project": "false"}, {}, "project: expected True for a student of hidden_size 16"),
    ({"predictions.relation": 1.0, "predictions.relation_heads": 3}, {}, "relation_heads: expected a divisor"),
    ({"predictions.relation": 1.0, "predictions.relation_layer": 7}, {}, "relation_layer: expected 1 to 3"),
    ({"predictions.router_learning_rate": 0.1}, {}, "router_learning_rate: expected a model with trained routers"),
    ({}, {"teacher": tiny_bert(1, positions=8)}, "teacher: expected positions for 9 tokens, .*, got 8"),
    ({}, {"student": tiny_bert(0, positions=8)}, "model: expected positions for 9 tokens, .*, got 8"),
])  # fmt: skip
@pytest.mark.parametrize("cached", [False, True])
def test_a_later_stage_is_refused_before_the_first_one_trains(values, options, message, cached, tmp_path):
    cache = {"cache": tmp_path / "cache"} if cached else {}
    if cached and "predictions.relation" in values:
        message = "teacher: expected a model for the term 'relation', got cached outputs"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "o", TWO_STAGES.with_values(values), **options, **cache)
    assert not list(tmp_path.glob("o/features/*"))


def test_a_cache_of_too_few_layers_is_refused_before_the_first_stage_trains(tmp_path):
    teacher = tiny_bert(1, layers=3)
    cache = TeacherCache.build(teacher, TinyBatches(), tmp_path / "cache", layers=[0, 2, 3])
    narrow = TWO_STAGES.with_values({"predictions.layer_map": "2:1"})
    with pytest.raises(UserError, match=r"teacher: expected hidden states \[1\], got only \[0, 2, 3\]"):
        train(tmp_path / "o", narrow, teacher=cache)
    with pytest.raises(UserError, match="cache: expected none with a teacher's cached outputs, got "):
        train(tmp_path / "o", teacher=cache, cache=tmp_path / "other")
    assert not (tmp_path / "o").exists() and not (tmp_path / "other").exists()


def test_a_folder_of_another_run_is_refused_before_the_first_stage_trains(tmp_path):
    train(tmp_path, Recipe("one", (PREDICTIONS,)).with_values({"batch_size": 4, "epochs": 1}))
    with pytest.raises(UserError, match=r"of other epochs \(it was 1 and is 2 now\)"):
        train(tmp_path)
    assert not (tmp_path / "features").exists()
    assert train(tmp_path, resume=False).step == 8


def test_stages_are_not_named_as_the_folders_of_a_run(tmp_path):
    for name in ("best", "final", "state", "a/b", ".", ""):
        with pytest.raises(UserError, match="stages: expected names of letters, digits, - and _ other than best, fin"):
            Stage(name)


@pytest.mark.parametrize("at", [1, 5, 6])
def test_maps_go_on_in_the_next_stage_and_resume_is_exact(at, tmp_path, monkeypatch):
    """Stage 2 starts from the map of the last layer as stage 1 left it, also where it was interrupted."""
    first = []

    def noting(self, *arguments):
        build(self, *arguments)
        first.append({name: weight.clone() for name, weight in self.maps.state_dict().items()})

    build = MicroBertObjective.build
    monkeypatch.setattr(MicroBertObjective, "build", noting)
    recipe = TWO_STAGES.with_values({"save_steps": 3, "discriminator_warmup": 0.0})
    whole = tiny_bert(0, dropout=0.1)
    assert train(tmp_path / "whole", recipe, whole).step == 8
    left = load_file(tmp_path / "whole/features/state/maps.safetensors")
    assert set(left) == {"layers.0.weight", "layers.1.weight", "layers.2.weight"}
    assert set(first[-1]) == {"layers.2.weight"} and torch.equal(first[-1]["layers.2.weight"], left["layers.2.weight"])
    assert not torch.equal(first[-1]["layers.2.weight"], first[0]["layers.2.weight"])
    assert set(load_file(tmp_path / "whole/features/final/model.safetensors")) == set(whole.state_dict())

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("moebert_kernels.distill.student.Batches", type("Both", (InSecondStage, Batches), {"at": at}))
        train(tmp_path / "stopped", recipe)
    assert (tmp_path / "stopped/features/state/finished.json").exists()
    assert list((tmp_path / "stopped/state").glob("step-*"))
    again = tiny_bert(0, dropout=0.1)
    train(tmp_path / "stopped", recipe, again)
    assert_same_weights(again, weights(whole))
    ends = [load_file(tmp_path / name / "state/maps.safetensors") for name in ("whole", "stopped")]
    assert torch.equal(ends[0]["layers.2.weight"], ends[1]["layers.2.weight"])
    (tmp_path / "stopped/features/state/maps.safetensors").unlink()
    with pytest.raises(UserError, match=r"stages: expected the maps of the finished one in .*features.*, got none"):
        train(tmp_path / "stopped", recipe)


class InSecondStage(Interrupting):
    """Interrupts at the batch `at` of the second run that draws any."""

    started = 0

    def __call__(self, epoch):
        if not self.drawn:
            type(self).started += 1
        if type(self).started < 2:
            self.at = -1
        else:
            self.at = type(self).at
        return super().__call__(epoch)


def test_a_map_of_other_states_starts_anew(tmp_path):
    objective = MicroBertObjective("classification", ("hidden",), layer_map={1: 2, 2: 3})
    weight = torch.full((32, 16), 0.5)
    objective.first_maps = {(1, 1): weight, (2, 3): weight}
    objective.build(tiny_bert(0), teacher_info(tiny_bert(1, layers=3, hidden=32)), seed=0)
    assert torch.equal(objective.maps.layers["2"].weight, weight)
    assert not torch.equal(objective.maps.layers["1"].weight, weight)


@pytest.mark.parametrize("router", ["gate-token", "hash-random"])
def test_a_student_with_experts(router, tmp_path):
    """One head, any router: all terms, and with gates their balance loss."""
    with pytest.warns(UserWarning, match="ranked at random"):
        config = MoEConfig.moebert(num_experts=2, expert_size=16, num_shared_neurons=8, router=router)
        student = convert_to_moe(tiny_bert(0), config)
    balance = {"balance": 0.1} if router == "gate-token" else {}
    recipe = Recipe("all", (replace(FEATURES, labels=0.5, soft=1.0, relation=1.0, adversarial=0.1),))
    result = train(tmp_path, recipe.with_values({"batch_size": 4, "epochs": 4} | balance), student)
    first, *_, last = log(tmp_path, "loss")
    assert last["hidden"] < first["hidden"] and last["relation"] > 0 and ("balance" in last) == bool(balance)
    assert moe_config(AutoConfig.from_pretrained(result.model_dir)).router == router


@pytest.mark.parametrize("cached", [False, True])
def test_models_with_several_heads_are_refused_by_name(cached, tmp_path):
    routed = convert_to_moe(tiny_bert(0), MoEConfig.task({"one": ["a", "b", "c"], "two": []}, experts="copy"))
    set_task(routed, "one")
    cache = {"cache": tmp_path / "cache"} if cached else {}
    for name in ("student", "teacher"):
        what = {"student": "model", "teacher": "teacher"}[name]
        with pytest.raises(
            UserError, match=rf"{what}: expected a model with one head, got a .* with heads for one, two"
        ):
            train(tmp_path / "o", **{name: routed}, **cache)
    objective = MicroBertObjective("classification")
    with pytest.raises(UserError, match=r"model: expected a model with one head, .*merge\(model, task\)"):
        fit(routed, TinyBatches(), config=CONFIG, output_dir=tmp_path / "o", objective=objective, teacher=tiny_bert(1))
    assert not list(tmp_path.iterdir())
