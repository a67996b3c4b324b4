"""What the commands say: defaults in their help, settings before a run, and options in messages as they are typed."""

import inspect
import re
import shutil

import pytest
from transformers import BertConfig
from typer.main import get_command

from moebert_kernels.cli import app
from moebert_kernels.cli.inputs import Reader
from moebert_kernels.cli.options import defaults_by_task
from moebert_kernels.cli.running import as_typed, print_settings
from moebert_kernels.data.tasks import TASKS, load_task
from moebert_kernels.distill.settings import names
from tests.cli.tiny import TABLE, TRAINING, moebert, refused
from tests.distill.words import tokenizer_of

COMMANDS = get_command(app).commands
BARS = re.compile("Flattening|Map|Filter|Writing|Loading weights")


def printed_by(*words):
    """What a command prints on standard output, where no bars are."""
    result = moebert(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_help_says_what_holds_without_each_option():
    silent = [
        f"{name} {parameter.opts[0]}: {parameter.help}"
        for name, command in COMMANDS.items()
        for parameter in command.params
        if not parameter.required
        and parameter.default is None
        and not re.search("Default|Without", parameter.help or "")
    ]
    assert silent == []


def test_every_option_has_a_help_text_that_stands_alone():
    short = [
        f"{name} {parameter.opts[0]}: {parameter.help}"
        for name, command in COMMANDS.items()
        for parameter in command.params
        if not parameter.help or re.search(r"\b[Aa]s for \w+", parameter.help)
    ]
    assert short == []


def test_help_lists_the_defaults_of_each_task():
    rows = defaults_by_task().split("\n\n")
    for task in (*TASKS, "custom"):
        assert sum(task in row.partition(": --")[0].split(", ") for row in rows) == 1
    assert (
        "sst2: --learning_rate 2e-05 --per_device_train_batch_size 16 --num_train_epochs 5 --weight_decay 0.0"
        " --max-length 512 (distillation terms 1.0)"
    ) in rows
    for name in ("finetune", "distill"):
        assert COMMANDS[name].epilog.endswith(defaults_by_task())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name):
    """Of options that there are."""
    example = COMMANDS[name].epilog.partition("\n")[0]
    assert example.startswith(f"Example: moebert {name}")
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    known |= {f"--{argument}" for argument in names()}
    assert {word for word in example.split() if word.startswith("--")} <= known
    assert printed_by(name, "--help")


def test_parameters_are_called_as_their_options():
    """So that a message can name the option of a value."""
    for command in COMMANDS.values():
        for parameter in command.params:
            if parameter.name not in ("help", "as_json"):
                assert set(parameter.opts) == {f"--{parameter.name.replace('_', '-')}"}
        taken = set(inspect.signature(command.callback).parameters)
        assert taken >= {p.name for p in command.params} - {"help"}


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("mixed_precision: expected 'no', got 'int8'", "--mixed-precision: expected 'no', got 'int8'"),
        ("text_columns: expected one or two names, got 3", "--text-column: expected one or two names, got 3"),
        ("text-column: expected one, got 2", "--text-column: expected one, got 2"),
        ("output_dir: expected a folder, got a/text_column", "--output: expected a folder, got a/text_column"),
        ("tables: expected integers, got expert_size", "--hash-tables: expected integers, got expert_size"),
        ("width: expected 1 to 32, got 99", "--expert-size: expected 1 to 32, got 99"),
        ("nothing of the kind", "nothing of the kind"),
        (
            "output_dir: expected a new folder, got out (resume=False replaces it, another output_dir keeps it)",
            "--output: expected a new folder, got out (--force replaces it, another --output keeps it)",
        ),
    ],
)
def test_messages_name_options_as_they_are_typed(message, wanted):
    options = {"mixed_precision", "text_column", "expert_size", "output", "hash_tables"}
    assert as_typed(message, options) == wanted


def test_a_refusal_names_the_option_as_it_is_typed(base, data, tmp_path):
    words = ("finetune", "--model", base, "--output", tmp_path / "out", "--data", data)
    for more, start in (
        ((*TABLE, "--bf16", "int8"), "bf16: expected another value, got 'int8' (Truthy value expected"),
        (("--task", "custom", *(("--text-column", "text") * 3)), "--text-column: expected one or two names, got 3"),
        ((*TABLE, "--learning_rate", "inf"), "learning_rate: expected a number of at least 0, got inf"),
    ):
        assert f"moebert: {start}" in moebert(*words, *more).stderr
    words = ("distill", "--model", base, "--teacher", base, *TABLE, "--output", tmp_path / "other", "--data", data)
    line = refused(*words, "--loss_weights.hidden", ".inf")
    assert line == "loss_weights.hidden: expected a number of at least 0, got inf"


def test_settings_are_printed_as_they_would_be_typed(capsys):
    settings = {"num_train_epochs": 3, "max_steps": None, "shared_fold": True, "bf16": False}
    print_settings(settings | {"loss_weights": {"soft": 1.0, "task": 0.5}}, prefix="features.")
    assert capsys.readouterr().out == (
        "settings: --features.num_train_epochs 3 --features.shared_fold --features.loss_weights.soft 1.0"
        " --features.loss_weights.task 0.5\n"
    )


def test_a_run_says_its_settings_before_it_starts(base, teacher, data, tmp_path):
    wanted = (
        "settings: --seed 4 --learning_rate 3e-05 --per_device_train_batch_size 16 --num_train_epochs 3"
        " --weight_decay 0.0 --gradient_accumulation_steps 2 --max_steps 1 --max_length 24"
    )
    words = ("finetune", "--model", base, *TABLE, "--data", data, "--gradient_accumulation_steps", 2, "--seed", 4)
    output = printed_by(*words, "--max_steps", 1, "--output", tmp_path / "out")
    assert wanted in output.splitlines()
    assert output.index(wanted) < output.index("best on validation")
    words = ("distill", "--config", "kd", "--model", base, "--teacher", teacher, *TABLE, "--data", data, *TRAINING)
    line = printed_by(*words, "--max_steps", 1, "--output", tmp_path / "kd").splitlines()[0]
    assert line == (
        "settings: --seed 0 --objective microbert --loss_weights.task 0.5 --loss_weights.soft 1.0"
        " --objective_options.temperature 2.0 --num_train_epochs 8.0 --learning_rate 0.01 --warmup_steps 0.1"
        " --weight_decay 0.01 --per_device_train_batch_size 8 --max_length 12 --max_steps 1"
    )


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_names_of_the_validation_split(name, teacher, data):
    words = ("eval", "--model", teacher, *TABLE)
    by_folder = printed_by(*words, "--data", data, "--split", name)
    files = ("--data", f"train={data / 'train.tsv'}", "--data", f"{name}={data / 'dev.tsv'}")
    assert printed_by(*words, *files) == by_folder and by_folder.startswith("validation (64 examples)")


def test_the_data_that_is_wrong_is_named(teacher, data, tmp_path):
    words, train = ("eval", "--model", teacher, *TABLE), f"train={data / 'train.tsv'}"
    names = "train, validation, validation_mismatched, test, valid, val, dev"
    for entries, got in (
        ((train, f"eval={data / 'dev.tsv'}"), f"eval={data / 'dev.tsv'}"),
        ((train, str(data)), str(data)),
        ((train, "dev="), "dev="),
        (("held=a.tsv",), "held=a.tsv"),
    ):
        options = [word for entry in entries for word in ("--data", entry)]
        line = f"data: expected SPLIT=FILE with SPLIT one of {names}, got {got}"
        assert refused(*words, *options) == line
    one, other = data / "dev.tsv", data / "test.csv"
    line = refused(*words, "--data", f"valid={one}", "--data", f"dev={other}")
    assert line == f"data: expected one file for each split, got {one} and {other} for validation"
    line = refused(*words, "--data", data, "--split", "held")
    assert line == "split: expected one of train, validation, validation_mismatched, test, got held"


def test_a_wrong_model_is_named_by_its_option_before_data_is_read(base, teacher, tmp_path):
    """The data is missing too, and is not what the refusal is about."""
    missing, empty = tmp_path / "none.tsv", tmp_path / "empty"
    empty.mkdir()
    data, out = ("--data", missing), ("--output", tmp_path / "out")
    for option, words in (
        ("model", ("finetune", *TABLE, *data, *out)),
        ("model", ("importance", *TABLE, *data, *out)),
        ("model", ("eval", *TABLE, *data)),
        ("model", ("convert", *data, "--task", "sst2", "--router", "hash-balance", *out)),
        ("model", ("student", *out)),
        ("model", ("merge", "--task", "sst2", *out)),
        ("teacher", ("distill", "--model", base, *TABLE, *data, *out)),
        ("against", ("bench", "--model", base, *TABLE, *data)),
        ("init", ("student", "--model", base, *out)),
        ("dense-teacher", ("ablate", "--model", base, "--teacher", base, "--task", "sst2", *out)),
    ):
        line = refused(*words, f"--{option}", "nosuch")
        start = (
            f"{option}: expected a folder or a model's name on the Hub, got nosuch: no such folder, and not a Hub name"
        )
        assert line.startswith(start)
        assert refused(*words, f"--{option}", empty) == (
            f"{option}: expected a folder with a config.json, got {empty}, which has none"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_named(file, teacher, data, tmp_path):
    model = shutil.copytree(teacher / "best", tmp_path / "model")
    content = (model / file).read_bytes()
    (model / file).write_bytes(content[: len(content) // 2])
    line = refused("eval", "--model", model, *TABLE, "--data", data)
    assert re.match(r"(model|tokenizer): expected a whole file, got a damaged ", line) and str(model / file) in line


def test_bars_of_other_libraries_do_not_show(teacher, importance, data, tmp_path):
    """`datasets` shows bars for rows that are held out or numbered anew, transformers for weights."""
    (tmp_path / "data").mkdir()
    for name in ("train", "dev"):
        shutil.copy(data / f"{name}.tsv", tmp_path / "data")
    words = ("--model", teacher, *TABLE, "--data", tmp_path / "data", "--hold-out", "halves")
    for result in (
        moebert("eval", *words, "--split", "test"),
        moebert("convert", "--model", teacher, "--importance", importance, "--output", tmp_path / "moe"),
    ):
        assert result.exit_code == 0 and not BARS.search(result.stderr)


def test_no_bar_for_classes_in_another_order(tmp_path, capfd):
    rows = "sentence\tlabel\nthe film was good\t1\na dull play\t0\n"
    (tmp_path / "dev.tsv").write_text(rows)
    config, tokenizer = BertConfig(id2label={0: "positive", 1: "negative"}), tokenizer_of(("film",))
    labels = Reader(load_task("sst2", tmp_path), config, tokenizer).data.validation["label"]
    assert list(labels) == [0, 1] and not BARS.search(capfd.readouterr().err)


def test_importance_and_conversion_say_what_they_found(teacher, importance, data, tmp_path):
    printed = printed_by("importance", "--model", teacher, *TABLE, "--data", data, "--output", importance)
    share = r"\d+\.\d % on average, \d+\.\d % in layer [12], which keeps least"
    wanted = rf"64 examples of train: scores of 2 layers x 32 neurons; the most important 8 of a layer hold {share}\n"
    assert re.match(wanted, printed)
    words = ("convert", "--model", teacher)
    printed = printed_by(*words, "--importance", importance, "--output", tmp_path / "moe").splitlines()
    assert printed[0] == "4 experts of 8 neurons of the dense layer's 32, 5 of them in every expert"
    count = r"parameters: ([\d,]+), of which a token meets ([\d,]+); the dense model has ([\d,]+)"
    total, active, dense = (int(n.replace(",", "")) for n in re.fullmatch(count, printed[1]).groups())
    assert active < total and active < dense
    assert re.fullmatch(f"importance kept by an expert: {share}", printed[2])
    assert printed[3] == f"saved in {tmp_path / 'moe'}"
    result = moebert(*words, "--method", "dense", "--output", tmp_path / "dense")
    printed = result.stdout.splitlines()
    assert printed[0] == "8 neurons of the dense layer's 32"
    assert printed[2].startswith("importance kept: not known, as no --importance was given")
    assert "no importance scores given: neurons are ranked at random" in result.stderr
