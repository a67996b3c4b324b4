"""Metrics: GLUE's against their definitions, SQuAD's against the cases its official script is known for."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moebert_kernels.data.metrics import (
    Window,
    answers_from_spans,
    compute_metrics,
    normalize_answer,
    squad_metrics,
    standard_error,
)
from moebert_kernels.data.tasks import TASKS, custom_task


def test_glue_classification():
    predictions, references = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]  # 2 true, 1 false positives; 1 true, 1 false negatives
    accuracy, f1 = 3 / 5, 2 * 2 / (2 * 2 + 1 + 1)
    matthews = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert compute_metrics(TASKS["sst2"], predictions, references) == {"accuracy": accuracy}
    assert compute_metrics(TASKS["qqp"], predictions, references) == pytest.approx({"f1": f1, "accuracy": accuracy})
    assert compute_metrics(TASKS["cola"], predictions, references)["matthews"] == pytest.approx(matthews)


def test_f1_is_of_the_tasks_second_class_whatever_number_it_has():
    predictions, references = [1, 1, 0, 0, 1], [1, 0, 0, 0, 1]
    turned = replace(TASKS["mrpc"], label_names=TASKS["mrpc"].label_names[::-1])
    others = compute_metrics(turned, [1 - p for p in predictions], [1 - r for r in references])
    assert others == compute_metrics(TASKS["mrpc"], predictions, references)
    turned = replace(turned, label_names=("Equivalent", "Not_Equivalent"))
    assert others == compute_metrics(turned, [1 - p for p in predictions], [1 - r for r in references])


def test_regression():
    predictions = [1.0, 2.0, 4.0, 3.5]
    metrics = compute_metrics(TASKS["stsb"], predictions, [1.0, 2.0, 3.0, 4.0])
    assert metrics["pearson"] == pytest.approx(np.corrcoef(predictions, [1, 2, 3, 4])[0, 1])
    assert metrics["spearman"] == pytest.approx(0.8)  # ranks 1 2 4 3: 1 - 6 * 2 / (4 * 15)
    assert compute_metrics(TASKS["stsb"], [2.0] * 4, [1.0, 2.0, 3.0, 4.0]) == {"spearman": 0.0, "pearson": 0.0}


def test_macro_f1_of_a_table_of_ones_own():
    task = replace(custom_task(["text"]), label_names=("a", "b", "c"))
    metrics = compute_metrics(task, [0, 1, 1], [0, 1, 2])
    assert metrics == pytest.approx({"accuracy": 2 / 3, "macro_f1": (1 + 2 / 3 + 0) / 3})


def test_every_task_has_its_main_metric():
    for task in TASKS.values():
        assert task.main_metric == task.metrics[0]


def test_rejects_lists_of_different_lengths():
    with pytest.raises(ValueError, match="predictions: expected as many as references and at least one, got 1 and 2"):
        compute_metrics(TASKS["sst2"], [1], [1, 0])


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Cat!", "cat"), ("an apple a day", "apple day"), ("U.S.", "us"), ("A", ""), ("theory", "theory")],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


def test_squad_takes_the_best_answer():
    metrics = squad_metrics(["the red cat", "blue"], [["dog", "Red cat."], ["blue sky over"]], with_no_answer=False)
    assert metrics == pytest.approx({"exact_match": 0.5, "f1": (1 + 2 / 4) / 2})


def test_squad_counts_repeated_words_once_each():
    assert squad_metrics(["b b c"], [["b c c"]], with_no_answer=False)["f1"] == pytest.approx(2 / 3)


def test_squad_v2_judges_no_answer():
    metrics = squad_metrics(["", "guess", "paris"], [[], [], ["Paris"]], with_no_answer=True)
    assert metrics["exact_match"] == metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["f1_answerable"] == 1.0
    assert metrics["f1_no_answer"] == 0.5


def window(row, context_tokens, question_tokens=2):
    """[CLS] and a question, then tokens of four characters each."""
    inside = [[4 * i, 4 * i + 3] for i in context_tokens]
    return Window(row, np.array([[-1, -1]] * question_tokens + inside, dtype=np.int32))


def logits(length, **at):
    values = np.zeros(length, dtype=np.float32)
    for place, value in at.items():
        values[int(place[1:])] = value
    return values


def test_the_best_span_over_all_windows_is_the_answer():
    context = "aaa bbb ccc ddd eee"
    windows = [window(0, range(3)), window(0, range(2, 5))]
    starts = [logits(5, _3=2.0), logits(5, _2=5.0, _1=9.0)]  # position 1 is the question's
    ends = [logits(5, _4=2.0), logits(5, _3=4.0)]
    assert answers_from_spans(windows, starts, ends, [context], may_have_no_answer=False) == ["ccc ddd"]


def test_a_span_never_ends_before_it_starts():
    answer = answers_from_spans(
        [window(0, range(3))], [logits(5, _4=5.0)], [logits(5, _2=5.0)], ["aaa bbb ccc"], may_have_no_answer=False
    )
    assert answer[0] in ("ccc", "aaa")


def test_no_answer_is_given_where_every_window_says_so():
    windows = [window(0, range(3)), window(0, range(2, 5)), window(1, range(3))]
    certain, unsure = logits(5, _0=9.0), logits(5, _0=1.0, _2=3.0)
    spans = [certain, unsure, certain]
    answers = answers_from_spans(windows, spans, spans, ["aaa bbb ccc ddd eee"] * 2, may_have_no_answer=True)
    assert answers == ["ccc", ""]


def test_standard_error():
    assert standard_error(0.9, 900) == pytest.approx(0.01)
