"""Several tasks in one run: which batches are drawn, what a window of them equals, and resuming."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import custom_task
from moebert_kernels.distill.multi_task import JoinedTasks, MultiTaskEvaluator, load_report, on_task
from moebert_kernels.distill.orders import SeededTasks
from moebert_kernels.distill.run import train_stages
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, get_task, moe_layers
from tests.distill.tiny import TinyBatches, tiny_bert, weights
from tests.distill.tiny_run import assert_same_tensors, interrupt, log, one_stage, saved_weights
from tests.distill.tiny_trainer import tiny_data, tiny_tokenizer

LABELS = {"small": ["a", "b", "c"], "score": [], "large": ["x", "y", "z"]}


def tiny_tasks(sizes=(8, 12, 24)):
    """Splits of three tasks; the second has scores."""
    splits = {}
    for seed, (name, size) in enumerate(zip(LABELS, sizes, strict=True)):
        task = custom_task(["text"], regression=name == "score", label_names=LABELS[name])
        data = tiny_data(size, seed)
        texts = [" ".join(map(str, ids)) for ids in data["input_ids"]]
        labels = [float(label) if name == "score" else label for label in data["labels"]]
        rows = Dataset.from_dict({"text": texts, "label": labels, "example_id": list(range(size))})
        splits[name] = TokenizedSplit(rows, task, tiny_tokenizer(), max_length=16)
    return splits


class Fake:
    """As much of a trainer as an order asks for."""

    def __init__(self, epoch=0, seed=0, size=4):
        self.args = type("Args", (), {"seed": seed, "data_seed": None})
        self.state = type("State", (), {"epoch": epoch})
        self._train_batch_size = size


def drawn(joined, epoch, size=4):
    """(task, examples) of each batch."""
    order, rows = list(joined.sampler(Fake(epoch, size=size))), joined.columns
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    return [(rows[batch[0]]["task_ids"], tuple(sorted(batch))) for batch in batches]


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


def run(folder, joined=None, model=None, **settings):
    joined = JoinedTasks(tiny_tasks(), list(LABELS)) if joined is None else joined
    return train_stages(
        model or student(0.1), one_stage(**settings), joined, output_dir=folder, evaluate=evaluator(),
        best_metric="mean",
    )  # fmt: skip


def test_each_batch_is_of_one_task_and_each_example_comes_once():
    joined = JoinedTasks(tiny_tasks(), list(LABELS))
    assert len(joined) == 44 and joined.sampler(Fake()).counts == [2, 3, 6]
    for epoch in range(2):
        batches = drawn(joined, epoch)
        assert Counter(task for task, _ in batches) == {0: 2, 1: 3, 2: 6}
        assert sorted(example for _, examples in batches for example in examples) == list(range(44))
        for task, examples in batches:
            assert {joined.columns[example]["task_ids"] for example in examples} == {task}
    assert drawn(joined, 0) == drawn(joined, 0) != drawn(joined, 1)
    assert [task for task, _ in drawn(joined, 0)] != sorted(task for task, _ in drawn(joined, 0))
    rows = [joined.columns[n] for n in range(8, 12)]
    batch = joined.collator([{k: v for k, v in row.items() if k not in ("length",)} for row in rows])
    assert batch["labels"].dtype == torch.float32 and batch["task_ids"].tolist() == [1] * 4


@pytest.mark.parametrize(("temperature", "counts"), [(1.0, [2, 3, 6]), (2.0, [3, 3, 5]), (float("inf"), [4, 4, 4])])
def test_temperature_evens_the_tasks_out(temperature, counts):
    order = JoinedTasks(tiny_tasks(), list(LABELS), temperature=temperature).sampler(Fake())
    assert order.counts == counts and len(list(order)) == len(order) == 4 * sum(counts)


def test_a_task_goes_on_where_it_stopped():
    """At a high temperature the large task gives few batches an epoch, but all of them in time."""
    lengths = [np.full(4, 5), np.full(4, 5), np.full(40, 5)]
    seen = [
        example for epoch in range(5) for example in SeededTasks(Fake(epoch), lengths, 4, float("inf")) if example >= 8
    ]
    assert len(seen) == 80 and sorted(seen[:40]) == sorted(seen[40:]) == list(range(8, 48))


def test_the_fingerprint_names_what_the_batches_depend_on():
    tasks, names = tiny_tasks(), list(LABELS)
    others = [
        JoinedTasks(tasks, names),
        JoinedTasks(tasks, names, temperature=2.0),
        JoinedTasks({name: tasks[name] for name in names[:2]}, names),
        JoinedTasks(tiny_tasks((12, 12, 24)), names),
        JoinedTasks(tasks, names[::-1]),
    ]
    assert len({joined.fingerprint for joined in others}) == len(others)
    assert JoinedTasks(tiny_tasks(), names).fingerprint == others[0].fingerprint


def test_refuses():
    with pytest.raises(UserError, match="tasks: expected at least one, got none"):
        JoinedTasks({}, ["a"])
    with pytest.raises(UserError, match="tasks: expected some of a, b, got 'small'"):
        JoinedTasks(tiny_tasks(), ["a", "b"])
    with pytest.raises(UserError, match=r"task_temperature: expected a number of at least 1, got 0\.5"):
        JoinedTasks(tiny_tasks(), list(LABELS), temperature=0.5).sampler(Fake())


def test_resumes_exactly(tmp_path, monkeypatch):
    result = run(tmp_path / "whole")
    names = {f"{name}.{metric}" for name in LABELS for metric in ("loss", "size")}
    assert set(result.best_metrics) == {"mean", *names}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, 15)
        run(tmp_path / "stopped")
    assert run(tmp_path / "stopped").history == result.history
    assert_same_tensors(saved_weights(tmp_path / "whole/best"), saved_weights(tmp_path / "stopped/best"))


def test_learns_all_tasks_and_its_routers(tmp_path):
    model = student()
    before = weights(model)
    run(tmp_path, model=model, num_train_epochs=12, learning_rate=5e-3, logging_steps=11)
    lines = log(tmp_path)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert not torch.equal(moe_layers(model)[0].router.logits, before["bert.encoder.layer.0.output.router.logits"])


def test_routers_learn_at_their_own_rate_through_a_schedule(tmp_path):
    ends = []
    for rate in (0.0, 1.0):
        model = student()
        before = weights(model)
        run(tmp_path / str(rate), model=model, router_learning_rate=rate)
        ends.append((weights(model), before))
    name = "bert.encoder.layer.0.output.router.logits"
    (still, before), (moved, _) = ends
    assert torch.equal(still[name], before[name])
    assert (moved[name] - before[name]).abs().max() > 0.1
    name = "bert.encoder.layer.0.output.experts.w1"
    assert not torch.equal(still[name], before[name])


def test_a_window_of_tasks_equals_one_mixed_batch():
    """Losses and gradients of three batches of one task each, by their shares, against those of one of all."""
    splits, model = tiny_tasks((5, 3, 4)), student()
    parts = []
    for number, split in enumerate(splits.values()):
        batch = split.collate(range(len(split)))
        parts.append(batch | {"task_ids": torch.full((len(split),), number)})
    width = max(part["input_ids"].shape[1] for part in parts)
    keys = ("input_ids", "attention_mask", "task_ids", "labels")
    for part in parts:
        share = len(part["labels"]) / 12
        (share * model(**{key: part[key] for key in keys}).loss).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    pad = torch.nn.functional.pad
    mixed = {
        key: torch.cat([pad(part[key], (0, width - part[key].shape[1])) if part[key].ndim == 2 else part[key].float()
                        for part in parts])
        for key in keys
    }  # fmt: skip
    model(**mixed | {"task_ids": mixed["task_ids"].long()}).loss.backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-5, msg=name)


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
