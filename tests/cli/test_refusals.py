"""Wrong input: one line that says what was wanted and what came, status 2, no traceback, and nothing lost."""

import os
import shutil

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from moebert_kernels.cli import app
from moebert_kernels.layers import moe_config
from tests.cli.tiny import TABLE, TRAINING, done, moebert, refused, write_base


def copy(folder, at):
    return shutil.copytree(folder, at)


@pytest.fixture
def written(tmp_path):
    """Files of which each has something wrong, and an empty folder."""
    for name, text in {
        "labels/dev.tsv": "text\tmood\nthe film was good\thappy\na book\tangry\n",
        "rte/dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta film\ta play\tentailment\n",
        "tables.json": "[0, 1, 2, 3]",
        "scores": "not scores",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    return tmp_path


# words in which a name in braces is a fixture's path, and how the line begins and ends
WRONG = {
    "task": ("finetune -m {base} --task sst-2 -o", "task: expected one of cola, sst2,", "got 'sst-2'"),
    "file": ("finetune -m {base} --task sst2 --data {at}/no.tsv -o", "data: expected a file or a folder, got ", ""),
    "column": ("finetune -m {base} --task sst2 -d -o", "data: expected a column sentence in ", "got text, mood"),
    "split": (
        "finetune -m {base} -t --data {data}/train.tsv -o", "data: expected a validation split, got train", ""
    ),
    "label": ("eval -m {teacher} -t --data {at}/labels", "mood: expected one of happy, sad in ", "row 2, got 'angry'"),
    "classes": (
        "eval -m {teacher} --task rte --data {at}/rte",
        "labels: expected the model's 2 (happy, sad), got 2 in task rte (entailment, not_entailment)", "",
    ),
    "head": ("eval -m {base} -t -d", "model: expected a checkpoint fine-tuned on custom, got ", "(no classifier.bias)"),
    "no model": ("eval -m {at}/no -t -d", "model: expected a folder or a model's name on the Hub, got ", ""),
    "no config": ("eval -m {at}/empty -t -d", "model: expected a folder with a config.json, got ", ""),
    "converted": ("convert -m {moe} -o", "model: expected a dense checkpoint, got ", "which is a MoE already"),
    "scored": ("importance -m {moe} -t -d -o", "model: expected a dense checkpoint, got ", "which is a MoE already"),
    "distilled": (
        "distill -m {teacher} --teacher {teacher} -t -d -o",
        "model: expected a MoE checkpoint, or a dense one narrower than the teacher, got ", "",
    ),
    "teacher": ("distill -m {moe} --teacher {moe} -t -d -o", "teacher: expected a dense model, got a MoE", ""),
    "padding": (
        "distill -m {moe} --teacher {teacher} -t -d -o --objective_options.preset paper",
        "preset: expected padding to be ", "",
    ),
    "tables": (
        "convert -m {teacher} --importance {importance} --hash-tables {at}/tables.json -o",
        "hash-tables: expected shape ", "got (4,)",
    ),
    "size": (
        "convert -m {teacher} --importance {importance} --expert-size 30 --num-shared-neurons 4 -o",
        "expert-size: expected at most 11 for 4 experts with 4 shared of the dense layer's 32 neurons (or"
        " num_shared_neurons >= ", "",
    ),
    "scores": ("convert -m {teacher} --importance {at}/scores -o", "importance: expected a whole safetensors ", ""),
    "original": ("convert --from-original {teacher}/best -o", "checkpoint: expected experts of the ", "is for convert"),
    "neither": ("convert -o", "model: expected either --model or --from-original, got neither", ""),
    "length": ("eval -m {teacher} -t -d --max-length 99", "max-length: expected at most 24, the model's ", "got 99"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name, base, teacher, moe, importance, data, written):
    text, begin, end = WRONG[name]
    places = {"base": base, "teacher": teacher, "moe": moe, "importance": importance, "data": data, "at": written}
    short = {"-m": ("--model",), "-t": TABLE, "-d": ("--data", data), "-o": ("--output", written / "out")}
    line = refused(*(part for word in text.split() for part in short.get(word, (word.format(**places),))))
    assert line.startswith(begin) and line.endswith(end)
    assert (written / "out").exists() == (name == "padding")  # where a run begins


def test_a_model_without_a_tokenizer(teacher, data, tmp_path):
    model = copy(teacher / "best", tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    assert refused("eval", "--model", model, *TABLE, "--data", data).startswith("tokenizer: expected ")


def test_conversion_needs_a_tokenizer_only_to_read_text(base, data, tmp_path):
    model = copy(base, tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    words = ("convert", "--model", model, "--output", tmp_path / "moe", "--expert-size", 8)
    assert refused(*words, "--method", "chosen", *TABLE, "--data", data).startswith("tokenizer: expected ")
    for method in ("moebert", "dense"):
        result = moebert(*words, "--method", method, "--force")
        assert result.exit_code == 0 and "the model is saved without a tokenizer (" in result.stderr
        assert (tmp_path / "moe/model.safetensors").exists() and not list((tmp_path / "moe").glob("token*"))
    for command in ("student", "quantize"):
        result = moebert(command, "--model", model, "--output", tmp_path / command)
        assert result.exit_code == 0 and "the model is saved without a tokenizer (" in result.stderr
    words = ("quantize", "--model", model, "--data", data, "--output", tmp_path / "int8")
    assert refused(*words).startswith("tokenizer: expected ")


@pytest.mark.parametrize("kind", ["teacher", "moe"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_corrupt_checkpoint(kind, damage, teacher, moe, data, tmp_path):
    model = copy({"teacher": teacher / "best", "moe": moe}[kind], tmp_path / "model")
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2]) if damage == "cut" else weights.unlink()
    line = refused("eval", "--model", model, *TABLE, "--data", data)
    assert line.split(":")[0] in ("model", "checkpoint") and str(model) in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--method", "mpoe", "--importance", "a"), "importance: it is used only with --experts split; leave it out "),
        (("--method", "mpoe", "--expert-size", 7), "expert-size: expected none with experts='mpo', got 7"),
        (("--experts", "copy", "--num-shared-neurons", 0), "num-shared-neurons: expected none with experts='copy', "),
        (("--method", "mpoe", "--experts", "copy", "--sites", 3), "sites: it is used only with --experts mpo; "),
        (("--sites", 3), "sites: it is used only with --experts mpo; leave it out (got 3)"),
        (("--max-bond", 2), "max-bond: expected none with experts='split', got 2"),
        (("--noise", 0.5), "noise: it is used only with --experts copy or mpo; leave it out (got 0.5)"),
        (("--low-bonds",), "low-bonds: it is used only with --experts mpo; leave it out (got True)"),
        (("--load-balance", 0.1), "load-balance: expected none with router='hash-random', got 0.1"),
        (("--top-k", 2), "top-k: expected none with router='hash-random', got 2"),
        (("--router", "round"), "router: expected one of hash-random, hash-balance, hash-chosen, gate-token, "),
        (("--experts", "dense"), "experts: expected one of split, clustered, copy, mpo, got 'dense'"),
        (("--norm", "both"), "norm: expected one of expert, layer, got 'both'"),
        (("--task", "sst2", "--router", "hash-random"), "task: it is used only with --method chosen, "),
        (("--router", "switch", "--hash-tables", "a"), "hash-tables: it is used only with --router hash-"),
        (("--method", "moe"), "method: expected one of moebert, chosen, mpoe, dense, got 'moe'"),
        (("--method", "dense", "--num-experts", 4), "num-experts: it is used only with --method moebert or "),
        (("--method", "dense", "--route-padding"), "route-padding: it is used only with --method moebert or mpoe; "),
        (("--method", "dense", "--hash-tables", "a"), "hash-tables: it is used only with --method moebert or mpoe; "),
        (("--router", "task", "--task", "sst2", "--data", "no.tsv"), "data: it is used only with --task and --method "),
        (("--router", "task", "--task", "sst2", "--max-length", 8), "max-length: it is used only with --task and "),
        (("--method", "moebert", "--text-column", "zzz"), "text-column: it is used only with --task and --method "),
        (("--method", "dense", "--label-column", "zzz"), "label-column: it is used only with --task and --method "),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_each_other(words, line, tmp_path):
    """Before a model is read."""
    assert refused("convert", "--model", "never-read", *words, "--output", tmp_path / "out").startswith(line)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("bench --split test", "--task"), ("bench --data no.tsv", "--task"), ("bench --text-column a", "--task"),
        ("quantize --split test", "--task"), ("quantize --data no.tsv --batch-size 2", "--task"),
        ("quantize --text-column a", "--task or --data"), ("quantize --max-length 8", "--task or --data"),
    ],
)  # fmt: skip
def test_options_of_texts_that_are_not_read(words, where):
    """Before a model is read, where no task names them."""
    name, *words = words.split()
    given = ("--against", "never-read") if name == "bench" else ("--output", "never-written")
    line = refused(name, "--model", "never-read", *given, *words)
    got = int(words[-1]) if words[-1].isdigit() else [words[-1]] if words[-2] != "--split" else words[-1]
    assert line == f"{words[-2][2:]}: it is used only with {where}; leave it out (got {got!r})"


def test_settings_of_a_teacher_where_there_is_none(base, data, tmp_path):
    words = ("--model", base, *TABLE, "--data", data, "--output", tmp_path / "out")
    for value, option in (("'zz'", ("--teacher_outputs", "zz")), ("True", ("--teacher_dropout",))):
        line = f"{option[0][2:]}: expected none without a teacher that is followed, got {value}"
        assert refused("finetune", *words, *option) == line


def test_finetune_follows_no_teacher(base, tmp_path):
    """Before its data is read."""
    words = ("finetune", "--model", base, *TABLE, "--data", tmp_path / "none.tsv", "--output", tmp_path / "out")
    for option in (("--config", "kd"), ("--objective", "layerwise")):
        line = f"{option[0][2:]}: expected one without a teacher, which moebert distill follows, got {option[1]}"
        assert refused(*words, *option) == line


@pytest.mark.parametrize("length", ["-3", "0"])
def test_lengths_that_are_training_arguments(length, base, data, tmp_path):
    """The command's own option --max-length has a least value too."""
    words = ("finetune", "--model", base, *TABLE, "--data", data, "--output", tmp_path / "out")
    line = f"max-length: expected a number of at least 8, got {length}"
    assert refused(*words, "--max_length", length) == line


@pytest.mark.parametrize(
    "words",
    [
        ("method", "mpoe"), ("task", ["sst2"]), ("importance", "file"), ("expert-size", 7), ("experts", "mpo"),
        ("noise", 0.0), ("top-k", 2),
    ],
)  # fmt: skip
def test_an_import_takes_no_options_of_a_conversion(words, tmp_path):
    name, value = words
    typed = value[0] if isinstance(value, list) else value
    line = refused("convert", "--from-original", tmp_path, f"--{name}", typed, "--output", tmp_path / "out")
    assert line == f"{name}: it is used only with --model; leave it out (got {value!r})"


def test_an_output_in_use_is_not_touched(teacher, importance, moe, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    sizes = ("--expert-size", 8, "--num-shared-neurons", 2)
    for force in ((), ("--force",)):
        line = refused("convert", "--model", teacher, "--importance", importance, *sizes, "--output", mine, *force)
        assert line.startswith("output: expected a new ")
    assert (mine / "thesis.txt").read_text() == "years of work"

    other = copy(moe, tmp_path / "moe")
    words = ("convert", "--model", teacher, "--importance", importance, *sizes, "--output", other)
    assert "with a model of other num_shared_neurons (it was 4 and is 2 now) (--force" in refused(*words)
    assert moe_config(AutoConfig.from_pretrained(other)).num_shared_neurons == 4
    done(*words, "--force")
    assert moe_config(AutoConfig.from_pretrained(other)).num_shared_neurons == 2


def test_outputs_that_cannot_be_written(base, teacher, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "out"
    for words in (
        ("finetune", "--model", base, *TABLE, "--data", data),
        ("importance", "--model", teacher, *TABLE, "--data", data),
        ("convert", "--model", teacher),
        ("demo", "--quick"),
    ):
        assert refused(*words, "--output", below).startswith("output: expected a folder that can be written, got ")
    assert (tmp_path / "file").read_text() == "mine"


def test_another_run_in_the_output_is_not_overwritten(base, teacher, data):
    words = ("--model", base, *TABLE, "--data", data, "--output", teacher, *TRAINING)
    assert refused("finetune", *words, "--seed", 5) == (
        f"output: expected a new folder or one of the same run, got {teacher} with a finished run of other seed (it was"
        " 0 and is 5 now) (--force replaces it, another --output keeps it)"
    )


def test_a_half_written_importance_file_is_done_again(teacher, importance, data, tmp_path):
    left = shutil.copy(importance, tmp_path / ".i.safetensors.of-a-killed-one.partial")
    os.utime(left, (0, 0))
    (tmp_path / "i.safetensors.unfinished").write_bytes(b"half")
    done("importance", "--model", teacher, *TABLE, "--data", data, "--output", tmp_path / "i.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.safetensors"]


def test_other_scores_in_the_output_are_kept(teacher, importance, data):
    before = importance.read_bytes()
    line = refused("importance", "--model", teacher, *TABLE, "--data", data, "--output", importance, "--split", "test")
    assert line.startswith("output: expected a new file, got ")
    assert importance.read_bytes() == before


def test_a_tokenizer_of_a_larger_vocabulary(teacher, data, tmp_path):
    model = copy(teacher / "best", tmp_path / "model")
    from tests.cli.tiny import WORDS
    from tests.distill.words import tokenizer_of

    tokenizer_of([*WORDS, "more", "words"]).save_pretrained(model)
    line = refused("eval", "--model", model, *TABLE, "--data", data)
    assert line == "tokenizer: expected at most 22 tokens, as the model has, got 24"


def test_a_tokenizer_of_more_types_of_tokens(tmp_path):
    model = write_base(tmp_path / "model", type_vocab_size=1)
    (tmp_path / "train.tsv").write_text("one\ttwo\tmood\n" + "the film\twas good\thappy\nthe film\twas bad\tsad\n" * 8)
    words = ("--task", "custom", "--text-column", "one", "--text-column", "two", "--label-column", "mood")
    words += ("--data", tmp_path / "train.tsv", "--hold-out", "0.25", "--output", tmp_path / "out")
    line = refused("finetune", "--model", model, *words)
    assert line == "tokenizer: expected token types below 1, as the model has, got 1 for a pair"


def test_bad_options(base, data, tmp_path):
    words = ("--model", base, *TABLE, "--data", data, "--output", tmp_path / "out")
    assert refused("finetune", *words, "--bf16", "int8").startswith("bf16: expected another value, got 'int8' (Truthy")
    line = refused("finetune", *words, "--lr_scheduler_type", "foo")
    assert line.startswith("lr_scheduler_type: expected another value, got 'foo' (") and "cosine" in line
    line = refused("finetune", *words, "--learning_rat", "1e-3")
    assert line == (
        "learning_rat: expected the name of a training argument, got an unknown one (the nearest is 'learning_rate')"
    )
    line = refused("finetune", *words, "--output_dir", "x")
    assert line == "output: expected none, as --output and the run's own state decide it, got 'x'"
    assert refused("finetune", *words, "stray") == "options: expected --NAME VALUE, got stray"
    assert refused("eval", "--model", base, "--task", "sst2", "--text-column", "t").startswith("text-column: expected")
    assert CliRunner().invoke(app, ["eval", "--model", str(base)]).exit_code == 2  # typer's own: --task is missing
    write_base(tmp_path / "wide", hidden_act="gelu_new")


@pytest.mark.parametrize("task", [("sst2",), ("lm",), ("lm", "--text-column", "body")])
def test_options_of_a_table_that_a_task_does_not_read(base, data, task):
    words = ("eval", "--model", base, "--data", data, "--task", *task)
    for option in (("regression",), ("label-column", "mood")):
        line = refused(*words, f"--{option[0]}", *option[1:])
        assert line == f"{option[0]}: expected it with --task custom alone, got it with --task {task[0]}"


def test_bench(base, data):
    both = ("--model", base, "--against", base)
    assert refused("bench", *both, "--length", 8, "--length", 25) == (
        "length: expected at most 24, the models' positions, got 25"
    )
    assert refused("bench", *both, "--dtype", "bf16") == (
        "dtype: expected one of float32, bfloat16, float16, got bf16"
    )  # fmt: skip
    line = refused("bench", *both, *TABLE, "--data", data, "--batch-size", 65)
    assert line == "batch-size: expected at most 64, the rows of validation, got 65"
    line = refused("bench", *both, *TABLE, "--data", data, "--seed", 5)
    assert line == "seed: it is used only with random tokens, which --task replaces; leave it out (got 5)"
