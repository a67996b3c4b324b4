"""Several tasks in one task-routed model, its merging and its students, by the commands."""

import shlex
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
)

from moebert_kernels.cli.tasks import data_by_task
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config, set_task
from tests.cli.test_workflow import logits_of
from tests.cli.tiny import BAD, GOOD, TABLE, done, moebert, refused, write_base
from tests.helpers import ROOT

SHORT = ("--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--max-length", "12")
SENTENCES = ["the film was good", "a dull play"]


def write_tasks(folder, rows=32):
    """SST-2 (is it good?), CoLA (the same, the other way round) and STS-B (how many are good?)."""
    for number, split in enumerate(("train", "dev")):
        generator = torch.Generator().manual_seed(number)
        lines = {"sst2": ["sentence\tlabel"], "cola": [], "stsb": ["sentence1\tsentence2\tscore"]}
        for _ in range(rows):
            one, two, word = (int(torch.randint(0, n, (1,), generator=generator)) for n in (2, 2, 4))
            first, second = (f"the film was {(BAD, GOOD)[label][word]}" for label in (one, two))
            lines["sst2"].append(f"{first}\t{one}")
            lines["cola"].append(f"x\t{1 - one}\t\t{first}")
            lines["stsb"].append(f"{first}\t{second}\t{2.5 * (one + two)}")
        for task, text in lines.items():
            (folder / task).mkdir(exist_ok=True)
            (folder / task / f"{split}.tsv").write_text("\n".join(text) + "\n")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def data_of(tasks, *names):
    return [word for name in names for word in ("--task", name, "--data", f"{name}={tasks / name}")]


@pytest.fixture(scope="module")
def routed(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("routed") / "out"
    named = ("--task", "sst2", "--task", "cola", "--task", "stsb")
    done("convert", "--model", base, "--router", "task", *named, "--experts", "copy", "--output", output)
    return output


@pytest.fixture(scope="module")
def trained(routed, tasks, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "out"
    words = ("finetune", "--model", routed, *data_of(tasks, "sst2", "cola", "stsb"), "--output", output, *SHORT)
    printed = done(*words, "--num_train_epochs", "8", "--learning_rate", "3e-3")
    assert "layer 2: sst2 " in printed and "best on validation by the mean, step" in printed
    assert "there" not in printed and "sst2.accuracy" in printed and "stsb.spearman" in printed
    return output


def test_the_routed_model_says_what_it_is(routed):
    config = moe_config(AutoModelForSequenceClassification.from_pretrained(routed).config)
    assert (config.router, config.tasks, config.top_k, config.norm) == ("task", ["sst2", "cola", "stsb"], 2, "layer")
    assert config.task_labels == {"sst2": ["negative", "positive"], "cola": ["unacceptable", "acceptable"], "stsb": []}


def test_a_pretraining_checkpoint_keeps_its_pooler(base, tmp_path):
    """Saved with a head for masked words alone, as bert-base-uncased is: the class has no pooler, the file does."""
    config = BertConfig.from_pretrained(base)
    pretrained = BertForPreTraining(config)
    words = ("convert", "--router", "task", "--task", "sst2", "--task", "stsb", "--experts", "copy")
    for folder, model in (("whole", pretrained), ("bare", BertForMaskedLM(config))):
        model.save_pretrained(tmp_path / folder)
        file = tmp_path / folder / "config.json"
        file.write_text(file.read_text().replace("BertForPreTraining", "BertForMaskedLM"))
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / folder)
        result = moebert(*words, "--model", tmp_path / folder, "--output", tmp_path / f"{folder}-moe")
        assert result.exit_code == 0, result.stderr
        assert ("its weights are drawn anew" in result.stderr) == (folder == "bare")
    kept = load_file(tmp_path / "whole-moe/model.safetensors")
    for name, tensor in pretrained.bert.pooler.state_dict().items():
        assert torch.equal(kept[f"bert.pooler.{name}"], tensor)
    first = load_file(tmp_path / "bare-moe/model.safetensors")
    done(*words, "--model", tmp_path / "bare", "--output", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_it_learns_every_task_and_each_can_be_evaluated(trained, tasks):
    for task, metric in (("sst2", "accuracy"), ("cola", "accuracy"), ("stsb", "spearman")):
        printed = done("eval", "--model", trained, "--task", task, "--data", tasks / task)
        assert float(printed.split(f"{metric} ")[1].split(",")[0].split()[0]) > 0.8, printed


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_merging_keeps_the_logits_labels_and_tokenizer(trained, task, tmp_path):
    done("merge", "--model", trained, "--task", task, "--output", tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    moe = AutoModelForSequenceClassification.from_pretrained(trained / "best").eval()
    set_task(moe, task)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "plain")(SENTENCES, padding=True, return_tensors="pt")
    torch.testing.assert_close(logits_of(tmp_path / "plain"), moe(**tokens).logits, rtol=0, atol=1e-5)
    assert plain.config.model_type == "bert" and plain.config.intermediate_size == 2 * 32
    assert plain.config.id2label == ({0: "negative", 1: "positive"} if task == "sst2" else {0: "LABEL_0"})
    assert "there already" in done("merge", "--model", trained, "--task", task, "--output", tmp_path / "plain")


def test_students(base, teacher, trained, tmp_path):
    printed = done("student", "--model", teacher, "--layers", 1, "--output", tmp_path / "half")
    assert "student <- teacher: embeddings <- embeddings, 1 <- 2" in printed and "parameters;" in printed
    half, whole = (AutoModelForSequenceClassification.from_pretrained(p) for p in (tmp_path / "half", teacher / "best"))
    assert torch.equal(half.bert.encoder.layer[0].output.dense.weight, whole.bert.encoder.layer[1].output.dense.weight)
    assert half.config.id2label == whole.config.id2label

    done(
        "student", "--model", trained, "--task", "sst2", "--layers", 1, "--teacher-layer", 1, "--output", tmp_path / "a"
    )
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").config.id2label[1] == "positive"

    small = ("--layers", 1, "--hidden-size", 12, "--intermediate-size", 20, "--heads", 3)
    done("student", "--model", base, *small, "--init", "random", "--output", tmp_path / "small")
    config = AutoModel.from_pretrained(tmp_path / "small").config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (1, 12, 20)

    done("student", "--model", teacher, "--init", tmp_path / "small", "--output", tmp_path / "given")
    given = AutoModelForSequenceClassification.from_pretrained(tmp_path / "given")
    small = AutoModel.from_pretrained(tmp_path / "small")
    assert torch.equal(given.bert.embeddings.word_embeddings.weight, small.embeddings.word_embeddings.weight)

    printed = done("student", "--model", teacher, "--shape", "4l-312", "--layers", 2, "--init", "random", "--output",
                   tmp_path / "preset")  # fmt: skip
    assert AutoModel.from_pretrained(tmp_path / "preset").config.intermediate_size == 1200


def test_bench_takes_a_task_routed_model(trained, teacher):
    words = ("--against", teacher, "--rounds", 2, "--length", 8, "--batch-size", 2)
    assert "model" in done("bench", "--model", trained, *words)


def test_refusals_of_convert(base, teacher, tmp_path):
    def line(*words):
        return refused("convert", "--model", base, *words, "--output", tmp_path / "out")

    assert line("--router", "task") == "task: expected different tasks, got none"
    twice = ("--task", "sst2", "--task", "sst2")
    assert line("--router", "task", *twice) == "task: expected different tasks, got sst2, sst2"
    for name in ("custom", "squad"):
        wanted = f"task: expected tasks of GLUE, which several can share a model, got '{name}'"
        assert line("--router", "task", "--task", name) == wanted


def test_refusals_of_finetune(base, routed, tasks, tmp_path):
    def line(model, *words):
        return refused("finetune", "--model", model, *words, "--output", tmp_path / "out", *SHORT)

    both = data_of(tasks, "sst2", "cola")
    wanted = "model: expected one with a head for each of several tasks, got a BertModel in "
    assert line(base, *both).startswith(wanted)
    assert line(routed, *both, "--regression") == "regression: expected it with one --task alone, got True"
    assert line(routed, *both, "--doc-stride", 3) == "doc-stride: expected it with one --task alone, got 3"
    one = ("--task", "sst2", "--task-temperature", 2)
    assert line(routed, *one) == "task-temperature: expected it with several --task alone, got 2.0"
    assert line(routed, "--task", "sst2", "--task", "cola", "--data", tasks / "sst2").startswith(
        "data: expected TASK=FOLDER,"
    )
    assert line(routed, "--task", "sst2", "--task", "rte", "--data", f"rte={tasks / 'sst2'}").startswith(
        "task: expected one of the model's tasks, sst2, cola, stsb, got 'rte'"
    )  # fmt: skip


def test_the_name_of_one_task_may_be_left_out():
    for entry in ("folder", "train=a.tsv", "data/a=b"):
        assert data_by_task([entry], ["sst2"]) == {"sst2": [entry]}
        with pytest.raises(UserError, match=r"data: expected TASK=FOLDER, .* for tasks among sst2, cola, got"):
            data_by_task([entry], ["sst2", "cola"])
    assert data_by_task(["sst2=train=a.tsv"], ["sst2"]) == {"sst2": ["train=a.tsv"]}


def test_refusals_of_merge_and_student(teacher, moe, trained, base, data, tmp_path):
    def line(command, model, *words):
        return refused(command, "--model", model, *words, "--output", tmp_path / "out")

    assert line("merge", trained, "--task", "rte").startswith(
        "task: expected one of the model's tasks, sst2, cola, stsb"
    )
    assert line("merge", teacher, "--task", "sst2").startswith("model: expected one with experts, got a BertFor")
    assert line("merge", moe, "--task", "sst2").startswith("task: expected one of the model's tasks, none (router=")
    assert line("student", trained) == "task: expected one of the model's tasks, sst2, cola, stsb, got none"
    assert line("student", teacher, "--task", "sst2").startswith("task: expected none with a model that does not route")
    assert line("student", teacher, "--shape", "5l").startswith(
        "shape: expected one of 4l-312, 6l-384, 6l-768, 3l-384, got"
    )
    assert line("student", teacher, "--layers", 3).startswith("layers: expected 1 to 2 student layers, as many as")
    assert line("student", moe).startswith("model: expected a dense model, got BertForSequenceClassification with")
    other = write_base(tmp_path / "other")
    vocab = other / "tokenizer.json"
    vocab.write_text(vocab.read_text().replace('"film"', '"movie"'))
    assert line("student", teacher, "--init", other).startswith(
        "init: expected a model with the teacher's vocabulary, got"
    )
    assert line("eval", trained, *TABLE, "--data", data).startswith(
        "task: expected one of the model's tasks, sst2, cola"
    )


def test_the_guide_makes_what_it_uses():
    """Each folder that a command of the page reads was written by one before it, and none is written twice."""
    lines = (ROOT / "docs/guide/microbert.md").read_text().splitlines()
    made = ["bert-base-uncased"]
    for line in (line for line in lines if line.startswith("    moebert ")):
        words = shlex.split(line)
        values = dict(pairwise(words))
        for option in ("--model", "--teacher", "--dense-teacher"):
            assert values.get(option, made[0]) in made, line
        assert "--output" in values or words[1] == "eval"
        assert values.get("--output") not in made, line
        made.append(values.get("--output"))
    assert "ablation" in made
