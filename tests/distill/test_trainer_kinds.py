"""What `MoETrainer` trains: models of each kind, several tasks at once, and Trainer's own options with experts."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
)

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill.named_objectives import make_objective
from moebert_kernels.layers import MoEConfig
from tests.distill.tiny import VOCAB, assert_same_weights, tiny_bert, weights
from tests.distill.tiny_text import tiny_gpt2, tiny_t5
from tests.distill.tiny_trainer import mostly_slow, terms_of, text_data, tiny_data, tiny_tokenizer, trainer


def bert(head, seed=0):
    torch.manual_seed(seed)
    return head(tiny_bert(seed).config)


def labelled(name):
    """Data with the labels of a kind of model."""
    data = tiny_data(16)
    rows = data["input_ids"]
    if name == "regression":
        return data.remove_columns("labels").add_column("labels", [float(row[0]) / VOCAB for row in rows])
    if name == "questions":
        spans = {"start_positions": [0] * 16, "end_positions": [len(row) - 1 for row in rows]}
        return Dataset.from_dict({**data.remove_columns("labels").to_dict(), **spans})
    if name == "tokens":
        return Dataset.from_dict({**data.to_dict(), "labels": [[token % 3 for token in row] for row in rows]})
    if name == "text to text":
        rows = [[token % 40 for token in row] for row in rows]
        return Dataset.from_dict(
            {**data.to_dict(), "input_ids": rows, "labels": [[token % 5 + 3, 1] for token in range(16)]}
        )
    return text_data(16) if name == "causal" else data


KINDS = {  # what it predicts -> a model by its seed, the objective, and what collates
    "classes": (tiny_bert, "layerwise", None),
    "regression": (lambda seed: tiny_bert(seed, num_labels=1), "layerwise", None),
    "questions": (lambda seed: tiny_bert(seed, qa=True), "layerwise", None),
    "tokens": (lambda seed: bert(BertForTokenClassification, seed), "tokens", DataCollatorForTokenClassification),
    "masked": (
        lambda seed: bert(BertForMaskedLM, seed), "tokens",
        lambda tokenizer: DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5),
    ),
    "causal": (lambda seed: tiny_gpt2(seed), "tokens", DataCollatorForTokenClassification),
    "text to text": (lambda seed: tiny_t5(seed), "tokens", DataCollatorForSeq2Seq),
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(KINDS, {"questions", "masked"}))
def test_a_converted_model_of_each_kind_follows_its_teacher(name, tmp_path):
    make, objective, collate = KINDS[name]
    teacher, experts = make(1), {"experts": "copy", "num_experts": 2}
    student = convert_to_moe(make(0), MoEConfig(**experts))
    data = labelled(name)
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "2"
    run = trainer(
        tmp_path, student, data, teacher=teacher, objective=make_objective(objective, None, student, teacher),
        num_train_epochs=5, learning_rate=1e-2,
    )  # fmt: skip
    run.processing_class = tokenizer
    if collate is not None:
        run.data_collator = collate(tokenizer)
    run.train()
    losses = terms_of(run, "loss")
    assert losses[-1] < losses[0] and terms_of(run, "prediction") and terms_of(run, "task")
    judged = run.evaluate(data)
    assert 0 < judged["eval_loss"] < 10


def test_questions_without_positions_are_judged_by_the_objective(tmp_path):
    """As validation data of SQuAD has none; start and end are the predictions."""
    make, objective, _ = KINDS["questions"]
    student, teacher, data = make(0), make(1), tiny_data(9, labels=False)
    run = trainer(tmp_path, student, data, teacher=teacher, objective=make_objective(objective, None, student))
    judged = run.predict(data)
    with torch.no_grad():
        alone = student(input_ids=torch.tensor([data["input_ids"][0]]))
    length = len(data["input_ids"][0])
    for predicted, logits in zip(judged.predictions, (alone.start_logits, alone.end_logits), strict=True):
        assert len(predicted) == 9
        torch.testing.assert_close(torch.tensor(predicted[0, :length]), logits[0], rtol=0, atol=1e-5)
    assert run.evaluate(data)["eval_loss"] > 0 and "test_loss" not in judged.metrics


def test_several_tasks_are_trained_in_mixed_batches(tmp_path):
    """A model that routes by task, with a head for each; the third class of the one is none of the other."""
    tasks = {"three": ["a", "b", "c"], "two": ["no", "yes"]}
    student = convert_to_moe(tiny_bert(0), MoEConfig.task(tasks), importance=torch.rand(2, 32))
    data = tiny_data(24)
    ids = [n % 2 for n in range(24)]
    labels = [label % (3 - task) for label, task in zip(data["labels"], ids, strict=True)]
    data = Dataset.from_dict({**data.to_dict(), "labels": labels, "task_ids": ids})
    run = trainer(tmp_path, student, data, num_train_epochs=12, learning_rate=1e-2)
    run.compute_metrics = lambda given: {"right": float((given.predictions.argmax(-1) == given.label_ids).mean())}
    before = run.evaluate(data)["eval_right"]
    run.train()
    assert terms_of(run, "task")[-1] < 0.8 * terms_of(run, "task")[0]
    assert run.evaluate(data)["eval_right"] > max(before, 0.6)


def test_the_best_model_is_loaded_at_the_end_and_from_its_folder(tmp_path):
    student = convert_to_moe(tiny_bert(0), MoEConfig.moebert(), importance=torch.rand(2, 32))
    run = trainer(
        tmp_path, student, num_train_epochs=4, learning_rate=0.05, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
        judged_on=tiny_data(12, seed=8),
    )  # fmt: skip
    run.train()
    losses = terms_of(run, "eval_loss")
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    best = AutoModelForSequenceClassification.from_pretrained(run.state.best_model_checkpoint)
    assert_same_weights(best, weights(run.model))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bfloat16", "recomputed"])
def test_trainers_own_options_train_the_same_model(options, tmp_path):
    ended = []
    for given in ({}, options):
        torch.manual_seed(1)
        config = MoEConfig.moebert(router="gate-token", load_balance=0.5)
        student = convert_to_moe(tiny_bert(0), config, importance=torch.rand(2, 32))
        run = trainer(
            tmp_path, student, teacher=tiny_bert(1), objective=make_objective("layerwise", None, student), **given,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        run.train()
        ended.append(terms_of(run, "loss"))
    assert ended[1] == pytest.approx(ended[0], rel=0.05 if "bf16" in options else 1e-5)
