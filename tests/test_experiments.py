"""What the experiments make of their results, on made-up ones and on tiny ones."""

import importlib.util
import sys

import pytest

from tests.helpers import ROOT


def experiment(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def minilm_reviews():
    return experiment("minilm_reviews")


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


@pytest.fixture(scope="module")
def wikitext_mpoe():
    return experiment("wikitext_mpoe")


def test_wikitext_mpoe_at_tiny_size(wikitext_mpoe, tmp_path, monkeypatch, capsys):
    """Two processes' worth of work: the base model and one arm, then the rest, then only the report."""
    for name, lines in (("valid", 60), ("test", 20)):
        (tmp_path / f"{name}.txt").write_text(
            "".join(f"line {n} of a story about {n % 7} bears \n" for n in range(lines))
        )
    options = {
        "hidden-size": 16,
        "layers": 1,
        "heads": 2,
        "vocab-size": 270,
        "block": 32,
        "base-epochs": 1,
        "epochs": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def run(*more):
        command = ["wikitext_mpoe.py", "--data", tmp_path, "--work", tmp_path / "work", "--output", tmp_path / "out"]
        monkeypatch.setattr("sys.argv", [str(word) for word in (*command, "--seeds", 3, *words, *more)])
        wikitext_mpoe.main()
        return capsys.readouterr().out

    assert "no arm is complete yet" in run("--models", "mpoe-mask-0.5")
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out/runs").iterdir()}
    assert set(files) == {"base.json", "seed-3-mpoe-mask-0.5.json"}
    text = run()
    assert all((tmp_path / "out/runs" / name).stat().st_mtime_ns == time for name, time in files.items())
    assert (tmp_path / "out/table.md").read_text() in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + len(wikitext_mpoe.NAMES)
    assert (tmp_path / "out/chart.png").stat().st_size > 1000
    assert wikitext_mpoe.spread([1.0, 3.0], "+") == "+2.00 ± 1.41"


def test_wikitext_mpoe_divides_the_text(wikitext_mpoe, tmp_path):
    (tmp_path / "valid.txt").write_text("".join(f"{n}\n" for n in range(25)))
    (tmp_path / "test.txt").write_text("test\n")
    parts = wikitext_mpoe.read_parts(tmp_path)
    assert parts["train"].split() == [str(n) for n in range(22)] and parts["validation"].split() == ["22", "23", "24"]
    assert parts["train"] + parts["validation"] == (tmp_path / "valid.txt").read_text()
    (tmp_path / "train.txt").write_text("train\n")
    assert wikitext_mpoe.read_parts(tmp_path)["train"] == "train\n"
    (tmp_path / "test.txt").unlink()
    with pytest.raises(SystemExit, match="data: expected a test text in "):
        wikitext_mpoe.read_parts(tmp_path)
