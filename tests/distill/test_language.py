"""Causal language models: windows of running text, losses per token, perplexity."""

import math
from itertools import pairwise

import pytest
import torch

from moebert_kernels.convert.sample_loss import is_causal
from moebert_kernels.data.tasks import get_task, load_task
from moebert_kernels.distill import TokenObjective
from moebert_kernels.distill.evaluation import Evaluator
from moebert_kernels.distill.objectives import batch_weight, task_loss
from moebert_kernels.errors import UserError
from tests.distill.tiny import tiny_bert
from tests.distill.tiny_run import assert_same_tensors, interrupt, run, saved_weights
from tests.distill.tiny_text import STORY, byte_tokenizer, story, tiny_gpt2, tiny_t5
from tests.distill.tiny_trainer import trainer


@pytest.mark.parametrize(("length", "overlap"), [(8, 1), (8, 4), (8, 7), (5, 2), (16, 1), (1000, 1)])
def test_every_token_is_a_label_once_and_none_is_lost(length, overlap):
    columns, tokenizer = story(length, overlap).columns, byte_tokenizer()
    labels = [pair for ids, row in zip(columns["input_ids"], columns["labels"], strict=True)
              for pair in zip(ids, row, strict=True)]  # fmt: skip
    assert all(label in (-100, token) for token, label in labels)
    stream = [label for _, label in labels if label != -100]
    assert tokenizer.decode(stream[1:]) == STORY and stream[0] == tokenizer.bos_token_id
    assert max(columns["length"]) <= length
    for earlier, later in pairwise(columns["input_ids"]):
        assert earlier[-overlap:] == later[:overlap]


def test_documents_start_with_a_token_of_their_own():
    split, tokenizer = story(1000, documents=("the sea", "", "was cold")), byte_tokenizer()
    start = tokenizer.bos_token_id
    the_sea, was_cold = tokenizer(["the sea", "was cold"])["input_ids"]
    assert split.columns[0]["input_ids"] == [start, *the_sea, start, start, *was_cold]


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="doc_stride: expected between 1 and 7 tokens in windows of 8, got 8"):
        story(8, 8)
    with pytest.raises(UserError, match="data: expected text of at least two tokens, got none"):
        story(8, documents=())


def test_causal_models_are_known():
    assert is_causal(tiny_gpt2())
    assert not is_causal(tiny_bert()) and not is_causal(tiny_t5())


def test_loss_is_the_models_own_over_a_batch_without_padding():
    batch, model = story().collate([0, 1, 2]), tiny_gpt2()
    outputs = model(input_ids=batch["input_ids"], labels=batch["labels"])
    torch.testing.assert_close(task_loss(outputs, batch, 0.0, causal=True), outputs.loss)
    smooth = task_loss(outputs, batch, 0.0, causal=True, label_smoothing=0.1)
    log_p = outputs.logits[:, :-1].log_softmax(-1).flatten(0, 1)
    expected = 0.9 * outputs.loss - 0.1 * log_p.mean()
    torch.testing.assert_close(smooth, expected)


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    split = story()
    judging = {"evaluate": Evaluator(split), "best_metric": "perplexity", "greater_is_better": False}
    options = {"train": split, "settings": {"learning_rate": 1e-2, "gradient_accumulation_steps": 2}, **judging}
    run(tmp_path / "whole", tiny_gpt2(dropout=0.2), **options)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, 3)
        run(tmp_path / "stopped", tiny_gpt2(dropout=0.2), **options)
    run(tmp_path / "stopped", tiny_gpt2(dropout=0.2), **options)
    assert_same_tensors(saved_weights(tmp_path / "whole/best"), saved_weights(tmp_path / "stopped/best"))


def test_an_update_without_labels_is_refused(tmp_path):
    split = story()
    data = split.columns.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(UserError, match="labels: expected at least one in an optimizer step, got none after 0"):
        run = trainer(tmp_path, tiny_gpt2(), data)
        run.data_collator = split.collator
        run.train()
    with pytest.raises(UserError, match="labels: expected in each batch for the task's loss, got none"):
        batch_weight({}, causal=True)


def test_perplexity_is_over_all_tokens_and_decides(tmp_path):
    split, model = story(8, 4), tiny_gpt2(dropout=0.1)
    judge = Evaluator(split, batch_size=3)
    total = count = 0
    with torch.no_grad():
        for ids, labels in zip(split.columns["input_ids"], split.columns["labels"], strict=True):
            logits = model.eval()(input_ids=torch.tensor(ids)[None].long()).logits[0].double().log_softmax(-1)
            for position in range(1, len(ids)):
                if labels[position] != -100:
                    total, count = total - float(logits[position - 1, labels[position]]), count + 1
    model.train()
    metrics = judge(model)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
    assert model.training

    task = get_task("lm")
    assert (task.main_metric, task.greater_is_better, get_task("sst2").greater_is_better) == ("perplexity", False, True)
    judging = {"evaluate": judge, "best_metric": task.main_metric, "greater_is_better": task.greater_is_better}
    result = run(
        tmp_path, model, train=split, settings={"num_train_epochs": 6, "learning_rate": 1e-2}, **judging
    )  # fmt: skip
    assert result.best_metrics["perplexity"] == min(entry["metrics"]["perplexity"] for entry in result.history)
    assert result.best_metrics["perplexity"] < metrics["perplexity"] / 2


def test_text_files_are_documents_and_tables_have_a_column(tmp_path):
    (tmp_path / "train.txt").write_text(STORY)
    (tmp_path / "valid.jsonl").write_text('{"text": "the sea"}\n{"text": "was\\tcold"}\n')
    data = load_task("lm", tmp_path)
    assert data.train["text"] == [STORY] and data.validation["text"] == ["the sea", "was\tcold"]
    (tmp_path / "test.txt").write_text("")
    with pytest.raises(UserError, match=r"data: expected rows in .*test.txt, got none"):
        load_task("lm", tmp_path)


def test_token_objective_is_zero_for_the_teacher_itself_and_checks_the_two(tmp_path):
    batch, model, objective = story().collate([0, 1]), tiny_gpt2(), TokenObjective(causal=True)
    outputs = model(input_ids=batch["input_ids"])
    assert objective(outputs, outputs, batch)["prediction"].abs() < 1e-7
    other = tiny_gpt2(1)(input_ids=batch["input_ids"])
    p, q = (o.logits[:, :-1].log_softmax(-1) for o in (outputs, other))
    expected = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    torch.testing.assert_close(objective(outputs, other, batch)["prediction"], expected)
    with pytest.raises(UserError, match="vocab_size: expected the teacher's 300, got 280"):
        trainer(tmp_path, model, teacher=tiny_gpt2(vocab_size=300), objective=objective)
    with pytest.raises(UserError, match="causal: expected True for a GPT2LMHeadModel, got False"):
        trainer(tmp_path, model, teacher=tiny_gpt2(1), objective=TokenObjective(False))
    with pytest.raises(
        UserError, match="objective: expected a model that predicts something of each token, got a Bert"
    ):
        trainer(tmp_path, tiny_bert(0), teacher=tiny_bert(1), objective=TokenObjective(False))
