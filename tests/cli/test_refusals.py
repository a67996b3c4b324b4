"""Wrong input: one line that says what was wanted and what came, status 2, no traceback, and nothing lost."""

import json
import shutil

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from moebert_kernels.cli import app
from moebert_kernels.layers import moe_config
from tests.cli.tiny import SPLIT, TABLE, TRAINING, done, moebert, refused, write_base


def copy(folder, at):
    return shutil.copytree(folder, at)


def test_help_of_every_command():
    for name in (
        "doctor",
        "finetune",
        "importance",
        "convert",
        "distill",
        "merge",
        "student",
        "eval",
        "bench",
        "demo",
    ):
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert name == "doctor" or "--output" in result.output


def test_unknown_task(base, tmp_path):
    line = refused("finetune", "--model", base, "--task", "sst-2", "--output", tmp_path / "out")
    assert line.startswith("task: expected one of cola, sst2,") and line.endswith("got 'sst-2'")


def test_missing_file(base, tmp_path):
    line = refused("finetune", "--model", base, "--task", "sst2", "--data", tmp_path / "no.tsv", "--output", tmp_path)
    assert line.startswith("data: expected a file or a folder, got ")


def test_missing_column(base, data, tmp_path):
    line = refused("finetune", "--model", base, "--task", "sst2", "--data", data, "--output", tmp_path / "out")
    assert line.startswith("data: expected a column sentence in ") and line.endswith("got text, mood")


def test_missing_split(base, data, tmp_path):
    words = ("--model", base, *TABLE, "--data", data / "train.tsv", "--output", tmp_path / "out")
    assert refused("finetune", *words).startswith("data: expected a validation split, got train")


def test_labels_that_the_model_does_not_have(teacher, tmp_path):
    (tmp_path / "dev.tsv").write_text("text\tmood\nthe film was good\thappy\na book\tangry\n")
    line = refused("eval", "--model", teacher, *TABLE, "--data", tmp_path)
    assert line.startswith("mood: expected one of happy, sad in ") and line.endswith("row 2, got 'angry'")


def test_a_model_of_another_task(teacher, tmp_path):
    (tmp_path / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta film\ta play\tentailment\n")
    line = refused("eval", "--model", teacher, "--task", "rte", "--data", tmp_path)
    assert line == ("labels: expected the model's 2 (happy, sad), got 2 in task rte (entailment, not_entailment)")


def test_a_model_that_is_not_fine_tuned(base, data):
    line = refused("eval", "--model", base, *TABLE, "--data", data)
    assert line.startswith("model: expected a checkpoint fine-tuned on custom, got ") and "(no classifier.bias)" in line


def test_missing_model(data, tmp_path):
    line = refused("eval", "--model", tmp_path / "no", *TABLE, "--data", data)
    assert line.startswith("model: expected a folder or a model's name on the Hub, got ")
    (tmp_path / "empty").mkdir()
    line = refused("eval", "--model", tmp_path / "empty", *TABLE, "--data", data)
    assert line.startswith("model: expected a folder with a config.json, got ")


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


@pytest.mark.parametrize("kind", ["teacher", "moe"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_corrupt_checkpoint(kind, damage, teacher, moe, data, tmp_path):
    model = copy({"teacher": teacher / "best", "moe": moe}[kind], tmp_path / "model")
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2]) if damage == "cut" else weights.unlink()
    line = refused("eval", "--model", model, *TABLE, "--data", data)
    assert line.split(":")[0] in ("model", "checkpoint") and str(model) in line


def test_a_moe_is_not_converted_again(moe, tmp_path):
    line = refused("convert", "--model", moe, "--output", tmp_path / "out")
    assert line == f"model: expected a dense checkpoint, got {moe}, which is a MoE already"
    assert not (tmp_path / "out").exists()


def test_a_moe_is_not_scored(moe, data, tmp_path):
    line = refused("importance", "--model", moe, *TABLE, "--data", data, "--output", tmp_path / "i.safetensors")
    assert line.endswith("which is a MoE already")


def test_a_dense_model_is_not_distilled(teacher, data, tmp_path):
    words = ("--model", teacher, "--teacher", teacher, *TABLE, "--data", data, "--output", tmp_path / "out")
    line = refused("distill", *words)
    assert line.startswith("model: expected a MoE checkpoint, or a dense one narrower than the teacher, got ")


def test_a_moe_is_no_teacher(moe, data, tmp_path):
    words = ("--model", moe, "--teacher", moe, *TABLE, "--data", data, "--output", tmp_path / "out")
    assert refused("distill", *words).startswith("teacher: expected a dense model, got a MoE")


def test_mixing_the_published_loss_with_skipped_padding(teacher, moe, data, tmp_path):
    line = refused("distill", "--model", moe, "--teacher", teacher, *TABLE, "--data", data,
                   "--objective_options.preset", "paper", "--output", tmp_path / "out", *TRAINING)  # fmt: skip
    assert "padding" in line


def test_tables_for_another_vocabulary(teacher, importance, tmp_path):
    (tmp_path / "tables.json").write_text(json.dumps([0, 1, 2, 3]))
    line = refused("convert", "--model", teacher, "--importance", importance, *SPLIT,
                   "--hash-tables", tmp_path / "tables.json", "--output", tmp_path / "out")  # fmt: skip
    assert line.startswith("hash-tables: expected shape ") and "got (4,)" in line


def test_an_expert_size_that_cannot_be_filled(teacher, importance, tmp_path):
    words = ("--importance", importance, "--expert-size", 30, "--num-shared-neurons", 4, "--output", tmp_path / "out")
    assert refused("convert", "--model", teacher, *words).startswith(
        "expert-size: expected at most 11 for 4 experts with 4 shared of the dense layer's 32 neurons (or"
        " num_shared_neurons >= "
    )


def test_importance_of_another_model(teacher, tmp_path):
    (tmp_path / "i.safetensors").write_bytes(b"not scores")
    line = refused(
        "convert", "--model", teacher, "--importance", tmp_path / "i.safetensors", "--output", tmp_path / "o"
    )
    assert line.startswith("importance: expected a whole safetensors file, got ")


def test_from_original_wants_a_checkpoint_of_the_original(teacher, tmp_path):
    line = refused("convert", "--from-original", teacher / "best", "--output", tmp_path / "out")
    assert line.startswith("checkpoint: expected experts of the original MoEBERT, got none")
    line = refused("convert", "--output", tmp_path / "out")
    assert line == "model: expected either --model or --from-original, got neither"


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
    ],
)  # fmt: skip
def test_options_that_do_not_fit_each_other(words, line, tmp_path):
    """Before a model is read."""
    assert refused("convert", "--model", "never-read", *words, "--output", tmp_path / "out").startswith(line)


@pytest.mark.parametrize(
    "words",
    [("method", "mpoe"), ("importance", "file"), ("expert-size", 7), ("experts", "mpo"), ("noise", 0.0), ("top-k", 2)],
)
def test_an_import_takes_no_options_of_a_conversion(words, tmp_path):
    name, value = words
    line = refused("convert", "--from-original", tmp_path, f"--{name}", value, "--output", tmp_path / "out")
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
    assert "is in use (--force replaces it)" in refused(*words)
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
    shutil.copy(importance, tmp_path / "i.safetensors.partial")
    (tmp_path / "i.safetensors.unfinished").write_bytes(b"half")
    done("importance", "--model", teacher, *TABLE, "--data", data, "--output", tmp_path / "i.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.safetensors"]


def test_other_scores_in_the_output_are_kept(teacher, importance, data):
    before = importance.read_bytes()
    line = refused("importance", "--model", teacher, *TABLE, "--data", data, "--output", importance, "--split", "test")
    assert line.startswith("output: expected a new file, got ")
    assert importance.read_bytes() == before


def test_texts_longer_than_the_model(teacher, data):
    line = refused("eval", "--model", teacher, *TABLE, "--data", data, "--max-length", 99)
    assert line == "max-length: expected at most 24, the model's positions, got 99"


def test_a_tokenizer_of_a_larger_vocabulary(teacher, data, tmp_path):
    model = copy(teacher / "best", tmp_path / "model")
    from tests.cli.tiny import WORDS
    from tests.distill.words import tokenizer_of

    tokenizer_of([*WORDS, "more", "words"]).save_pretrained(model)
    line = refused("eval", "--model", model, *TABLE, "--data", data)
    assert line == "tokenizer: expected at most 22 tokens, as the model has, got 24"


def test_bad_options(base, data, tmp_path):
    words = ("--model", base, *TABLE, "--data", data, "--output", tmp_path / "out")
    assert refused("finetune", *words, "--bf16", "int8") == "bf16: expected true or false, got 'int8'"
    line = refused("finetune", *words, "--lr_scheduler_type", "foo")
    assert line.startswith("lr_scheduler_type: expected one of linear, cosine, ") and line.endswith("got 'foo'")
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
