"""Routing by task inside the encoder, and one model with a head for each task."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

from moebert_kernels.errors import UserError
from moebert_kernels.models import (
    MoEBertForMultiTaskClassification,
    MoEBertForSequenceClassification,
    MoEBertModel,
)
from tests.helpers import assert_same_model
from tests.models import tiny

LABELS = {"mood": ["sad", "happy"], "score": [], "logic": ["yes", "no", "perhaps"]}
TASKS = {"router": "task", "tasks": list(LABELS), "initializer_range": 0.4}
MIXED = torch.tensor([1, 0, 2, 0])


def encoder(**changes):
    return MoEBertModel(tiny.config(**TASKS | changes)).eval()


def multi_task(**changes):
    return MoEBertForMultiTaskClassification(tiny.config(**TASKS | {"task_labels": LABELS} | changes)).eval()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"norm": "expert"}, {"preset": "paper"}, {"style": "roberta"}])
def test_each_sequence_of_a_mixed_batch_is_as_in_a_batch_of_its_task(options):
    model, batch = encoder(**options), tiny.inputs(batch=4)
    mixed = model(**batch, task_ids=MIXED).last_hidden_state
    tasks = [model(**batch, task_ids=task).last_hidden_state for task in range(3)]
    for b, task in enumerate(MIXED):
        torch.testing.assert_close(mixed[b], tasks[task][b])
    assert not torch.allclose(tasks[0], tasks[1])


@pytest.mark.parametrize("norm", ["layer", "expert"])
def test_autocast_and_half_precision(norm):
    model, batch = multi_task(norm=norm), tiny.inputs(batch=4)
    wanted = model(**batch, task_ids=2).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch, task_ids=2).logits.float(), wanted, rtol=0, atol=0.1)
    half = model.bfloat16()(**batch, task_ids=2).logits
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, rtol=0, atol=0.1)


def test_padding_changes_nothing():
    model, batch = encoder(), tiny.inputs(batch=4)
    other = batch["input_ids"].where(batch["attention_mask"] != 0, 1)
    real = batch["attention_mask"] != 0
    one, two = (
        model(**batch | {"input_ids": ids}, task_ids=MIXED).last_hidden_state for ids in (batch["input_ids"], other)
    )
    assert torch.equal(one[real], two[real])


def test_a_task_can_be_set_and_is_not_needed_if_there_is_one():
    model, batch = multi_task(), tiny.inputs()
    model.set_task("logic")
    assert torch.equal(model(**batch).logits, model(**batch, task_ids=2).logits)
    assert model(**batch, task_ids=1).logits.shape == (tiny.B, 1)
    model.set_task(None)
    with pytest.raises(
        UserError, match="task_ids: expected an id for each of mood, score, logic, or set_task before, got"
    ):
        model(**batch)
    with pytest.raises(UserError, match="task: expected one of the model's tasks, mood, score, logic, got 'mod'"):
        model.set_task("mod")
    one = encoder(tasks=["only"])
    assert torch.equal(one(**batch).last_hidden_state, one(**batch, task_ids=0).last_hidden_state)


@pytest.mark.parametrize("task_ids", [3, torch.tensor([0, 1, 3]), torch.tensor([3, 3, 3])])
def test_a_task_out_of_range(task_ids):
    for model in (encoder(), multi_task()):
        with pytest.raises(UserError, match=r"task_ids: expected ids in \[0, 3\), one for each task, got 3"):
            model(**tiny.inputs(), task_ids=task_ids)


@pytest.mark.parametrize("style", tiny.STYLES)
def test_each_task_has_its_own_head_and_loss(style):
    model, batch = multi_task(style=style), tiny.inputs()
    labels = {"mood": torch.tensor([0, 1, 1]), "score": torch.tensor([0.5, 3.0, 2.0]), "logic": torch.tensor([2, 0, 1])}
    head = model.classifier.out_proj if style == "roberta" else model.classifier
    assert head.out_features == 6
    for task, (name, names) in enumerate(LABELS.items()):
        out = model(**batch, task_ids=task, labels=labels[name])
        assert out.logits.shape == (tiny.B, len(names) or 1)
        wanted = F.cross_entropy(out.logits, labels[name]) if names else F.mse_loss(out.logits[:, 0], labels[name])
        torch.testing.assert_close(out.loss, wanted)
        out.loss.backward()
        rows = [row for row in range(6) if head.weight.grad[row].abs().sum() > 0]
        assert rows == list(range(6))[model.rows_of(task)]
        model.zero_grad()


def test_a_mixed_batch_gives_each_sequence_its_tasks_logits_and_loss():
    model, batch, labels = multi_task(), tiny.inputs(batch=4), torch.tensor([1.5, 1, 2, 0])
    mixed = model(**batch, task_ids=MIXED, labels=labels)
    assert mixed.logits.shape == (4, 3)
    losses = []
    for b, task in enumerate(MIXED.tolist()):
        count = len(list(LABELS.values())[task]) or 1
        one = {name: tensor[b : b + 1] for name, tensor in batch.items()}
        label = labels[b : b + 1] if task == 1 else labels[b : b + 1].long()
        alone = model(**one, task_ids=task, labels=label)
        torch.testing.assert_close(mixed.logits[b, :count], alone.logits[0])
        assert (mixed.logits[b, count:] == torch.finfo(torch.float32).min).all()
        losses.append(alone.loss)
    torch.testing.assert_close(mixed.loss, torch.stack(losses).mean())
    mixed.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all((layer.router.logits.grad != 0).all() for layer in model.moebert.encoder.layer)


@pytest.mark.parametrize("norm", ["layer", "expert"])
def test_saves_and_loads(tmp_path, norm):
    model, batch = multi_task(norm=norm), tiny.inputs(batch=4)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is MoEBertForMultiTaskClassification and again.config.task_labels == LABELS
    assert_same_model(again, model, lambda model: model(**batch, task_ids=0).logits)
    alone = AutoModel.from_pretrained(tmp_path)
    assert_same_model(alone, model.moebert, lambda model: model(**batch, task_ids=MIXED).last_hidden_state)


def test_a_checkpoint_of_other_tasks_is_refused(tmp_path):
    encoder().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"encoder.layer.0.router.logits: expected shape \(2, 4\), got \(3, 4\)"):
        MoEBertModel.from_pretrained(tmp_path, tasks=["a", "b"])


def test_needs_labels():
    with pytest.raises(UserError, match="task_labels: expected the labels of each task, with router='task', got none"):
        MoEBertForMultiTaskClassification(tiny.config(**TASKS))


def test_the_auto_class_still_makes_a_single_head_of_a_new_configuration():
    assert type(AutoModelForSequenceClassification.from_config(tiny.config())) is MoEBertForSequenceClassification


def test_compiles_in_one_graph():
    model, batch = multi_task(), tiny.inputs(batch=4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for task_ids in (1, MIXED):
        torch.testing.assert_close(
            compiled(**batch, task_ids=task_ids).logits, model(**batch, task_ids=task_ids).logits
        )


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = multi_task(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(**tiny.inputs(batch=4), task_ids=MIXED, labels=torch.tensor([1.5, 1, 2, 0])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
