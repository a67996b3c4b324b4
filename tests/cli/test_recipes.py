"""`moebert distill --config`: students by configuration, overrides, extra text, the cache, and what is refused."""

import json

import pytest
from transformers import AutoModel, AutoTokenizer

from moebert_kernels.distill import TeacherCache
from moebert_kernels.distill.recipe import load_recipe, recipe_names
from moebert_kernels.errors import UserError
from tests.cli.tiny import TABLE, TRAINING, WORDS, done, refused, write_base
from tests.distill.words import tokenizer_of

SHORT = (*TRAINING[:4], "--num_train_epochs", "2", "--max-length", "12", "--logging_steps", "1")


@pytest.fixture(scope="module")
def small(teacher, tmp_path_factory):
    """A student of one layer, in which the head is new."""
    folder = tmp_path_factory.mktemp("small") / "bert"
    model = AutoModel.from_pretrained(teacher / "best")
    model.encoder.layer = model.encoder.layer[1:]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher / "best").save_pretrained(folder)
    return folder


def distil(output, small, teacher, data, recipe, *words):
    line = ("--config", recipe, "--model", small, *TABLE, "--data", data, "--output", output, *SHORT, *words)
    return done("distill", *line, *(() if teacher is None else ("--teacher", teacher)))


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line for line in history if "loss" in line]


@pytest.mark.parametrize(("recipe", "terms"), [
    ("microbert", {"embedding", "hidden", "alignment", "soft", "adversarial", "task"}),
    ("kd", {"soft", "task"}),
    ("finetune", {"task"}),
])  # fmt: skip
def test_recipes_train_students(recipe, terms, small, teacher, data, tmp_path):
    output = distil(tmp_path, small, None if recipe == "finetune" else teacher, data, recipe)
    assert "best on validation by accuracy" in output
    line = losses(tmp_path)[-1]
    reported = {"step", "epoch", "learning_rate", "loss", "grad_norm"}
    assert {name for name in line if not name.startswith("discriminator_")} - reported == terms
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    distil(tmp_path, small, None if recipe == "finetune" else teacher, data, recipe)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_stages(small, teacher, data, tmp_path):
    """Features first, in a folder of its own; predictions go on from there; a key for one stage."""
    distil(
        tmp_path,
        small,
        teacher,
        data,
        "microbert-two-stage",
        "--features.num_train_epochs",
        "3",
        "--teacher_outputs",
        tmp_path / "c",
    )
    first, last = losses(tmp_path / "features"), losses(tmp_path)
    assert (len(first), len(last)) == (3 * 8, 2 * 8)
    assert "task" not in first[0] and {"embedding", "hidden", "alignment"} <= set(first[0])
    assert {"soft", "adversarial", "task"} <= set(last[0]) and "hidden" not in last[0]
    assert first[-1]["hidden"] < first[0]["hidden"]


def test_lean_with_the_cache_equals_without_and_takes_texts_without_labels(small, teacher, data, tmp_path):
    (tmp_path / "more.tsv").write_text("text\n" + "".join(f"a {noun} was dull\n" for noun in ("film", "play") * 9))
    words = ("--extra-text", tmp_path / "more.tsv", "--corrupted-copies", 1, "--objective_options.distance", "cosine")
    cached = (*words, "--teacher_outputs", tmp_path / "cache")
    distil(tmp_path / "a", small, teacher, data, "microbert-lean", *words)
    distil(tmp_path / "b", small, teacher, data, "microbert-lean", *cached)
    for one, other in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    kept = TeacherCache(tmp_path / "cache").info
    assert kept.pooled and kept.stored_as == "float32"
    assert len(losses(tmp_path / "a")) == 2 * 21  # 64 + 18 texts and their copies, in eights
    (tmp_path / "more.tsv").write_text("text\n" + "the play was dull\n" * 18)
    line = refused("distill", "--config", "microbert-lean", "--model", small, "--teacher", teacher, *TABLE,
                   "--data", data, "--output", tmp_path / "c", *SHORT, *cached)  # fmt: skip
    assert "got others (another tokenizer, maximum length or data set; use another folder)" in line


def test_refusals(small, teacher, moe, data, tmp_path):
    line = ("distill", "--model", small, "--teacher", teacher, *TABLE, "--data", data, "--output", tmp_path / "o")
    kd = ("--config", "kd")
    for words, message in (
        ((*kd, "--temprature", "3"), "got an unknown one (the nearest is 'objective_options.temperature')"),
        ((*kd, "--objective_options.temperature", "hot"), "objective_options: expected arguments of MicroBertObj"),
        ((*kd, "--lr_scheduler_type", "foo"), "lr_scheduler_type: expected another value, got 'foo' (inv"),
        ((*kd, "--loss_weights.balance", "0.01"), "balance: expected the weight 0 for a model without gates"),
        ((*kd, "--loss_weights.sofd", "1"), "loss_weights: expected names among task, balance, embedding, hidden, "),
        ((*kd, "stray"), "options: expected --NAME VALUE, got stray"),
        ((*kd, "--cuda_graphs", "--pad_to_multiple_of", "8"), "cuda_graphs: expected a GPU, got cpu"),
        (("--config", "bert"), "config: expected one of finetune, kd, microbert, microbert-lean, "),
        ((*kd, "--a.learning_rate", "1"), "a: expected the name of a training argument, got an unknown one"),
        (("--num_train_epoch", "3"), "got an unknown one (the nearest is 'num_train_epochs')"),
        (("--config", "finetune", "--extra-text", "x.tsv"), "extra-text: expected a teacher to follow on texts"),
        (("--config", "finetune", "--corrupted-copies", 1), "corrupted-copies: expected a teacher to follow on texts"),
        ((*kd, "--extra-text", "x.txt"), "extra-text: expected a tsv, csv or jsonl file with text, got x.txt"),
        ((*kd, "--objective_options.layer_map", "{0: 0, 1: 7}", "--loss_weights.hidden", "1"),
         "layer_map: expected teacher states between 0 and 2"),
    ):  # fmt: skip
        assert message in refused(*line, *words)
    without = [word for word in line if word not in ("--teacher", teacher)]
    assert refused(*without, "--config", "kd") == "teacher: expected one for kd, got none"
    assert refused(*without) == "teacher: expected one, got none"


def test_refuses_another_vocabulary(small, teacher, data, tmp_path):
    other = write_base(tmp_path / "other")
    tokenizer_of(tuple(reversed(WORDS))).save_pretrained(other)
    line = refused("distill", "--config", "kd", "--model", other, "--teacher", teacher, *TABLE, "--data", data,
                   "--output", tmp_path / "o", *SHORT)  # fmt: skip
    assert line.startswith("vocabulary: expected the teacher's ") and "where it is '" in line


def test_recipes_of_the_package_and_of_ones_own(tmp_path):
    assert recipe_names() == ["finetune", "kd", "microbert", "microbert-lean", "microbert-two-stage"]
    full, lean = load_recipe("microbert").stages[0], load_recipe("microbert-lean").stages[0]
    assert full.terms == ("embedding", "hidden", "alignment", "soft", "adversarial")
    assert lean.terms == ("alignment", "soft")
    assert [stage.name for stage in load_recipe("microbert-two-stage").active] == ["features", "predictions"]
    assert not load_recipe("finetune").needs_teacher
    nothing = {f"loss_weights.{term}": "0" for term in ("alignment", "hidden", "embedding")}
    assert [stage.name for stage in load_recipe("microbert-two-stage").with_values(nothing).active] == ["predictions"]
    own = tmp_path / "own.yaml"
    own.write_text(
        "objective: microbert\nloss_weights: {soft: 1e-1}\nlearning_rate: 1e-4\nmax_length: 64\nreport_to: [a, b]\n"
        "run_name: 1e5\n"
    )
    stage = load_recipe(own).stages[0]
    assert (stage.settings["learning_rate"], stage.settings["max_length"]) == (1e-4, 64) and stage.terms == ("soft",)
    (stage,) = load_recipe(own).with_values({"objective_options.adversary.learning_rate": "2e-4"}).stages
    assert stage.settings["loss_weights"] == {"soft": 0.1} and stage.settings["run_name"] == "1e5"
    assert stage.settings["objective_options"] == {"adversary": {"learning_rate": 2e-4}}
    for text, message in (
        ("soft: [1", "config: expected YAML in "),
        ("- soft", "config: expected keys and values in "),
        ("stages: {a: 3}", "config: expected keys and values in "),
        ("max_length: 2.5", "max_length: expected another value, got 2.5 (invalid int"),
        ("max_steps: 1e3", "max_steps: expected another value, got '1e3' (invalid int"),
        ("bf16: 3", "bf16: expected another value, got 3 (Truthy value exp"),
        (
            "objective: microbert\nloss_weights: {soft: -1}",
            "loss_weights.soft: expected a number of at least 0, got -1",
        ),
        ("weights: 1", "weights: expected the name of a training argument"),
    ):
        own.write_text(text)
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            load_recipe(own)
    own.write_text("loss_weights: {task: 0}")
    with pytest.raises(UserError, match="loss_weights: expected a term with a weight above 0"):
        load_recipe(own).needs_teacher  # noqa: B018
