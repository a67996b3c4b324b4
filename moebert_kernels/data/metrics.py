"""How predictions are judged: GLUE's metrics, and SQuAD's exact match and F1 as its official script computes them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebert_kernels.data.tasks import TASKS, Task

Metrics = dict[str, float]  # by name
N_BEST = 20
MAX_ANSWER_TOKENS = 30
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True)
class Window:
    """One question on one window of a context."""

    row: int  # of the split
    offsets: np.ndarray  # (tokens, 2) int32, characters of the context; -1 where the token is not of the context


def compute_metrics(task: Task, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """The task's metrics, each a share between 0 and 1 (correlations: between -1 and 1).

    Args:
        predictions: class numbers, scores, or answer texts ("" for no answer).
        references: class numbers, scores, or for each question its list of right answers ([] for none).

    Raises:
        ValueError: of different numbers, or none.
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(f"predictions: expected as many as references and at least one, got {len(predictions)} and"
                         f" {len(references)}")  # fmt: skip
    if task.kind == "qa":
        return squad_metrics(predictions, references, with_no_answer=task.name != "squad")
    answers, labels = np.asarray(predictions), np.asarray(references)
    known = TASKS.get(task.name)
    names = tuple(name.lower() for name in task.label_names)
    if known is not None and "f1" in known.metrics and names == known.label_names[::-1]:
        # a model's order of the classes; the score is of the task's second one
        answers, labels = 1 - answers, 1 - labels
    return {name: _metric(name, answers, labels) for name in task.metrics}


_OF_SCIKIT_LEARN: dict[str, tuple[str, dict[str, Any]]] = {
    "matthews": ("matthews_corrcoef", {}),
    "f1": ("f1_score", {"zero_division": 0.0}),
    "macro_f1": ("f1_score", {"zero_division": 0.0, "average": "macro"}),
}


def _metric(name: str, predictions: np.ndarray, references: np.ndarray) -> float:
    if name == "accuracy":  # a bootstrap asks for it many thousand times
        return float((predictions == references).mean())
    if name in _OF_SCIKIT_LEARN:
        from sklearn import metrics

        function, options = _OF_SCIKIT_LEARN[name]
        return float(getattr(metrics, function)(references, predictions, **options))
    from scipy import stats

    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0  # undefined; a model that says one value for all has learned nothing
    return float(getattr(stats, f"{name}r")(predictions, references).statistic)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _answer_f1(prediction: str, answer: str, with_no_answer: bool) -> float:
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if with_no_answer and not (predicted and wanted):
        return float(predicted == wanted)
    same = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * same / (len(predicted) + len(wanted)) if same else 0.0


def squad_metrics(
    predictions: Sequence[str], references: Sequence[Sequence[str]], with_no_answer: bool
) -> dict[str, float]:
    """Exact match and F1, each the best over a question's right answers, averaged over questions.

    `with_no_answer` is the rule of v2: a question without an answer is right if none was given, and the two kinds of
    questions are also reported alone.
    """
    exact, f1, answerable = [], [], []
    for prediction, answers in zip(predictions, references, strict=True):
        if with_no_answer:
            answers = [answer for answer in answers if normalize_answer(answer)] or [""]
        exact.append(max((float(normalize_answer(prediction) == normalize_answer(a)) for a in answers), default=0.0))
        f1.append(max((_answer_f1(prediction, a, with_no_answer) for a in answers), default=0.0))
        answerable.append(any(answers))
    result = {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}
    if with_no_answer and len(set(answerable)) == 2:
        kind = np.array(answerable)
        for name, values in (("f1", np.array(f1)), ("exact_match", np.array(exact))):
            result |= {
                f"{name}_answerable": float(values[kind].mean()),
                f"{name}_no_answer": float(values[~kind].mean()),
            }
    return result


def answers_from_spans(
    windows: Sequence[Window],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    contexts: Sequence[str],
    *,
    may_have_no_answer: bool,
) -> list[str]:
    """The best span of each context over all its windows.

    Args:
        windows: of all contexts; `start_logits` and `end_logits` belong to them, each (tokens,).
        contexts: the text of each row.
        may_have_no_answer: the rule of v2: "" where the score of the first position, the lowest over the windows, is
            ahead of the best span's.

    Returns:
        an answer for each context, "" for none.
    """
    best: dict[int, tuple[float, str]] = {}
    nothing: dict[int, float] = {}
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        row = window.row
        nothing[row] = min(nothing.get(row, float("inf")), float(starts[0] + ends[0]))
        score, span = _best_span(window.offsets, starts, ends)
        if span is not None and score > best.get(row, (-float("inf"), ""))[0]:
            best[row] = (score, contexts[row][span[0] : span[1]])
    answers = []
    for row in range(len(contexts)):
        score, text = best.get(row, (-float("inf"), ""))
        if may_have_no_answer and nothing.get(row, float("inf")) > score:
            text = ""
        answers.append(text)
    return answers


def _best_span(offsets: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[float, tuple[int, int] | None]:
    """Score and characters of the best pair among the `N_BEST` starts and ends of a window."""
    in_context = offsets[:, 0] >= 0
    first = [i for i in np.argsort(-starts, kind="stable")[:N_BEST] if in_context[i]]
    last = [i for i in np.argsort(-ends, kind="stable")[:N_BEST] if in_context[i]]
    pairs = [(float(starts[i] + ends[j]), i, j) for i in first for j in last if i <= j < i + MAX_ANSWER_TOKENS]
    if not pairs:
        return -float("inf"), None
    score, i, j = max(pairs, key=lambda pair: pair[0])
    return score, (int(offsets[i, 0]), int(offsets[j, 1]))


def standard_error(accuracy: float, examples: int) -> float:
    """Of an accuracy measured on so many independent examples: the binomial one."""
    return float(np.sqrt(accuracy * (1.0 - accuracy) / examples))
