"""The model card: code that runs, numbers that are right, and nothing of a person's lost."""

import copy
import pickle

import pytest
import torch

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.convert.card import card, parameter_counts, save_with_card, write_card
from moebert_kernels.layers import MoEConfig
from moebert_kernels.serve import prepare
from tests.convert import mpoe_models
from tests.convert.models import dense_model, moe_model


def mpoe(name, **fields):
    return convert_to_moe(mpoe_models.dense(name), MoEConfig.mpoe(**fields), num_sites=3)


MODELS = {
    "hash": moe_model,
    "gate": lambda: moe_model("bert-mlm", router="gate-token"),
    "task": lambda: moe_model(router="task", tasks=["a", "b"]),
    "qa": lambda: moe_model("roberta-qa"),
    "encoder": lambda: moe_model("bert"),
    "mpoe": lambda: mpoe("t5", router="top2", num_experts=3),
    "switch": lambda: mpoe("gpt2", num_experts=3, experts="copy"),
    "dense": lambda: dense_model("bert-cls"),
    "int8": lambda: prepare(moe_model(), "int8"),
    "dense-int8": lambda: prepare(dense_model("bert-cls"), "int8-token"),
}


def rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: value for name, value in lines}


@pytest.mark.parametrize("kind", MODELS)
def test_its_code_loads_the_model(kind, tmp_path):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    if kind == "dense":
        write_card(model, tmp_path)
    code = (tmp_path / "README.md").read_text().split("```")[1].removeprefix("python\n")
    assert len(code.splitlines()) == (2 if kind == "dense" else 3)
    names = {}
    exec(code.replace("path/to/this/folder", str(tmp_path)), names)
    assert type(names["model"]) is type(model)
    assert ("moebert_kernels.convert" in code) == (kind != "dense" and "int8" not in kind)
    assert ("moebert_kernels.serve" in code) == ("int8" in kind)


def test_a_converted_model_is_saved_with_its_numbers(tmp_path):
    model = moe_model()
    save_with_card(model, tmp_path)
    found = rows((tmp_path / "README.md").read_text())
    assert found["class"] == "BertForSequenceClassification" and found["router"] == "hash-random"
    assert found["experts of a layer"] == "4, of which a token meets 1"
    assert (found["layers with experts"], found["neurons of an expert"]) == ("2", "12")
    expert = 12 * 16 + 12 + 16 * 12 + 16 + 2 * 16  # two matrices, two biases, a norm
    total = sum(p.numel() for p in model.parameters())
    assert found["parameters"] == f"{total:,}"
    assert found["parameters that a token meets"] == f"{total - 2 * 3 * expert:,}"


def test_parameters_that_a_token_meets():
    """Of 3 experts 2, with all of what they share."""
    model = MODELS["mpoe"]()
    total, active = parameter_counts(model).values()
    aux = sum(p.numel() for name, p in model.named_parameters() if ".aux." in name)
    assert total - active == aux // 3 and aux > 0
    total, active = parameter_counts(MODELS["task"]()).values()
    expert = 12 * 16 + 12 + 16 * 12 + 16  # the norm is the layer's
    assert total - active == 2 * 2 * expert
    assert len(set(parameter_counts(MODELS["dense"]()).values())) == 1


def test_a_plain_save_writes_the_card(tmp_path):
    """And of a loaded model too; a prepared one has a card of its own."""
    model = moe_model()
    model.save_pretrained(tmp_path / "moe")
    text = (tmp_path / "moe/README.md").read_text()
    assert text.startswith(card(model))
    loaded = type(model).from_pretrained(tmp_path / "moe")
    for kind in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded), loaded):
        kind.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again/README.md").read_text() == text
        (tmp_path / "again/README.md").unlink()
    model.save_pretrained(tmp_path / "again", is_main_process=False)
    assert not (tmp_path / "again/README.md").exists()
    batch = {"input_ids": torch.arange(8).view(2, 4) + 5}
    prepare(loaded, "int8", batches=[batch]).save_pretrained(tmp_path / "again")
    found = rows((tmp_path / "again/README.md").read_text())
    assert found["form"] == "int8" and found["calibrated"].startswith("yes; a scale for each token in ")
    assert found["router"] == "hash-random" and "parameters" not in found
    (tmp_path / "moe/README.md").write_text("mine")
    model.save_pretrained(tmp_path / "moe")
    assert (tmp_path / "moe/README.md").read_text() == "mine"


def test_scores_are_those_that_are_known():
    assert rows(card(moe_model(), {"accuracy": 0.91234}))["accuracy on validation data"] == "0.9123"
    assert "validation" not in card(moe_model())


def test_what_a_person_wrote_stays(tmp_path):
    model, readme = moe_model(), tmp_path / "README.md"
    save_with_card(model, tmp_path)
    write_card(model, tmp_path, {"accuracy": 0.5})
    assert "accuracy" in readme.read_text()
    save_with_card(model, tmp_path)
    assert "accuracy" not in readme.read_text()  # ours, written again
    for text in ("# My model\n", readme.read_text().replace("A Transformer", "My Transformer")):
        readme.write_text(text)
        save_with_card(model, tmp_path)
        assert readme.read_text() == text
        (tmp_path / "next").mkdir(exist_ok=True)
        write_card(model, tmp_path / "next", previous=tmp_path)
        assert (tmp_path / "next/README.md").read_text() == text
        (tmp_path / "next/README.md").unlink()
    readme.write_bytes(b"\xff\xfe")
    save_with_card(model, tmp_path)
    assert readme.read_bytes() == b"\xff\xfe"
