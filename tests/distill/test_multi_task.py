"""Several tasks in one run: which batches are drawn, what a window of them equals, and resuming."""

import os
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill import FitConfig, fit
from moebert_kernels.distill.multi_task import MultiTaskBatches, MultiTaskEvaluator, load_report, on_task
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, get_task, moe_layers
from tests.distill.tiny import TinyBatches, assert_same_weights, log, tiny_bert, weights

LABELS = {"small": ["a", "b", "c"], "score": [], "large": ["x", "y", "z"]}
CONFIG = FitConfig(epochs=3, learning_rate=3e-3, save_steps=4, log_steps=3, best_metric="mean")


def tiny_tasks(sizes=(8, 12, 24), batch_size=4):
    """Batches of three tasks; the second has scores."""
    kinds = {"small": "classification", "score": "regression", "large": "classification"}
    return {
        name: TinyBatches(examples=size, batch_size=batch_size, seed=seed, kind=kinds[name])
        for seed, (name, size) in enumerate(zip(LABELS, sizes, strict=True))
    }


def student(dropout=0.0):
    model = convert_to_moe(tiny_bert(0, dropout=dropout), MoEConfig.task(LABELS, experts="copy"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that tasks choose different experts
        for layer in moe_layers(model):
            layer.router.logits.copy_(0.5 * torch.randn(layer.router.logits.shape, generator=generator))
    return model


def evaluator():
    def score(model):
        batch = TinyBatches(examples=6, batch_size=6, seed=9).batch(torch.arange(6))
        return {"loss": 0.0, "size": model(batch["input_ids"], batch["attention_mask"]).logits.abs().mean().item()}

    return MultiTaskEvaluator(dict.fromkeys(LABELS, score), dict.fromkeys(LABELS, "size"))


def run(folder, data=None, config=CONFIG, model=None):
    data = MultiTaskBatches(tiny_tasks(), list(LABELS)) if data is None else data
    return fit(model or student(0.1), data, config=config, output_dir=folder, evaluate=evaluator())


def drawn(batches, epoch):
    """(task, sorted example ids as in the task) of each batch."""
    return [
        (int(batch["task_ids"][0]), tuple(sorted((batch["example_id"] // len(batches.tasks)).tolist())))
        for batch in batches(epoch)
    ]


def test_each_batch_is_of_one_task_and_each_of_its_batches_comes_once():
    tasks = tiny_tasks()
    batches = MultiTaskBatches(tasks, list(LABELS))
    assert len(batches) == 2 + 3 + 6 and batches.counts == [2, 3, 6]
    for epoch in range(2):
        wanted = Counter(
            (number, tuple(sorted(batch["example_id"].tolist())))
            for number, task in enumerate(tasks.values())
            for batch in task(epoch)
        )
        assert Counter(drawn(batches, epoch)) == wanted
        for batch in batches(epoch):
            assert (
                batch["task_ids"].shape == (batch["input_ids"].shape[0],) and len(set(batch["task_ids"].tolist())) == 1
            )
            assert batch["labels"].is_floating_point() == (batch["task_ids"][0] == 1)
    assert drawn(batches, 0) == drawn(batches, 0) != drawn(batches, 1)
    assert [task for task, _ in drawn(batches, 0)] != sorted(task for task, _ in drawn(batches, 0))
    ids = [int(i) for batch in batches(0) for i in batch["example_id"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("temperature", "counts"), [(1.0, [2, 3, 6]), (2.0, [3, 3, 5]), (float("inf"), [4, 4, 4])])
def test_temperature_evens_the_tasks_out(temperature, counts):
    batches = MultiTaskBatches(tiny_tasks(), list(LABELS), temperature=temperature)
    assert batches.counts == counts and len(list(batches(0))) == len(batches) == sum(counts)


def test_a_task_goes_on_where_it_stopped():
    """At a high temperature the large task gives few batches an epoch, but all of them in time."""
    tasks = tiny_tasks((4, 4, 40))
    batches = MultiTaskBatches(tasks, list(LABELS), temperature=float("inf"))
    assert batches.counts == [4, 4, 4]
    seen = [examples for epoch in range(5) for task, examples in drawn(batches, epoch) if task == 2]
    wanted = [tuple(sorted(batch["example_id"].tolist())) for epoch in range(2) for batch in tasks["large"](epoch)]
    assert seen == wanted


def test_the_fingerprint_names_what_the_batches_depend_on():
    tasks = tiny_tasks()
    names = list(LABELS)
    others = [
        MultiTaskBatches(tasks, names),
        MultiTaskBatches(tasks, names, seed=1),
        MultiTaskBatches(tasks, names, temperature=2.0),
        MultiTaskBatches({name: tasks[name] for name in names[:2]}, names),
        MultiTaskBatches(tiny_tasks((12, 12, 24)), names),
        MultiTaskBatches(tasks, names[::-1]),
    ]
    assert len({batches.fingerprint for batches in others}) == len(others)
    assert MultiTaskBatches(tiny_tasks(), names).fingerprint == others[0].fingerprint


def test_refuses():
    with pytest.raises(UserError, match="batches: expected those of at least one task, got none"):
        MultiTaskBatches({}, ["a"])
    with pytest.raises(UserError, match="batches: expected tasks among a, b, got 'small'"):
        MultiTaskBatches(tiny_tasks(), ["a", "b"])
    with pytest.raises(UserError, match=r"temperature: expected a number of at least 1, got 0\.5"):
        MultiTaskBatches(tiny_tasks(), list(LABELS), temperature=0.5)


class Fixed:
    """The same batches in each epoch."""

    def __init__(self, *batches):
        self.all, self.fingerprint = batches, f"fixed-{len(batches)}"

    def __len__(self):
        return len(self.all)

    def __call__(self, epoch):
        return iter(self.all)


def test_a_window_of_tasks_equals_one_mixed_batch(tmp_path):
    tasks = tiny_tasks((5, 3, 4), batch_size=8)
    parts = list(MultiTaskBatches(tasks, list(LABELS))(0))
    width = max(part["input_ids"].shape[1] for part in parts)

    def wide(tensor):
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) if tensor.ndim == 2 else tensor

    mixed = {name: torch.cat([wide(part[name]).float() for part in parts]) for name in parts[0]}
    mixed = {name: tensor if name == "labels" else tensor.long() for name, tensor in mixed.items()}
    ends = []
    for name, data, accumulation in (("large", Fixed(mixed), 1), ("small", Fixed(*parts), 3)):
        model = student()
        config = FitConfig(epochs=4, learning_rate=1e-3, accumulation=accumulation, weight_decay=0.1, log_steps=1)
        fit(model, data, config=config, output_dir=tmp_path / name)
        ends.append((model, log(tmp_path / name, "loss")))
    assert_same_weights(ends[0][0], weights(ends[1][0]), tolerance=1e-5)
    for large, small in zip(ends[0][1], ends[1][1], strict=True):
        assert large == pytest.approx(small, rel=1e-5)


class Interrupting(MultiTaskBatches):
    at = None

    def __call__(self, epoch):
        for number, batch in enumerate(super().__call__(epoch)):
            if (epoch, number) == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


def test_resumes_exactly(tmp_path):
    names = list(LABELS)
    result = run(tmp_path / "whole")
    assert set(result.best_metrics) == {"mean", *(f"{name}.{metric}" for name in names for metric in ("loss", "size"))}
    stopped = Interrupting(tiny_tasks(), names)
    stopped.at = (1, 4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stopped)
    run(tmp_path / "stopped")
    for name in ("final/model.safetensors", "best/model.safetensors", "log.jsonl", "state/finished.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_learns_all_tasks_and_its_routers(tmp_path):
    model = student()
    before = weights(model)
    run(tmp_path, model=model, config=FitConfig(epochs=12, learning_rate=5e-3, log_steps=11, best_metric="mean"))
    lines = log(tmp_path, "loss")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert not torch.equal(moe_layers(model)[0].router.logits, before["bert.encoder.layer.0.output.router.logits"])


def test_routers_learn_at_their_own_rate_through_a_schedule(tmp_path):
    ends = []
    for rate in (0.0, 1.0):
        model = student()
        before = weights(model)
        run(tmp_path / str(rate), model=model, config=replace(CONFIG, router_learning_rate=rate))
        ends.append((weights(model), before))
    name = "bert.encoder.layer.0.output.router.logits"
    (still, before), (moved, _) = ends
    assert torch.equal(still[name], before[name])
    assert (moved[name] - before[name]).abs().max() > 0.1
    name = "bert.encoder.layer.0.output.experts.w1"
    assert not torch.equal(still[name], before[name])


def test_the_mean_is_of_the_main_metrics():
    model = student()
    values = {"small": {"f1": 0.5, "accuracy": 0.9}, "score": {"pearson": 0.2}}
    seen = []

    def evaluate(name):
        return lambda model: seen.append(get_task(model)) or values[name]

    judge = MultiTaskEvaluator({name: evaluate(name) for name in values}, {"small": "f1", "score": "pearson"})
    metrics = judge(model)
    assert metrics == {"small.f1": 0.5, "small.accuracy": 0.9, "score.pearson": 0.2, "mean": pytest.approx(0.35)}
    assert seen == ["small", "score"] and get_task(model) is None
    with pytest.raises(ZeroDivisionError), on_task(model, "large"):
        assert get_task(model) == "large"
        raise ZeroDivisionError
    assert get_task(model) is None


def test_load_report():
    model = student()
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.logits.copy_(torch.tensor([[9.0, 8, 0, 0], [0, 9, 8, 0], [8.0, 9, 0, 0]]))
    first = load_report(model)[0]
    assert first.startswith("layer 1: small 0+1 (0.731 0.269), score 1+2 (0.731 0.269), large 1+0 (0.731 0.269)")
    assert first.endswith("tasks per expert 2 3 1 0") and len(load_report(model)) == 2
