"""Classifiers as the Hub has them: classes without names, in another order or case than the data's, other losses."""

import json

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

from tests.cli.tiny import TRAINING, done, moebert, refused, write_base

OWN = ("--task", "custom")
QUICK = (*TRAINING, "--max_steps", "1")


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


def with_head(base, *names, **options):
    """The base with a head for these classes or, where a name is a number, for so many without names."""
    number = {"num_labels": int(names[0])} if names[0].isdigit() else {"id2label": dict(enumerate(names))}
    config = BertConfig.from_pretrained(base, **number, **options)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.bias[-1] = 100.0  # the last class is the answer
    model.save_pretrained(base)
    return base


def table(folder, *labels, name="x.tsv"):
    rows = [f"the film was {'very ' * (n % 3)}good\t{labels[n % len(labels)]}" for n in range(12)]
    file = folder / name
    file.write_text("\n".join(("text\tlabel", *rows)) + "\n")
    return file


def scores(folder, *words):
    file = folder / "scores.json"
    done("eval", *words, "--output", file)
    return json.loads(file.read_text())["splits"]["validation"]


def test_classes_without_names_are_taken_in_order_with_a_word(base, tmp_path):
    model, data = with_head(base, "3"), table(tmp_path, "neg", "pos", "neu")
    words = ("--model", model, *OWN, "--data", data)
    said = moebert("eval", *words).stderr
    assert said.count("does not name its classes: taken as 0 = neg, 1 = neu, 2 = pos, in the order of their names") == 1
    trained = tmp_path / "trained"
    said = moebert("finetune", *words, "--hold-out", "0.3", "--output", trained, *QUICK).stderr
    assert said.count("does not name its classes") == 1
    assert "does not name" not in moebert("eval", "--model", trained, *OWN, "--data", data).stderr
    done("convert", "--model", model, "--output", tmp_path / "moe")
    words = ("--model", tmp_path / "moe", "--teacher", model, *OWN, "--data", data, "--hold-out", "0.3")
    said = moebert("distill", *words, "--output", tmp_path / "student", *QUICK)
    assert said.exit_code == 0 and said.stderr.count("does not name its classes") == 1


def test_numbers_are_the_classes_of_a_model_that_does_not_name_its_own(base, tmp_path):
    """Also where one of them is not in the file."""
    words = ("--model", with_head(base, "3"), *OWN, "--data")
    found = {labels: scores(tmp_path, *words, table(tmp_path, *labels))["accuracy"] for labels in ("02", "01", "12")}
    assert found == {"02": 0.5, "01": 0.0, "12": 0.5}
    assert "does not name" not in moebert("eval", *words, table(tmp_path, *"012")).stderr


def test_held_out_rows_and_case_are_the_same_in_training_and_evaluation(base, tmp_path):
    model, data = with_head(base, "POSITIVE", "NEGATIVE"), table(tmp_path, "positive", "negative", "negative")
    words = (*OWN, "--data", data, "--hold-out", "0.3")
    trained = tmp_path / "trained"
    done("finetune", "--model", model, *words, "--output", trained, *QUICK)
    assert AutoConfig.from_pretrained(trained / "best").id2label == {0: "POSITIVE", 1: "NEGATIVE"}
    logged = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    kept = [line["eval_accuracy"] for line in logged if "eval_accuracy" in line]
    assert kept[-1] == pytest.approx(scores(tmp_path, "--model", trained, *words)["accuracy"])


def test_a_model_that_does_not_name_its_class_is_converted_without_its_head(base, tmp_path):
    file = with_head(base, "3") / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"]
    file.write_text(json.dumps(config))
    result = moebert("convert", "--model", base, "--output", tmp_path / "moe")
    assert result.exit_code == 0
    assert f"the config of {base} does not name the model's class: read without a head" in result.stderr
    assert AutoConfig.from_pretrained(tmp_path / "moe").architectures == ["BertModel"]


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_head_of_another_loss_is_refused(problem, base, tmp_path):
    model, data = with_head(base, "x", "y", "z", problem_type=problem), table(tmp_path, "x", "y", "z")
    words = ("--model", model, *OWN, "--data", data)
    line = f"model: expected a head for classification, got problem_type '{problem}' in {model}"
    assert refused("eval", *words) == line
    assert refused("finetune", *words, "--hold-out", "0.3", "--output", tmp_path / "out") == line


def test_a_new_head_has_the_loss_of_its_task(tmp_path):
    """Whatever the checkpoint without one says."""
    base = write_base(tmp_path / "several", problem_type="multi_label_classification")
    words = ("--model", base, *OWN, "--data", table(tmp_path, "x", "y"), "--hold-out", "0.3")
    done("finetune", *words, "--output", tmp_path / "out", *QUICK)
    assert AutoConfig.from_pretrained(tmp_path / "out" / "best").problem_type == "single_label_classification"
