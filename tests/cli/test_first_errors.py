"""What somebody who uses a command for the first time gets wrong is refused early, and the line says what to do."""

import errno

import pytest
from safetensors import SafetensorError

from moebert_kernels.cli import outputs
from moebert_kernels.distill import run
from tests.cli.tiny import SPLIT, TABLE, TRAINING, done, moebert, refused

ROWS = "text\tlabel\n" + "the film was good\thappy\nthe book was bad\tsad\n" * 20
CUSTOM = ("--task", "custom", "--hold-out", 0.2)


def file(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def test_an_output_in_use_is_refused_before_any_data_is_read(teacher, moe, student, tmp_path):
    """The data does not exist, and is not what the refusals are about."""
    missing = ("--data", tmp_path / "none.tsv")
    line = refused("convert", "--model", teacher, "--method", "chosen", "--task", "custom", *missing, "--output", moe)
    assert line == (
        f"output: expected a new or empty folder, got {moe} with a model of other expert_size (it was 8 and is not"
        " given now), method (it was not given and is chosen now), num_shared_neurons (it was 4 and is not given now),"
        " task (it was not given and is ['custom'] now) (--force replaces it)"
    )
    both = ("--model", moe, "--teacher", teacher)
    for command, folder, models in (("finetune", teacher, ("--model", moe)), ("distill", student, both)):
        words = (command, *models, *TABLE, *missing, "--output", folder, *TRAINING)
        assert refused(*words, "--seed", 5) == (
            f"output: expected a new folder or one of the same run, got {folder} with a finished run of other seed (it"
            " was 0 and is 5 now) (--force replaces it, another --output keeps it)"
        )
        assert "of other hold_out (it was not given and is 0.1 now)" in refused(*words, "--hold-out", 0.1)
        assert refused(*words).startswith("data: ")  # nothing that is known without data differs


@pytest.mark.parametrize(
    ("name", "content", "words", "line"),
    [
        ("a.tsv", ROWS.replace("text", "Text"), (), "a column text in {}, got Text, label; --text-column, or custom_"),
        ("a.tsv", ROWS.replace("label", "mood"), (), "a column label in {}, got text, mood; --label-column, or custom"),
        ("a.csv", ROWS.replace("\t", ";"), (), "commas between the columns of {}, got semicolons"),
        ("a.tsv", "text\tlabel\ncafé\thappy\n".encode("latin-1"), (), "UTF-8 text, got other bytes in {} at position "
         "14; save it as UTF-8"),
        ("a.tsv", "", (), "rows in {}, got none"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n\n{"text"', (), "JSON in {}, line 3, got something else"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_wanted(name, content, words, line, base, tmp_path):
    data = file(tmp_path, name, content)
    got = refused("finetune", "--model", base, *CUSTOM, "--data", data, "--output", tmp_path / "out", *words)
    assert got.startswith(f"data: expected {line.format(data)}")


def test_one_row_of_each_class_cannot_be_held_out(base, tmp_path):
    data = file(tmp_path, "a.tsv", "text\tlabel\n" + "".join(f"film\tc{number}\n" for number in range(9)))
    line = refused("finetune", "--model", base, *CUSTOM, "--data", data, "--output", tmp_path / "out")
    assert line == (
        "hold-out: expected enough training rows for both splits, got 9 of 9 classes, of which one row each is not held"
        " out"
    )


def test_settings_that_cannot_be_kept_are_refused_before_training(base, tmp_path, monkeypatch):
    data = file(tmp_path, "a.tsv", ROWS)
    words = ("finetune", "--model", base, *CUSTOM, "--data", data, "--output", tmp_path / "out", *TRAINING)
    monkeypatch.setattr(run._Run, "train", None)
    for more, line in (
        (("--metric_for_best_model", "f2"), "metric_for_best_model: expected one of accuracy, macro_f1, got 'f2'"),
        (("--seed", -1), "seed: expected a number of at least 0, got -1"),
        (("--max_steps", 0), "max_steps: expected a number above 0, or -1 for that of num_train_epochs, got 0"),
        (("--report_to", "foo"), "settings: expected training arguments that fit each other and this machine, got"),
        (("--adam_beta1", 5), "settings: expected training arguments that fit each other and this machine, got"),
    ):
        assert refused(*words, *more).startswith(line)
    assert not (tmp_path / "out" / "run.json").exists()

    def without(self):
        raise RuntimeError("FooCallback requires foo to be installed. Run `pip install foo`.")

    monkeypatch.setattr(run._Run, "trainer", without)
    line = refused(*words)
    assert line.startswith("report_to: expected trackers that are installed, got others (FooCallback requires foo")


def test_the_option_at_fault_is_named(base, teacher, moe, data, tmp_path):
    words = ("distill", "--model", moe, *TABLE, "--data", data, "--output", tmp_path / "out")
    line = refused(*words, "--teacher", base)
    assert line == f"teacher: expected a checkpoint fine-tuned on custom, got {base} (no classifier.bias)"
    line = refused(*words, "--teacher", teacher, "--extra-text", tmp_path / "none.tsv")
    assert line == f"extra-text: expected a file, got {tmp_path / 'none.tsv'}, which does not exist"
    tables = file(tmp_path, "tables.pkl", b"junk")
    line = refused("convert", "--model", teacher, "--hash-tables", tables, "--output", tmp_path / "out")
    assert line.startswith("hash-tables: expected a pickle of plain lists and numbers, got ")


def test_a_prepared_model_is_not_trained(teacher, moe, data, tmp_path):
    for name, model in (("dense", teacher), ("moe", moe)):
        done("quantize", "--model", model, "--output", tmp_path / name)
        words = ("--model", tmp_path / name, "--output", tmp_path / "out")
        for command in (("finetune", *TABLE), ("distill", "--teacher", teacher, *TABLE), ("convert",)):
            line = refused(*command, *words, *(("--data", tmp_path / "none.tsv") if len(command) > 1 else ()))
            assert line.startswith("model: expected one that can be trained, got ")


def test_experts_are_chosen_by_all_of_a_text_file(teacher, tmp_path):
    """An encoder reads its lines, each with the special tokens; with a language model's task one document."""
    text = "the film was good\na play was bad\nwho is warm\nthe book is dull\na film was great\n" * 40
    words = ("convert", "--model", teacher, "--method", "chosen", *SPLIT, "--data", file(tmp_path, "a.txt", text))
    for task in ("lm", "custom"):
        result = moebert(*words, "--task", task, "--output", tmp_path / task)
        assert result.exit_code == 0, result.stderr
        assert "12 tokens are few" not in result.stderr
        assert ("the lines are 200 texts" in result.stderr) == (task == "custom")
    weights = [(tmp_path / task / "model.safetensors").read_bytes() for task in ("lm", "custom")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
    ids=["write", "safetensors", "torch"],
)
def test_a_full_disk_is_said_and_leaves_nothing_half_written(error, teacher, tmp_path, monkeypatch):
    def full(model, folder, **_):
        (folder / "half.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr("moebert_kernels.convert.card.save_with_card", full)
    result = moebert("convert", "--model", teacher, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert f"moebert: expected space to write the result, got none ({error}); free some and run it " in result.stderr
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_package_keep_their_traceback(teacher, tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(outputs, "write_files", wrong)
    assert str(moebert("convert", "--model", teacher, "--output", tmp_path / "out").exception) == "a bug"
