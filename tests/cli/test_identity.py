"""What is there answers for nothing but the call that made it; and what the commands say of data before they use it."""

import re
import shutil
import signal

import pytest
from transformers import AutoModelForSequenceClassification

from tests.cli.test_tasks import data_of, write_tasks
from tests.cli.tiny import SPLIT, TABLE, done, moebert, refused, write_data

SHORT = (
    "--per_device_train_batch_size",
    "8",
    "--learning_rate",
    "1e-2",
    "--num_train_epochs",
    "1",
    "--max-length",
    "12",
)


def files(train, validation):
    return ("--data", f"train={train}", "--data", f"validation={validation}")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Few rows, a long one in validation, and other validation rows of as many tokens, or with another label."""
    folder = write_data(tmp_path_factory.mktemp("small"), rows=16)
    rows = (folder / "dev.tsv").read_text() + "the film was was was was was good\thappy\n"
    (folder / "dev.tsv").write_text(rows)
    (folder / "other.tsv").write_text(rows.replace("film", "book"))
    lines = rows.splitlines()
    turned = "sad" if lines[-1].endswith("happy") else "happy"
    (folder / "labels.tsv").write_text("\n".join([*lines[:-1], f"{lines[-1].split(chr(9))[0]}\t{turned}"]) + "\n")
    return folder


@pytest.fixture
def interrupted(monkeypatch):
    """The next run is interrupted in its first step."""
    from moebert_kernels.distill.trainer import MoETrainer

    original, times = MoETrainer.training_step, []

    def step(self, *args):
        times.append(1)
        if len(times) == 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(MoETrainer, "training_step", step)


def command(kind, base, teacher, moe):
    return {
        "finetune": ("finetune", "--model", base),
        "distill": ("distill", "--model", moe, "--teacher", teacher),
        "recipe": ("distill", "--config", "kd", "--model", base, "--teacher", teacher),
    }[kind]


def refusal(line, what):
    """The line names what differs and both ways out, and nothing that only a program understands."""
    assert what in line and "--force" in line and "another --output" in line, line
    assert not any(len(word) >= 16 and not set(word) - set("0123456789abcdef") for word in line.split())


@pytest.mark.parametrize("state", ["finished", "interrupted"])
@pytest.mark.parametrize("kind", ["finetune", "distill", "recipe"])
def test_other_validation_rows_are_another_run(kind, state, base, teacher, moe, small, tmp_path, request):
    words = (*command(kind, base, teacher, moe), *TABLE, *SHORT, "--output", tmp_path / "out")
    train, dev = small / "train.tsv", small / "dev.tsv"
    if state == "interrupted":
        request.getfixturevalue("interrupted")
        assert moebert(*words, *files(train, dev)).exit_code == 130
    else:
        done(*words, *files(train, dev))
    for other in ("other", "labels"):
        refusal(refused(*words, *files(train, small / f"{other}.tsv")), "validation data")
    refusal(refused(*words, *files(small / "other.tsv", dev)), "training data")
    shutil.copy(dev, tmp_path / "moved.tsv")  # the same rows elsewhere are the same run
    assert "best on validation by accuracy" in done(*words, *files(train, tmp_path / "moved.tsv"))
    assert "best on validation" in done(*words, *files(train, small / "other.tsv"), "--force")


def test_options_that_decide_the_result_are_said(base, teacher, moe, small, tmp_path):
    words = ("distill", "--model", moe, "--teacher", teacher, *TABLE, "--data", small, "--output", tmp_path / "out")
    done(*words, *SHORT)
    for more, what in (
        (("--max-length", "10"), "12 and is 10 now"),
        (("--loss_weights.hidden", "3"), "1.0 and is 3 now"),
        (("--num_train_epochs", "2"), "1.0 and is 2.0 now"),
        (("--seed", "4"), "0 and is 4 now"),
    ):
        line = refused(*words, *SHORT, *more)
        refusal(line, what)
        assert more[0].strip("-").replace("-", "_") in line.replace("-", "_")
    other = tmp_path / "teacher"
    model = AutoModelForSequenceClassification.from_pretrained(teacher / "best")
    model.classifier.bias.data += 1.0
    shutil.copytree(teacher / "best", other)
    model.save_pretrained(other)
    line = refused("distill", "--model", moe, "--teacher", other, *words[5:], *SHORT)
    refusal(line, "teacher weights")


def test_several_tasks_are_told_apart(base, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks, rows=8)
    named = ("--task", "sst2", "--task", "stsb")
    done("convert", "--model", base, "--router", "task", *named, "--experts", "copy", "--output", tmp_path / "moe")
    words = ("finetune", "--model", tmp_path / "moe", *data_of(tasks, "sst2", "stsb"), "--output", tmp_path / "out")
    printed = done(*words, *SHORT)
    assert "sst2: 8 training rows; " in printed and "stsb: 8 training rows, scores from " in printed
    file = tasks / "stsb/dev.tsv"
    rows = file.read_text()
    file.write_text(rows.replace("2.5", "1.0", 1))
    refusal(refused(*words, *SHORT), "validation data")
    file.write_text(rows)
    assert "best on validation by the mean" in done(*words, *SHORT)


def test_products_of_other_models_and_files_are_not_there_already(teacher, importance, data, small, tmp_path):
    """The same words, but other weights, scores or texts behind them."""
    model, scores = tmp_path / "model", tmp_path / "i.safetensors"
    shutil.copytree(teacher / "best", model)
    shutil.copy(importance, scores)
    table = tmp_path / "data"
    shutil.copytree(small, table)
    sizes = (*SPLIT, "--importance", scores, "--model", model)
    balanced = (*sizes, "--router", "hash-balance", *TABLE, "--data", table)
    calls = {
        "moe": ("convert", *sizes), "balanced": ("convert", *balanced),
        "student": ("student", "--model", model, "--layers", 1),
    }  # fmt: skip
    for name, words in calls.items():
        done(*words, "--output", tmp_path / name)
        assert "is there already" in done(*words, "--output", tmp_path / name)
    moved = {at: tmp_path / f"moved-{at.name}" for at in (model, scores, table)}
    for at, place in moved.items():
        at.rename(place)
    for name, words in calls.items():
        again = [moved.get(word, word) for word in words]
        assert "is there already" in done(*again, "--output", tmp_path / name)
    for at, place in moved.items():
        place.rename(at)
    (table / "train.tsv").write_text((table / "dev.tsv").read_text())
    assert "other training texts (--force" in refused(*calls["balanced"], "--output", tmp_path / "balanced")
    done("importance", "--model", model, *TABLE, "--data", data, "--split", "test", "--output", scores, "--force")
    assert "other files of importance (--force" in refused(*calls["moe"], "--output", tmp_path / "moe")
    changed = AutoModelForSequenceClassification.from_pretrained(model)
    changed.classifier.bias.data += 1.0
    changed.save_pretrained(model)
    assert "other files of model (--force" in refused(*calls["student"], "--output", tmp_path / "student")


def test_scores_say_what_they_are_of(teacher, small, tmp_path):
    words = ("importance", "--model", teacher, *TABLE, "--data", small, "--output", tmp_path / "i.safetensors")
    done(*words)
    for more, what in (
        (("--split", "test"), "split (it was train and is test now)"),
        (("--max-length", "10"), "max_length (it was 12 and is 10 now)"),
        (("--max-examples", "9", "--seed", "3"), "max_examples (it was not given and is 9 now), seed (it was not"),
    ):
        assert what in refused(*words, *more)
    assert "is there already" in done(*words)


def test_eval_cuts_as_training_did(base, small, tmp_path):
    """Whatever the preset says; an explicit length wins, and the difference is said."""
    words = (*TABLE, "--data", small)
    done("finetune", "--model", base, *words, *SHORT[:-1], "8", "--output", tmp_path / "out")
    printed = done("eval", "--model", tmp_path / "out", *words)
    assert re.search(r"\d+ of 17 validation texts fill all 8 tokens, and what is longer is cut \(", printed)
    assert "was trained with" not in printed
    for more, length in ((("--max-length", 9), 9), (("--max-length", 24), 24)):
        printed = done("eval", "--model", tmp_path / "out", *words, *more)
        assert f"--max-length {length}: the model was trained with 8" in printed
        assert ("1 of 17 validation texts fill all 9 tokens" in printed) == (length == 9)
    done(
        "convert",
        "--model",
        tmp_path / "out",
        "--expert-size",
        8,
        "--num-shared-neurons",
        4,
        "--output",
        tmp_path / "moe",
    )
    assert "validation texts fill all 8 tokens" in done("eval", "--model", tmp_path / "moe", *words)


def test_one_file_holds_out_its_validation_rows(base, small, tmp_path):
    one = ("--data", small / "train.tsv")
    words = ("finetune", "--model", base, *TABLE, *one, *SHORT, "--output", tmp_path / "out")
    assert "hold out training rows with --hold-out 0.1" in refused(*words)
    held = ("--hold-out", "0.25")
    printed = done(*words, *held)
    assert "--hold-out 0.25: 4 of the 16 training rows are the validation split" in printed
    assert "custom: 12 training rows; " in printed and "custom: 4 validation rows; " in printed
    best = printed.split("best on validation by accuracy, step 2: ")[1].splitlines()[0]
    assert best in done("eval", "--model", tmp_path / "out", *TABLE, *one, *held)
    refusal(refused(*words, "--hold-out", "0.5"), "0.25 and is 0.5 now")
    scored = ("importance", "--model", tmp_path / "out", *TABLE, *one, *held, "--output", tmp_path / "i.safetensors")
    assert "custom: 12 training rows" in done(*scored)


def test_scores_without_regression_are_refused(base, tmp_path):
    rows = [f"the film was good,{n / 4}" for n in range(9)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,score", *rows]) + "\n")
    words = ("--task", "custom", "--label-column", "score", "--data", tmp_path, *SHORT, "--output", tmp_path / "out")
    line = refused("finetune", "--model", base, *words)
    assert "expected classes" in line and "got scores such as 0.25 in row 2 (--regression" in line
    assert "scores from 0 to 2" in done("finetune", "--model", base, *words, "--regression")
