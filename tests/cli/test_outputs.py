"""What --output may be, in every command that writes: nothing that moebert did not write itself is touched."""

import json
import shutil

import pytest
from typer.main import get_command

from moebert_kernels import files
from moebert_kernels.cli import app, outputs
from moebert_kernels.cli.outputs import NOTE, already_written, check_output, claim, write_model
from moebert_kernels.cli.recipe import arguments
from moebert_kernels.cli.running import at_home
from moebert_kernels.errors import UserError
from tests.cli.tiny import TABLE, TRAINING, done, moebert, refused
from tests.convert.models import dense_model
from tests.distill.tiny_run import interrupt


def command_words(name, model, data):
    """The command as it would be typed with this model and data, but for --output."""
    trained = ("--task", "sst2", "--data", data)
    return {
        "finetune": ("finetune", "--model", model, *TABLE, "--data", data),
        "distill": ("distill", "--model", model, "--teacher", model, *TABLE, "--data", data),
        "ablate": ("ablate", "--model", model, "--teacher", model, "--arm", "full", *trained[:2]),
        "convert": ("convert", "--model", model),
        "merge": ("merge", "--model", model, "--task", "sst2"),
        "student": ("student", "--model", model),
        "quantize": ("quantize", "--model", model),
        "export": ("export", "--model", model),
        "demo": ("demo", "--quick"),
    }[name]


def test_every_command_that_writes_a_folder_is_looked_at():
    """A new command that writes a folder must be added above, and so to the tests below."""
    for name, command in get_command(app).commands.items():
        output = next((parameter for parameter in command.params if "--output" in parameter.opts), None)
        if output is not None and output.metavar == "FOLDER":
            assert command_words(name, "model", "data")[0] == name


FOLDER_COMMANDS = ("finetune", "distill", "ablate", "convert", "merge", "student", "quantize", "export", "demo")


@pytest.mark.parametrize("name", FOLDER_COMMANDS)
def test_a_folder_with_other_things_is_refused(name, base, data, tmp_path):
    (tmp_path / "best").write_text("my notes")
    line = refused(*command_words(name, base, data), "--output", tmp_path)
    assert line == (
        f"output: expected a new or empty folder, got {tmp_path}, which holds things that moebert did not write (best)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("name", FOLDER_COMMANDS[:-1])
@pytest.mark.parametrize("place", ["itself", "above", "best of a run"])
def test_the_folder_of_a_model_that_is_read_is_refused(name, place, base, data, tmp_path):
    model = tmp_path / "run" / "best"
    shutil.copytree(base, model)
    before = sorted(path.name for path in model.iterdir())
    read, output = {
        "itself": (model, model / "." / ".." / "best"),
        "above": (model, tmp_path / "run"),
        "best of a run": (tmp_path / "run", model),
    }[place]
    line = refused(*command_words(name, read, data), "--output", output)
    assert line == f"output: expected another folder than that of a model which is read, got {output}"
    assert sorted(path.name for path in model.iterdir()) == before


@pytest.mark.parametrize("name", [*FOLDER_COMMANDS, "importance", "eval", "bench"])
def test_an_empty_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {
        "importance": ("importance", "--model", "m", "--task", "sst2"),
        "eval": ("eval", "--model", "m", "--task", "sst2"),
        "bench": ("bench", "--model", "m", "--against", "m"),
    }.get(name) or command_words(name, "m", "d")
    result = moebert(*words, "--output", "")
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert "expected a path, got an empty one" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("name", "key"), [("eval", "splits"), ("bench", "cases"), ("importance", None)], ids=lambda value: str(value)
)
def test_a_file_of_somebody_else_is_refused(name, key, base, data, tmp_path):
    words = {
        "importance": ("importance", "--model", base, *TABLE, "--data", data, "--force"),
        "eval": ("eval", "--model", base, *TABLE, "--data", data),
        "bench": ("bench", "--model", base, "--against", base),
    }[name]
    for content in ('{"hidden_size": 32}', "[]", "years of work"):
        (tmp_path / "mine").write_text(content)
        line = refused(*words, "--output", tmp_path / "mine")
        assert line == f"output: expected a new file, got {tmp_path / 'mine'}, which moebert did not write"
        assert (tmp_path / "mine").read_text() == content
    assert refused(*words, "--output", tmp_path).startswith("output: expected a file, such as ")
    weights = base / "model.safetensors"
    before = weights.read_bytes()
    assert refused(*words, "--output", weights).startswith("output: expected a new file, got ")
    assert weights.read_bytes() == before


def test_a_chart_replaces_nothing_but_a_chart(base, tmp_path, monkeypatch):
    """And is looked at before the models are timed; the result is saved before it is drawn."""
    words = ("bench", "--model", base, "--against", base, "--form", "float32", "--task", "sst2", "--output", "r.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.tsv").write_text("my data")
    line = refused(*words, "--chart", "three.tsv")
    assert line == "chart: expected a new file, got three.tsv, which moebert did not write"
    assert (tmp_path / "three.tsv").read_text() == "my data"
    assert refused(*words, "--chart", ".") == "chart: expected a file, such as chart.png, got the folder ."
    assert refused(*words, "--chart", "./r.json") == "chart: expected another file than --output, got r.json"


def test_an_earlier_result_is_replaced(teacher, data, tmp_path):
    words = ("eval", "--model", teacher, *TABLE, "--data", data, "--output", tmp_path / "result.json")
    done(*words)
    done(*words)
    assert json.loads((tmp_path / "result.json").read_text())["splits"]["validation"]["examples"] == 64


def test_force_replaces_a_model_and_not_what_was_put_beside_it(tmp_path):
    folder, identity = tmp_path / "out", {"command": "convert", "seed": 0}
    assert not already_written(folder, identity, force=False)
    write_model(folder, dense_model("bert"), None, identity)
    assert already_written(folder, identity, force=False)
    other = {"command": "student", "seed": 0}
    with pytest.raises(UserError, match=r"expected a new or empty folder, .* which moebert convert wrote \(--force"):
        already_written(folder, other, force=False)
    with pytest.raises(UserError, match=r"with a model of other seed \(it was 0 and is 1 now\) \(--force replaces it"):
        already_written(folder, identity | {"seed": 1}, force=False)
    assert not already_written(folder, other, force=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"output: expected a folder with a model alone, .* which holds thesis\.txt"):
        already_written(folder, other, force=True)


@pytest.mark.parametrize("name", ["convert", "merge", "student", "quantize", "export"])
def test_a_folder_that_cannot_be_replaced_whole_is_refused_before_any_work(name, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, wanted = command_words(name, base, ""), "output: expected a folder that can be replaced whole, got"
    assert refused(*words, "--output", ".") == f"{wanted} ., which is the current folder"
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(outputs.os.path, "ismount", lambda path: path == tmp_path / "disk")
    assert refused(*words, "--output", "disk") == f"{wanted} disk, which is a mount point"


def test_a_model_needs_a_parent_that_can_be_written_and_a_run_its_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "check_writable", lambda name, folder: asked.append(folder))
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    (tmp_path / "disk" / "out").mkdir(parents=True)
    for command in ("convert", "finetune"):
        check_output(tmp_path / "link", command)
    assert asked == [tmp_path / "disk", tmp_path / "disk" / "out"]


def test_a_link_leads_to_the_model_that_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for seed in (0, 1):
        write_model(tmp_path / "link", dense_model("bert"), None, {"command": "convert", "seed": seed})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/out/config.json").exists()
    assert sorted(path.name for path in tmp_path.rglob("*out*")) == ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_tilde_is_the_users_folder(base, data, tmp_path, monkeypatch):
    """Also where the shell leaves it, behind the = of an option or of SPLIT=FILE."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "bert")
    done("convert", "--model=~/bert", "--output=~/out")
    assert "is there already" in done("convert", "--model", tmp_path / "bert", "--output", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "out"]
    assert at_home(["train=~/a.tsv", "a~b", "~/c"]) == [f"train={tmp_path}/a.tsv", "a~b", f"{tmp_path}/c"]
    assert arguments(["--teacher_outputs=~/kept"]) == {"teacher_outputs": f"{tmp_path}/kept"}


def test_a_run_goes_on_only_in_its_own_folder(tmp_path):
    check_output(tmp_path / "new", "finetune")
    assert not (tmp_path / "new").exists()  # a refusal later on leaves nothing behind
    claim(tmp_path, "finetune")
    check_output(tmp_path, "finetune")
    with pytest.raises(UserError, match=r"output: expected a new or empty folder, .* which moebert finetune wrote"):
        check_output(tmp_path, "distill")
    (tmp_path / NOTE).write_text("damaged")
    with pytest.raises(UserError, match="which holds things that moebert did not write"):
        check_output(tmp_path, "finetune")


def test_only_force_replaces_a_finished_model(base, teacher, data, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(teacher, output)
    weights = (output / "best" / "model.safetensors").read_bytes()
    words = ("finetune", "--model", base, *TABLE, "--data", data, "--output", output, *TRAINING)
    assert "(--force replaces it, another --output keeps it)" in refused(*words, "--num_train_epochs", 1)
    assert (output / "best" / "model.safetensors").read_bytes() == weights
    done(*words, "--num_train_epochs", 1, "--force")
    assert (output / "best" / "model.safetensors").read_bytes() != weights


def test_an_unfinished_run_is_dropped_by_force_and_named_as_a_model(base, data, tmp_path, monkeypatch):
    """Its checkpoint is there, its end is not."""
    output = tmp_path / "out"
    words = ("finetune", "--model", base, *TABLE, "--data", data, "--output", output, *TRAINING)
    with monkeypatch.context() as patched:
        interrupt(patched, 3)
        assert moebert(*words).exit_code == 130
    assert refused(*words, "--learning_rate", "1e-3") == (
        f"output: expected a new folder or one of the same run, got {output} with an unfinished run of other"
        " learning_rate (it was 0.01 and is 0.001 now) (--force replaces it, another --output keeps it)"
    )
    evaluation = ("eval", "--model", output, *TABLE, "--data", data)
    assert refused(*evaluation) == (
        f"model: expected a finished run, got {output}, whose run is unfinished and has no model yet; its command goes"
        " on with it when it is run again"
    )
    done(*words, "--learning_rate", "1e-3", "--num_train_epochs", 1, "--force")
