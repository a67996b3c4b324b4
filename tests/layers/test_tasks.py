"""Routing by task inside a model, and one model with a head for each task."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, get_task, moe_layers, set_task
from moebert_kernels.layers.tasks import rows_of
from tests.convert.models import D, L, dense_model, inputs
from tests.helpers import assert_same_model, checkpoint_activations

LABELS = {"mood": ["sad", "happy"], "score": [], "logic": ["yes", "no", "perhaps"]}
MIXED = torch.tensor([1, 0, 2, 0])
SCORES = torch.arange(float(L * D)).sin().view(L, D)


def encoder(name="bert", tasks=tuple(LABELS), dense=None, **fields):
    """With routers that are far from equal."""
    moe = convert_to_moe(dense_model(name, **dense or {}), MoEConfig.task(tasks, **fields), importance=SCORES)
    generator = torch.Generator().manual_seed(1)
    for layer in moe_layers(moe):
        layer.router.logits.data.copy_(2 * torch.randn(layer.router.logits.shape, generator=generator))
    return moe.eval()


def multi_task(name="bert-cls", **options):
    return encoder(name, LABELS, **options)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"norm": "expert"}, {"route_padding": True}, {"name": "roberta"}, {"experts": "mpo"}]
)
def test_each_sequence_of_a_mixed_batch_is_as_in_a_batch_of_its_task(options):
    if options.get("experts") == "mpo":
        options = {**options, "tasks": ["a", "b", "c"]}
    model = encoder(**options)
    batch = inputs(pad_token_id=model.config.pad_token_id)
    for layer in moe_layers(model):  # copies of one layer would be the same
        for parameter in layer.experts.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    mixed = model(**batch, task_ids=MIXED).last_hidden_state
    tasks = [model(**batch, task_ids=task).last_hidden_state for task in range(3)]
    for b, task in enumerate(MIXED):
        torch.testing.assert_close(mixed[b], tasks[task][b])
    assert not torch.allclose(tasks[0], tasks[1])


@pytest.mark.parametrize("norm", ["layer", "expert"])
def test_autocast_and_half_precision(norm):
    model, batch = multi_task(norm=norm), inputs()
    wanted = model(**batch, task_ids=2).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch, task_ids=2).logits.float(), wanted, rtol=0, atol=0.1)
    half = model.bfloat16()(**batch, task_ids=2).logits
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, rtol=0, atol=0.1)


def test_padding_changes_nothing():
    model, batch = encoder(), inputs()
    other = batch["input_ids"].where(batch["attention_mask"] != 0, 1)
    real = batch["attention_mask"] != 0
    one, two = (
        model(**batch | {"input_ids": ids}, task_ids=MIXED).last_hidden_state for ids in (batch["input_ids"], other)
    )
    assert torch.equal(one[real], two[real])


def test_a_task_can_be_set_and_is_not_needed_if_there_is_one():
    model, batch = multi_task(), inputs()
    assert get_task(model) is None
    set_task(model, "logic")
    assert get_task(model) == get_task(model.bert) == "logic"
    assert torch.equal(model(**batch).logits, model(**batch, task_ids=2).logits)
    assert torch.equal(model.bert(**batch).last_hidden_state, model.bert(**batch, task_ids=2).last_hidden_state)
    assert model(**batch, task_ids=1).logits.shape == (4, 1)
    set_task(model, None)
    with pytest.raises(
        UserError, match="task_ids: expected an id for each of mood, score, logic, or set_task before, got"
    ):
        model(**batch)
    with pytest.raises(UserError, match="task: expected one of the model's tasks, mood, score, logic, got 'mod'"):
        set_task(model, "mod")
    with pytest.raises(UserError, match=r"task: expected one of the model's tasks, none .*, got 'mood'"):
        set_task(dense_model("bert"), "mood")
    one = encoder(tasks=["only"])
    assert get_task(one) == "only" and get_task(dense_model("bert")) is None
    assert torch.equal(one(**batch).last_hidden_state, one(**batch, task_ids=0).last_hidden_state)


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (3, r"task_ids: expected ids in \[0, 3\), one for each task, got 3"),
        (-1, r"task_ids: expected ids in \[0, 3\), one for each task, got -1"),
        (torch.tensor([0, 1, 3, 0]), r"task_ids: expected ids in \[0, 3\), one for each task, got 3"),
        (torch.tensor([3, 3, 3, 3]), r"task_ids: expected ids in \[0, 3\), one for each task, got 3"),
        (torch.tensor([0, 1]), r"task_ids: expected shape \(B=4,\), got \(2,\)"),
        (torch.tensor([[0, 1, 2, 0]]), r"task_ids: expected shape \(B=4,\), got \(1, 4\)"),
        (torch.zeros(4), "task_ids: expected integers, got torch.float32"),
        ([0, 1, 2, 0], "task_ids: expected an integer or a dense tensor of integers, got list"),
        ("mood", "task_ids: expected an integer or a dense tensor of integers, got str"),
        (True, "task_ids: expected an integer or a dense tensor of integers, got bool"),
    ],
)
def test_wrong_tasks_are_refused(task_ids, message):
    for model in (encoder(), multi_task()):
        with pytest.raises(UserError, match=message):
            model(**inputs(), task_ids=task_ids)


@pytest.mark.parametrize("name", ["bert-cls", "roberta-cls"])
def test_each_task_has_its_own_head_and_loss(name):
    model = multi_task(name)
    batch = inputs(pad_token_id=model.config.pad_token_id)
    labels = {
        "mood": torch.tensor([0, 1, 1, 0]), "score": torch.tensor([0.5, 3.0, 2.0, 1.0]),
        "logic": torch.tensor([2, 0, 1, 1]),
    }  # fmt: skip
    head = model.classifier.out_proj if name == "roberta-cls" else model.classifier
    assert head.out_features == 6
    for task, (task_name, names) in enumerate(LABELS.items()):
        out = model(**batch, task_ids=task, labels=labels[task_name])
        assert out.logits.shape == (4, len(names) or 1)
        wanted = (
            F.cross_entropy(out.logits, labels[task_name]) if names else F.mse_loss(out.logits[:, 0], labels["score"])
        )
        torch.testing.assert_close(out.loss, wanted)
        loss, logits, *_ = model(**batch, task_ids=task, labels=labels[task_name], return_dict=False)
        assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
        out.loss.backward()
        rows = [row for row in range(6) if head.weight.grad[row].abs().sum() > 0]
        assert rows == list(range(6))[rows_of(model.config.quantization_config, task)]
        model.zero_grad()


def test_a_mixed_batch_gives_each_sequence_its_tasks_logits_and_loss():
    model, batch, labels = multi_task(), inputs(), torch.tensor([1.5, 1, 2, 0])
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
    assert all((layer.router.logits.grad != 0).all() for layer in moe_layers(model))


@pytest.mark.parametrize("norm", ["layer", "expert"])
def test_saves_and_loads(tmp_path, norm):
    model, batch = multi_task(norm=norm), inputs()
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.quantization_config.task_labels == LABELS
    assert_same_model(again, model, lambda model: model(**batch, task_ids=0).logits)
    alone = AutoModel.from_pretrained(tmp_path)
    assert_same_model(alone, model.bert, lambda model: model(**batch, task_ids=MIXED).last_hidden_state)


def test_a_checkpoint_of_other_tasks_is_refused(tmp_path):
    encoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["tasks"] = ["a", "b"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"encoder.layer.0.output.router.logits: expected shape \(2, 4\), got \(3, 4\)"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.slow
def test_compiles_in_one_graph():
    torch._dynamo.reset()
    model, batch = multi_task(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for task_ids in (1, MIXED):
        torch.testing.assert_close(
            compiled(**batch, task_ids=task_ids).logits, model(**batch, task_ids=task_ids).logits
        )
    torch._dynamo.reset()


def test_gradient_checkpointing_changes_nothing():
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, gradients = multi_task(dense=options).train(), []
    for checkpointing in (False, True):
        one = copy.deepcopy(model)
        if checkpointing:
            checkpoint_activations(one, {"use_reentrant": False})
        one(**inputs(), task_ids=MIXED, labels=torch.tensor([1.5, 1, 2, 0])).loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
