"""`moebert convert --method chosen`: it goes on where it was interrupted, and says what is wrong with a text."""

import json

import pytest
import torch
from transformers import AutoModel

from moebert_kernels.convert import chosen
from tests.cli.tiny import TABLE, done, moebert, refused

SIZE = ("--expert-size", 8)


@pytest.fixture
def words(base, data):
    return ("convert", "--model", base, "--method", "chosen", *SIZE, *TABLE, "--data", data)


@pytest.fixture
def stops(monkeypatch):
    """Interrupts the second choice that is made; the numbers of the choices, one for each feed-forward."""
    choose, made = chosen.SiteChooser.choose, []

    def choose_or_stop(self, *args):
        made.append(len(made))
        if len(made) == 2:
            raise KeyboardInterrupt
        return choose(self, *args)

    monkeypatch.setattr(chosen.SiteChooser, "choose", choose_or_stop)
    return made


def state(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def test_an_interrupted_choice_goes_on(words, stops, tmp_path):
    stopped = moebert(*words, "--output", tmp_path / "moe")
    assert stopped.exit_code == 130
    assert "interrupted; the same command goes on from here" in stopped.stderr
    assert [path.name[:11] for path in tmp_path.iterdir()] == [".moe.parts-"]

    done(*words, "--output", tmp_path / "moe")

    assert len(stops) == 3  # the first of two feed-forwards was kept
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
    done(*words, "--output", tmp_path / "other")
    one, other = state(tmp_path / "moe"), state(tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_call_does_not_go_on_with_it(words, stops, tmp_path):
    assert moebert(*words, "--output", tmp_path / "moe").exit_code == 130
    done(*words, "--output", tmp_path / "moe", "--seed", 1)
    assert len(stops) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_the_report_has_a_table_and_bars(words, tmp_path):
    lines = done(*words, "--output", tmp_path / "moe").splitlines()
    at = next(n for n, line in enumerate(lines) if "feed-forward  " in line)  # behind the bar
    assert lines[at].split()[-8:-5] == ["dense", "random", "chosen"]
    bars = [line.split() for line in lines[at + 4 : at + 6]]  # behind two feed-forwards and their mean
    assert [bar[0] for bar in bars] == ["encoder.layer.0.output", "encoder.layer.1.output"]
    assert all(set(bar[1]) <= {"#", "-"} and bar[-4:][1:] == ["%", "below", "dense"] for bar in bars)
    reports = json.loads((tmp_path / "moe" / "choice.json").read_text())
    assert [report["name"] for report in reports] == [bar[0] for bar in bars]
    assert all(sum(report["shares"]) == pytest.approx(1) for report in reports)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            ["\tsad", "\thappy"] * 10,
            "batches: expected text with at least 8 different token ids for 4 experts, got 2 in ",
        ),
        (
            ["это хороший фильм\tsad", "скучная и холодная книга\thappy"] * 8,
            "batches: expected text in a language that the tokenizer knows, got token id 1 for ",
        ),
    ],
    ids=["no text", "another language"],
)
def test_text_that_cannot_choose_is_one_line(base, rows, line, tmp_path):
    (tmp_path / "train.tsv").write_text("text\tmood\n" + "\n".join(rows) + "\n")
    said = refused(
        "convert", "--model", base, "--method", "chosen", *SIZE, *TABLE, "--data", tmp_path, "--output", tmp_path / "o"
    )
    assert said.startswith(line)


def test_a_size_that_cannot_be_filled_is_one_line(words, tmp_path):
    said = refused(*words, "--expert-size", 33, "--output", tmp_path / "moe")
    assert said == "expert-size: expected 1 to the dense layer's 32 neurons, got 33"


def test_texts_without_labels_choose(base, data, tmp_path):
    table = tmp_path / "texts.tsv"
    lines = (data / "train.tsv").read_text().splitlines()
    at = lines[0].split("\t").index("text")
    table.write_text("\n".join(line.split("\t")[at] for line in lines) + "\n")
    words = ("convert", "--model", base, *SIZE, "--task", "custom", "--data", table)  # the method by default
    assert "chosen" in done(*words, "--output", tmp_path / "moe")
    line = refused(
        "convert", "--model", base, "--data", table, "--router", "hash-random", "--output", tmp_path / "other"
    )
    assert line.startswith("data: it is used only with --task and --method chosen or dense, or --router hash-balance; ")
