"""Causal language models through the loop: windows of running text, losses per token, perplexity."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from moebert_kernels.data.tasks import get_task, load_task
from moebert_kernels.distill import FitConfig, TokenObjective, fit
from moebert_kernels.distill.features import Batches, Features
from moebert_kernels.distill.language import PerplexityEvaluator
from moebert_kernels.distill.objectives import batch_weight, is_causal, task_loss
from moebert_kernels.errors import UserError
from tests.distill.tiny import Interrupting, assert_same_weights, log, tiny_bert, weights
from tests.distill.tiny_text import STORY, byte_tokenizer, story, tiny_gpt2, tiny_t5


@pytest.mark.parametrize(("length", "overlap"), [(8, 1), (8, 4), (8, 7), (5, 2), (16, 1), (1000, 1)])
def test_every_token_is_a_label_once_and_none_is_lost(length, overlap):
    features, tokenizer = story(length, overlap), byte_tokenizer()
    labels = [pair for ids, row in zip(features.input_ids, features.token_targets["labels"], strict=True)
              for pair in zip(ids, row, strict=True)]  # fmt: skip
    assert all(label in (-100, token) for token, label in labels)
    stream = [label for _, label in labels if label != -100]
    assert tokenizer.decode(stream[1:]) == STORY and stream[0] == tokenizer.bos_token_id
    assert max(len(ids) for ids in features.input_ids) <= length
    for earlier, later in pairwise(features.input_ids):
        np.testing.assert_array_equal(earlier[-overlap:], later[:overlap])


def test_documents_start_with_a_token_of_their_own():
    features, tokenizer = story(1000, documents=("the sea", "", "was cold")), byte_tokenizer()
    start = tokenizer.bos_token_id
    the_sea, was_cold = tokenizer(["the sea", "was cold"])["input_ids"]
    assert features.input_ids[0].tolist() == [start, *the_sea, start, start, *was_cold]


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="overlap: expected between 1 and 7 tokens in windows of 8, got 8"):
        story(8, 8)
    with pytest.raises(UserError, match="data: expected text of at least two tokens, got 0"):
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


class Windows(Batches):
    """Windows in batches of given sizes, in order."""

    def __init__(self, features: Features, sizes):
        super().__init__(features, sizes[0])
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def order(self, epoch):
        return np.split(np.arange(len(self.features)), np.cumsum(self.sizes)[:-1])


@pytest.mark.parametrize("distilled", [False, True])
def test_accumulation_equals_the_large_batch(tmp_path, distilled):
    """Windows of different numbers of labels, in micro-batches of uneven sizes."""
    features = story(8, 3)
    for window, (labels, ids) in enumerate(
        zip(features.token_targets["labels"], features.input_ids, strict=True)
    ):  # fewer labels in some windows than in others, and none in one
        labels[: window % len(ids)] = -100
    features.token_targets["labels"][2][:] = -100
    count = len(features)
    ends = []
    for name, sizes, accumulation in (("large", [count], 1), ("small", [1, 4, 1, 1, count - 7], 5)):
        student = tiny_gpt2()
        more = {"objective": TokenObjective(causal=True), "teacher": tiny_gpt2(1)} if distilled else {}
        config = FitConfig(epochs=4, learning_rate=1e-3, accumulation=accumulation, log_steps=1, adam_eps=1e-5)
        fit(student, Windows(features, sizes), config=config, output_dir=tmp_path / name, **more)
        ends.append((student, log(tmp_path / name, "loss")))
    assert_same_weights(ends[0][0], weights(ends[1][0]), tolerance=1e-6)
    for large, small in zip(ends[0][1], ends[1][1], strict=True):
        assert large == pytest.approx(small, rel=1e-5)
    assert ("prediction" in ends[0][1][0]) == distilled


class InterruptedBatches(Interrupting, Batches):
    pass


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    features = story()
    config = FitConfig(epochs=3, learning_rate=1e-2, accumulation=2, greater_is_better=False, best_metric="perplexity")
    options = {"config": config, "evaluate": PerplexityEvaluator(features)}
    fit(tiny_gpt2(dropout=0.2), Batches(features, 3), output_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_gpt2(dropout=0.2), InterruptedBatches(features, 3), output_dir=tmp_path / "stopped", **options)
    fit(tiny_gpt2(1, dropout=0.2), Batches(features, 3), output_dir=tmp_path / "stopped", **options)
    for name in ("final/model.safetensors", "best/model.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_an_update_without_labels_is_refused(tmp_path):
    features = story()
    for labels in features.token_targets["labels"]:
        labels[:] = -100
    with pytest.raises(UserError, match="labels: expected at least one in an optimizer step, got none after step 0"):
        fit(tiny_gpt2(), Batches(features, 4), config=FitConfig(), output_dir=tmp_path)
    with pytest.raises(UserError, match="labels: expected in each batch for the task's loss, got none"):
        batch_weight({}, causal=True)


def test_perplexity_is_over_all_tokens_and_decides(tmp_path):
    features, model = story(8, 4), tiny_gpt2(dropout=0.1)
    judge = PerplexityEvaluator(features, batch_size=3)
    total = count = 0
    with torch.no_grad():
        for ids, labels in zip(features.input_ids, features.token_targets["labels"], strict=True):
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
    config = FitConfig(
        epochs=6, learning_rate=1e-2, best_metric=task.main_metric, greater_is_better=task.greater_is_better
    )
    result = fit(model, Batches(features, 4), config=config, output_dir=tmp_path, evaluate=judge)
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
        fit(model, Batches(story(), 4), config=FitConfig(), output_dir=tmp_path, objective=objective,
            teacher=tiny_gpt2(vocab_size=300))  # fmt: skip
    with pytest.raises(UserError, match="causal: expected True for a GPT2LMHeadModel, got False"):
        fit(model, Batches(story(), 4), config=FitConfig(), output_dir=tmp_path, objective=TokenObjective(False),
            teacher=tiny_gpt2(1))  # fmt: skip
