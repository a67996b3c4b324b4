"""What the experiments make of their results, on made-up ones."""

import importlib.util

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def minilm_reviews():
    spec = importlib.util.spec_from_file_location("minilm_reviews", ROOT / "experiments" / "minilm_reviews.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(names, shift):
    return {
        name: {
            "name": name, "accuracy": 0.8 + 0.01 * shift - 0.01 * i, "accuracy_before": 0.7,
            "accuracy_last": 0.8, "standard_error": 0.01,
            "total_parameters": 10**6, "active_parameters": 10**6, "seconds": 1.0, "correct": "1100"[: 4 - i % 2],
        }
        | ({"correct": "1" * (4 - i % 2) + "0" * (i % 2)})
        for i, name in enumerate(names)
    }  # fmt: skip


def test_report_over_seeds(minilm_reviews, tmp_path):
    seeds = {seed: results(minilm_reviews.NAMES, seed) for seed in (0, 1, 2)}
    times = {name: {"ffn_ms": 1.0, "model_ms": 2.0} for name in minilm_reviews.NAMES}

    report = minilm_reviews.report_of(seeds, times)
    text = minilm_reviews.table(report)
    minilm_reviews.draw(report, tmp_path / "chart.png")

    assert report["models"]["teacher"]["accuracy"]["mean"] == pytest.approx(0.81)
    assert report["models"]["teacher"]["accuracy"]["sd"] == pytest.approx(0.01)
    assert set(report["moe_minus_dense"]) == {"384", "192"}
    assert "| MoE student, 384 | 70.0 ± 0.0 | 80.0 ± 1.0 |" in text
    assert (tmp_path / "chart.png").stat().st_size > 1000
    assert all("correct" not in run for runs in report["seeds"].values() for run in runs)
