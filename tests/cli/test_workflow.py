"""The commands in a row, as a user runs them: every product loads, everything can be run again and be resumed."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moebert_kernels.convert import importance_scores, load_importance
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import custom_task, load_task
from moebert_kernels.layers import moe_config, moe_layers
from tests.cli.tiny import SPLIT, TABLE, TRAINING, done, moebert, refused
from tests.helpers import ROOT


def logits_of(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(
        ["the film was good", "a dull play"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**tokens).logits


def test_a_teacher_learns_and_names_its_classes(teacher, data):
    model = AutoModelForSequenceClassification.from_pretrained(teacher / "best")
    assert model.config.id2label == {0: "happy", 1: "sad"}
    printed = done("eval", "--model", teacher, *TABLE, "--data", data)
    assert float(re.search(r"validation \(64 examples\): accuracy ([\d.]+)", printed)[1]) > 0.9


def test_a_model_in_bfloat16_is_trained_in_float32(base, data, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(base).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    words = ("--model", tmp_path / "base", *TABLE, "--data", data, "--output", tmp_path / "out", "--max_steps", 2)
    done("finetune", *words, "--learning_rate", 1e-6)
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / folder) for folder in ("base", "out/best")
    )
    assert {weight.dtype for weight in after.parameters()} == {torch.float32}
    assert not torch.equal(
        before.bert.encoder.layer[0].output.dense.weight, after.bert.encoder.layer[0].output.dense.weight
    )


def test_importance_is_that_of_the_train_split(teacher, importance, data):
    task_data = load_task(custom_task(["text"], "mood"), data)
    model = AutoModelForSequenceClassification.from_pretrained(teacher / "best")
    tokenizer = AutoTokenizer.from_pretrained(teacher / "best")
    wanted = importance_scores(
        model, TokenizedSplit(task_data.train, task_data.task, tokenizer, max_length=128).batches(7)
    )
    found = load_importance(importance, model)
    torch.testing.assert_close(found.scores, wanted)
    assert found.metadata["split"] == "train"


def test_importance_can_be_that_of_the_validation_split(teacher, importance, data, tmp_path):
    out = tmp_path / "importance.safetensors"
    done("importance", "--model", teacher, *TABLE, "--data", data, "--output", out, "--split", "validation")
    assert load_importance(out).metadata["split"] == "validation"
    assert not torch.equal(load_importance(out).scores, load_importance(importance).scores)


def test_a_converted_model_says_what_it_is(moe):
    config = AutoModelForSequenceClassification.from_pretrained(moe).config
    made = moe_config(config)
    assert (config.model_type, made.expert_size, made.num_shared_neurons) == ("bert", 8, 4)
    assert (made.router, made.experts, made.norm) == ("hash-random", "split", "expert")


def test_a_student_is_as_good_as_its_teacher_here(student, data, tmp_path):
    result = tmp_path / "result.json"
    done("eval", "--model", student, *TABLE, "--data", data, "--split", "test", "--output", result)
    assert json.loads(result.read_text())["splits"]["test"]["accuracy"] > 0.9


@pytest.mark.slow
def test_a_student_gives_the_same_logits_in_a_new_process(student):
    code = (
        "import sys, torch, moebert_kernels.convert\n"
        "from tests.cli.test_workflow import logits_of\n"
        "torch.save(logits_of(sys.argv[1]), sys.argv[2])"
    )
    file = student.parent / "logits.pt"
    subprocess.run([sys.executable, "-c", code, str(student / "best"), str(file)], cwd=ROOT, check=True)
    assert torch.equal(torch.load(file), logits_of(student / "best"))


def test_a_finished_command_changes_nothing_when_run_again(teacher, moe, student, importance, data):
    before = {path: path.stat().st_mtime_ns for path in importance.parent.iterdir()}
    scoring = ("importance", "--model", teacher, *TABLE, "--data", data, "--output", importance)
    assert "there already" in done(*scoring)
    assert before == {path: path.stat().st_mtime_ns for path in importance.parent.iterdir()}
    again = ("--importance", importance, *SPLIT, "--output", moe)
    assert "there already" in done("convert", "--model", teacher, *again)
    words = ("distill", "--model", moe, "--teacher", teacher, *TABLE, "--data", data, "--output", student, *TRAINING)
    weights = student / "best" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert "saved in" in done(*words)
    assert weights.stat().st_mtime_ns == written


def test_teacher_outputs_are_computed_once_for_two_students(teacher, moe, importance, data, tmp_path):
    dense = tmp_path / "dense"
    done("convert", "--method", "dense", "--model", teacher, "--importance", importance, "--expert-size", 8,
         "--output", dense)  # fmt: skip
    assert AutoModelForSequenceClassification.from_pretrained(dense).config.intermediate_size == 8
    cache = tmp_path / "cache"
    times = []
    for name, model in (("one", moe), ("two", dense)):
        done("distill", "--model", model, "--teacher", teacher, *TABLE, "--data", data, "--output", tmp_path / name,
             "--teacher_outputs", cache, "--teacher_outputs_dtype", "float32", *TRAINING)  # fmt: skip
        times.append({path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")})
    assert times[0] and times[0] == times[1]


def test_a_dense_model_of_the_same_flops_fits_the_text_too(teacher, data, tmp_path):
    """What `dense_student` makes of the choice, to compare with; a choice by text takes no importance."""
    words = ("convert", "--model", teacher, "--method", "dense", "--expert-size", 8, *TABLE, "--data", data)
    printed = done(*words, "--output", tmp_path / "dense")
    assert "8 neurons of the dense layer's 32" in printed and "importance kept" not in printed
    assert len(json.loads((tmp_path / "dense/choice.json").read_text())) == 2
    by_text = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert by_text.config.intermediate_size == 8
    line = refused(*words, "--importance", tmp_path / "none", "--output", tmp_path / "x")
    assert line.startswith("importance: it is used only with --method dense without --task and --data; leave it out")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(base, data, teacher, tmp_path):
    """The first process is stopped by Ctrl-C in the middle; the second one finishes."""
    words = ["finetune", "--model", base, *TABLE, "--data", data, "--output", tmp_path / "out", *TRAINING]
    code = (
        "import os, signal\n"
        "from moebert_kernels.distill.trainer import MoETrainer\n"
        "from moebert_kernels.cli import main\n"
        "made, original = [], MoETrainer.training_step\n"
        "def step(self, *args):\n"
        "    made.append(1)\n"
        "    if len(made) == 4: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return original(self, *args)\n"
        "MoETrainer.training_step = step\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    assert "interrupted; the same command goes on from here" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "out" / "best").exists()

    done(*words)

    assert torch.equal(logits_of(tmp_path / "out" / "best"), logits_of(teacher / "best"))


def test_interrupted_scoring_goes_on(teacher, importance, data, tmp_path, monkeypatch):
    from moebert_kernels.distill import scoring

    collate, seen = scoring.TokenizedSplit.collate, []

    def interrupted(self, *args):
        seen.append(args)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return collate(self, *args)

    out = tmp_path / "importance.safetensors"
    words = ("importance", "--model", teacher, *TABLE, "--data", data, "--output", out, "--batch-size", 8)
    monkeypatch.setattr(scoring.TokenizedSplit, "collate", interrupted)
    assert moebert(*words).exit_code == 130
    assert not out.exists()
    done(*words)

    assert len(seen) == 3 + (64 // 8 - 2)  # two of eight batches were kept
    torch.testing.assert_close(load_importance(out).scores, load_importance(importance).scores)


def test_balanced_tables_count_the_train_split(teacher, importance, data, tmp_path):
    done("convert", "--model", teacher, "--importance", importance, *SPLIT, "--router",
         "hash-balance", *TABLE, "--data", data, "--output", tmp_path / "moe")  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    first, second = (layer.router.table for layer in moe_layers(model))
    assert torch.equal(first, second)


def test_given_experts_and_tables_are_part_of_a_choice(teacher, importance, data, tmp_path):
    """Tables chosen for the experts that the importance splits; experts that fit the text and given tables."""
    words = ("convert", "--model", teacher, *TABLE, "--data", data)
    done(*words, *SPLIT, "--router", "hash-chosen", "--importance", importance, "--output", tmp_path / "tables")
    split = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tables")
    done("convert", "--model", teacher, *SPLIT, "--importance", importance, "--output", tmp_path / "random")
    same = AutoModelForSequenceClassification.from_pretrained(tmp_path / "random")
    for ours, theirs in zip(moe_layers(split), moe_layers(same), strict=True):
        assert torch.equal(ours.experts.w2, theirs.experts.w2) and not torch.equal(
            ours.router.table, theirs.router.table
        )
    vocabulary, file = split.config.vocab_size, tmp_path / "tables.json"
    file.write_text(json.dumps([[token % 4 for token in range(vocabulary)]] * 2))
    clustered = ("--experts", "clustered", "--expert-size", 8, "--router", "hash-random", "--hash-tables", file)
    done(*words, *clustered, "--output", tmp_path / "experts")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "experts")
    assert all((layer.router.table == torch.arange(vocabulary) % 4).all() for layer in moe_layers(model))


def test_experts_and_tables_are_chosen_by_the_train_split(teacher, data, tmp_path):
    words = ("convert", "--model", teacher, "--method", "chosen", "--expert-size", 8, *TABLE, "--data", data)
    printed = done(*words, "--output", tmp_path / "moe")
    assert "feed-forward" in printed and "mean" in printed  # the report by layer
    config = moe_config(AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe").config)
    assert (config.router, config.experts, config.expert_size) == ("hash-chosen", "clustered", 8)
    assert "is there already" in done(*words, "--output", tmp_path / "moe")
    line = refused("convert", "--model", teacher, "--method", "chosen", "--output", tmp_path / "other")
    wanted = "one (a task of GLUE, or custom with --data FILE), whose training data experts are chosen by"
    assert line == f"task: expected {wanted}, got none"


def test_the_published_recipe_pads_and_routes_padding(teacher, importance, data, tmp_path):
    done("convert", "--model", teacher, "--importance", importance, *SPLIT,
         "--route-padding", "--output", tmp_path / "moe")  # fmt: skip
    done("distill", "--model", tmp_path / "moe", "--teacher", teacher, *TABLE, "--data", data,
         "--objective_options.preset", "paper", "--output", tmp_path / "out", *TRAINING,
         "--teacher_dropout")  # fmt: skip
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "best")
    assert moe_config(trained.config).route_padding


def test_squad_goes_all_the_way(base, tmp_path):
    answers = [{"text": ["film"], "answer_start": [4]}, {"text": ["play"], "answer_start": [2]}]
    contexts = ["the film was good", "a play is dull"]
    lines = [
        json.dumps({"context": c, "question": "who was good ?", "answers": a})
        for c, a in zip(contexts, answers, strict=True)
    ]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines * 8))
    teacher, moe = tmp_path / "teacher", tmp_path / "moe"
    common = ("--task", "squad", "--data", tmp_path, "--max-length", 20, "--doc-stride", 2)
    short = ("--per_device_train_batch_size", 4, "--num_train_epochs", 1, "--learning_rate", "1e-3")
    done("finetune", "--model", base, "--output", teacher, *common, *short)
    done("importance", "--model", teacher, "--output", tmp_path / "i.safetensors", *common)
    done("convert", "--model", teacher, "--importance", tmp_path / "i.safetensors", *SPLIT,
         "--output", moe)  # fmt: skip
    done("distill", "--model", moe, "--teacher", teacher, "--output", tmp_path / "student", *common, *short)
    assert "exact_match" in done("eval", "--model", tmp_path / "student", *common)


def test_bench_compares_on_random_tokens(teacher, moe, tmp_path):
    out = tmp_path / "bench.json"
    words = ("--length", 12, "--length", 20, "--batch-size", 1, "--batch-size", 3, "--rounds", 2, "--output", out)
    text = done("bench", "--model", moe, "--against", teacher, *words)
    assert "B=3 T=20, 60 real tokens" in text and "of 2 rounds in turns, float32" in text
    result = json.loads(out.read_text())
    assert [(case["batch_size"], case["length"]) for case in result["cases"]] == [(1, 12), (1, 20), (3, 12), (3, 20)]
    sizes = result["models"]
    assert sizes["model"]["active_parameters"] < sizes["model"]["total_parameters"]
    assert sizes["against"]["active_parameters"] == sizes["against"]["total_parameters"]
    assert sizes["against"]["weights_mib"] >= 4 * sizes["against"]["total_parameters"] / 2**20
    for case in result["cases"]:
        for entry in case["providers"].values():
            assert entry["ffn_ms"]["median"] > 0
            assert entry["model_ms"]["q1"] <= entry["model_ms"]["median"] <= entry["model_ms"]["q3"]
            assert entry["tokens_per_s"] * entry["model_ms"]["median"] == pytest.approx(1e3 * case["real_tokens"])
        assert case["providers"]["against"]["model_speed"]["median"] == 1


def test_bench_compares_on_padded_batches_of_a_task(teacher, moe, data, tmp_path):
    out = tmp_path / "bench.json"
    words = (*TABLE, "--data", data, "--batch-size", 8, "--length", 8, "--rounds", 1, "--dtype", "bfloat16")
    text = done("bench", "--model", moe, "--against", teacher, *words, "--output", out)
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    assert case["length"] == 8 and 8 < case["real_tokens"] < 64  # cut at 8 tokens, the shortest texts padded
    assert result["environment"]["dtype"] == "bfloat16" and "bfloat16" in text


def test_doctor_runs():
    assert "Every op runs here and agrees with its reference" in done("doctor")


def test_every_model_has_a_card(teacher, moe, student):
    for folder, converted in ((teacher / "best", False), (moe, True), (student / "best", True)):
        card = (folder / "README.md").read_text()
        assert "# BertForSequenceClassification\n" in card
        assert ("import moebert_kernels.convert" in card) == converted
        assert ("accuracy on validation data" in card) == (folder != moe)
