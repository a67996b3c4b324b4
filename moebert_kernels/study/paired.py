"""Tests of differences between models that were trained and judged in pairs: same tasks, seeds and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moebert_kernels.data.metrics import compute_metrics
from moebert_kernels.data.tasks import Task


@dataclass(frozen=True)
class Judged:
    """Predictions of a model, one run after another, on the examples of one task."""

    task: Task
    references: Sequence[Any]
    predictions: Sequence[Sequence[Any]]  # of each seed

    def score(self, seed: int, rows: np.ndarray | None = None) -> float:
        """The main metric of a run, on some of the examples."""
        metric = self.task.main_metric
        predictions: Any = np.asarray(self.predictions[seed])
        references: Any = np.asarray(self.references)
        if rows is not None:
            predictions, references = predictions[rows], references[rows]
        return compute_metrics(replace(self.task, metrics=(metric,)), predictions, references)[metric]


def paired_t(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's paired t-test; None for fewer than two pairs, or where all differ by the same.

    Pairs are tasks and seeds: runs share data and first weights, not chance. The pairs of one task are not independent
    of its examples, which `bootstrap_interval` resamples.
    """
    from scipy import stats

    rounding = 1e-9 * np.abs(differences).max(initial=0.0)  # equal counts of examples give shares that differ by it
    if len(differences) < 2 or np.ptp(differences) <= rounding:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def bootstrap_scores(judged: Mapping[str, Judged], rounds: int = 1000, seed: int = 0) -> np.ndarray:
    """(rounds,) scores, each the mean over tasks and seeds on examples drawn anew with replacement.

    The draws depend on the tasks' names and sizes alone: scores of two models on the same tasks are pairs.
    """
    scores = np.zeros((len(judged), rounds))
    for number, name in enumerate(sorted(judged)):
        one = judged[name]
        generator = np.random.default_rng([seed, number])
        for at in range(rounds):
            rows = generator.integers(len(one.references), size=len(one.references))
            scores[number, at] = np.mean([one.score(run, rows) for run in range(len(one.predictions))])
    return scores.mean(0)


def bootstrap_interval(scores: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the differences of two models' paired `bootstrap_scores`."""
    low, high = np.quantile(scores - other, [0.025, 0.975])
    return float(low), float(high)
