"""The demo on a tiny model and tiny data: it ends with its table, its files and models that load, and it resumes."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

import moebert_kernels.convert  # noqa: F401 - makes AutoModel* know converted models
from moebert_kernels.bench import clocks
from moebert_kernels.demo import run
from moebert_kernels.demo.report import difference, text_table
from moebert_kernels.demo.study import Recipe, Study
from moebert_kernels.errors import UserError
from tests.distill.words import tokenizer_of

WORDS = ("good", "bad", "the", "a", "film", "play", "book", "is", "was", "very", "not")
RECIPE = Recipe(finetune_epochs=1, distill_epochs=1, learning_rate=3e-3, batch_size=8, max_length=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = tokenizer_of(WORDS)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=1536,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_reviews(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate((("train", 48), ("validation", 16), ("test", 24))):
        generator = torch.Generator().manual_seed(number)
        draws = torch.randint(6, (rows, 4), generator=generator).tolist()
        lines = [
            f"{i}\t{WORDS[2 + a % 2]} {WORDS[4 + b % 3]} {WORDS[7 + a // 3]} {'very ' * (v % 2)}{WORDS[1 - y % 2]}"
            f"\t{('negative', 'positive')[y % 2]}"
            for i, (v, y, a, b) in enumerate(draws)
        ]
        (folder / f"{split}.tsv").write_text("\n".join(["id\tsentence\tlabel", *lines]))
    return folder


@pytest.fixture
def tiny_demo(base, monkeypatch):
    monkeypatch.setattr(run, "base_model", lambda: base)
    monkeypatch.setattr(run, "movie_reviews", write_reviews)
    monkeypatch.setattr(run, "QUICK", RECIPE)
    monkeypatch.setattr(run, "TIMED_SHAPE", (2, 16))
    # the thread's own time, which other programs do not lengthen
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=time.thread_time))


def test_demo(tiny_demo, tmp_path, capsys):
    run.run_demo(tmp_path / "demo", quick=True)

    printed = capsys.readouterr().out
    for words in ("teacher (dense)", "MoE student, 384", "dense of the same FLOPs, 384", "report.json", "chart.png"):
        assert words in printed
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert (tmp_path / "demo" / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert report["test_examples"] == 24
    assert [result["name"] for result in report["results"]] == ["teacher", "moe-384", "dense-384"]
    for result in report["results"]:
        assert 0 <= result["accuracy"] <= 1
        assert 0 < result["ffn_ms"] < result["model_ms"]
        model = AutoModelForSequenceClassification.from_pretrained(result["path"])
        assert model.config.id2label == {0: "negative", 1: "positive"}
        assert len(AutoTokenizer.from_pretrained(result["path"])) == 16
    teacher, moe, dense = report["results"]
    assert moe["active_parameters"] < teacher["active_parameters"]
    assert 0 <= moe["active_parameters"] - dense["active_parameters"] < 4 * 16 * 16  # the MoE's extra norms and b2
    assert not [path for name in ("teacher-outputs", "choice") for path in (tmp_path / "demo").rglob(name)]

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    run.run_demo(tmp_path / "demo", quick=True)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert [result["accuracy"] for result in again["results"]] == [result["accuracy"] for result in report["results"]]


def test_an_interrupted_demo_goes_on(tiny_demo, tmp_path, monkeypatch):
    """Whatever the step, the second call ends with the weights of an undisturbed one."""
    run.run_demo(tmp_path / "whole", quick=True)
    convert, calls = run.Study._make_student, []

    def interrupted(self, name, *rest):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return convert(self, name, *rest)

    monkeypatch.setattr(run.Study, "_make_student", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_demo(tmp_path / "cut", quick=True)
    run.run_demo(tmp_path / "cut", quick=True)

    assert calls == ["moe-384", "dense-384", "dense-384"]
    for file in (tmp_path / "whole").rglob("*/best/model.safetensors"):
        assert (tmp_path / "cut" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()


def test_a_folder_of_another_recipe_is_refused(base, tmp_path):
    data = write_reviews(tmp_path / "data")
    Study(tmp_path / "study", base, data, RECIPE, seed=0)
    with pytest.raises(UserError, match=r"got .*study with results of other seed \(it was 0 and is 1 now\) \(use"):
        Study(tmp_path / "study", base, data, RECIPE, seed=1)
    for split in ("validation", "test"):
        file = data / f"{split}.tsv"
        rows = file.read_text()
        file.write_text(rows[: rows.rstrip("\n").rindex("\n") + 1])
        with pytest.raises(UserError, match=f"with results of other {split} rows"):
            Study(tmp_path / "study", base, data, RECIPE, seed=0)
        file.write_text(rows)


def test_difference_is_paired():
    first, second = {"correct": "1101"}, {"correct": "1000"}
    result = difference(first, second)
    assert result["difference"] == 0.5
    assert result["standard_error"] == pytest.approx((0.25 / 4) ** 0.5)


def test_text_table():
    common = {"standard_error": 0.01, "total_parameters": 22_700_000, "active_parameters": 17_400_000}
    rows = [
        {"name": "teacher", "accuracy": 0.8, "ffn_ms": 20.0, "model_ms": 40.0, **common},
        {"name": "moe-384", "accuracy": 0.76, "accuracy_before": 0.7, "ffn_ms": 5.0, "model_ms": 25.0, **common},
    ]
    header, teacher, moe = text_table(rows).splitlines()
    assert header.split()[:2] == ["before", "accuracy"]
    assert " ".join(teacher.split()) == "teacher (dense) 80.0 % ± 1.0 100.0 % 22.7 M 17.4 M 20.0 40.0 1.00"
    assert " ".join(moe.split()) == "MoE student, 384 70.0 % 76.0 % ± 1.0 95.0 % 22.7 M 17.4 M 5.0 25.0 1.60"
