"""Data that would be read wrongly without a word: refused with file and row, or said before anything is trained."""

import csv
import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from moebert_kernels.data.held_out import hold_out
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.summary import cut_texts, summary
from moebert_kernels.data.tasks import custom_task, get_task, load_task
from moebert_kernels.distill.loading import keep_lengths, trained_lengths
from moebert_kernels.errors import UserError
from tests.distill.words import tokenizer_of

TASK = custom_task(["text"], "kind")
PAIRS = custom_task(["a", "b"], "kind")
SQUAD = {"context": "Ann came home.", "question": "who?", "answers": {"text": ["Ann"], "answer_start": [0]}}


def load(folder, name, text, task=TASK):
    file = folder / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return load_task(task, file).train


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def answer(**answers):
    return lines(SQUAD | {"answers": answers})


# what is wrong -> (file, its text, task, what the message says)
REFUSED = {
    "label first, text cut at a comma": (
        "x.csv", "kind,text\nNUM,how many\nNUM,How, many miles\n", TASK,
        r"data: expected 2 columns in each line of .*x.csv, got line 3 with 3; a text with a comma stands in",
    ),
    "text first, its fragments are labels": (
        "x.csv.gz", 'text,kind\n"a, b",NUM\nc, d,NUM\n\ne,f,g,NUM\n', TASK,
        r"columns in each line of .*x.csv.gz, got line 3 with 3 and 1 more; ",
    ),
    "one line of many": ("x.csv", "text,kind\n" + "a,x\nb,y\n" * 400 + "c\n", TASK, r"x.csv, got line 802 with 1;"),
    "a pair cut at a comma": (
        "x.csv", 'a,b,kind\n"two\nlines",q,x\np,q, r,y\n', PAIRS, "3 columns in each line of .*, got line 4 with 4;"
    ),
    "too many tabs": ("x.tsv", "text\tkind\n" + "a\tb\tc\n" * 3, TASK, "2 columns in each line of .*, got line 2 with"),
    "quotation marks never closed": (
        "x.csv", 'text,kind\na,x\n"b,y\nc,x\n', TASK, "expected quoted csv in .*, got .* at line 3 or behind it"
    ),
    "quotation marks within quotation marks": ("x.csv", 'text,kind\n"say "a" b",x\n', TASK, "expected quoted csv in "),
    "one column twice": ("x.csv", "text,kind,text\na,x,b\n", TASK, "data: expected one column text in .*x.csv, got 2"),
    "an empty label": ("x.csv", "text,kind\na,x\nb,\nc,y\n", TASK, "kind: expected a label in .*x.csv, row 2, got ''"),
    "a blank label": ("x.tsv", "text\tkind\na\tx\nb\ty\nc\t  \n", TASK, "kind: expected a label in .*, row 3, got "),
    "nan": ("x.csv", "text,kind\na,x\nb,NaN\n", TASK, "kind: expected a label in .*x.csv, row 2, got 'NaN'"),
    "nan in JSON": ("x.jsonl", '{"text": "a", "kind": NaN}', TASK, "kind: expected a label in .*, row 1, got nan"),
    "null in JSON": ("x.json", '[{"text": "a", "kind": null}]', TASK, "a label in .*x.json, row 1, got None"),
    "no label in a row": (
        "x.jsonl", lines({"text": "a", "kind": "x"}, {"text": "b"}), TASK,
        "kind: expected a label in .*x.jsonl, row 2, got None",
    ),
    "no label of a known task": ("x.tsv", "sentence\tlabel\na\t1\nb\t\n", "sst2", "label: expected one .*row 2, got"),
    "several labels of a row": (
        "x.jsonl", lines({"text": "a", "kind": [0, 1]}, {"text": "b", "kind": [1]}), TASK,
        r"kind: expected a label in .*x.jsonl, row 1, got \[0, 1\]",
    ),
    "scores as classes": (
        "x.csv", "text,kind\na,4\nb,3.75\n", TASK,
        r"kind: expected classes in .*x.csv, got scores such as 3.75 in row 2 \(--regression, or ",
    ),
    "scores as classes in JSON": ("x.jsonl", lines({"text": "a", "kind": 0.5}), TASK, "scores such as 0.5 in row 1 "),
    "a score that is none": (
        "x.csv", "text,kind\na,1.5\nb,nan\n", custom_task(["text"], "kind", regression=True),
        "kind: expected a number in .*x.csv, row 2, got 'nan'",
    ),
    "an answer elsewhere": (
        "x.jsonl", lines(SQUAD) + "\n" + answer(text=["home"], answer_start=[8]), "squad",
        "answers: expected 'home' at character 8 of the context in .*x.jsonl, row 2, got another",
    ),
    "no answer in v1": ("x.jsonl", answer(text=[], answer_start=[]), "squad", "answers: expected one .*row 1, got n"),
    "a start that is no number": ("x.jsonl", answer(text=["Ann"], answer_start=["0"]), "squad", "as many text as an"),
    "no known format": ("x.xlsx", "", TASK, "data: expected one of .tsv, .csv"),
    "no such column": ("x.tsv", "text\tlabel\na\t1\n", "sst2", "a column sentence in .*x.tsv, got text, label"),
    "no label column": ("x.csv", "text,label\na,1\n", TASK, "data: expected a column kind in .*x.csv, got text"),
    "another label": ("x.tsv", "sentence\tlabel\na\t2\n", "sst2", "label: expected one of negative, .* row 1, got '2'"),
    "one class": ("x.csv", "text,kind\na,1\n", TASK, "labels: expected between 2 and 1000 classes in .*x.csv, got 1"),
    "no score": ("x.tsv", "sentence1\tsentence2\tscore\na\tb\tc\n", "stsb", "label: expected a number in .*, row 1"),
    "no rows": ("x.tsv", "sentence\tlabel\n", "sst2", "data: expected rows in .*x.tsv"),
    "broken JSON": ("x.json", "{", "squad", "data: expected JSON in .*x.json"),
    "no rows of JSON": ("x.json", "{}", "squad", "data: expected a list of rows or SQuAD's"),
    "no answers": ("x.jsonl", '{"question": "q", "context": "c"}', "squad", "a column answers in .*, got context"),
    "no table": ("x.tsv", "sentence\tlabel\n" + "a\n" * 9, "sst2", "2 columns in .*, got line 2 with 1 and 8 more$"),
    "a context that is no text": ("x.jsonl", lines(SQUAD | {"context": 3}), "squad", "context: expected text .*row 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name, tmp_path):
    file, text, task, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, file, text, task)
    assert "\n" not in str(caught.value)


def test_the_same_file_for_two_splits(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("text,kind\na,x\nb,y\n")
    with pytest.raises(UserError, match=r"different files for train and validation, got .*x.csv for both \(--hold-out"):
        load_task(TASK, {"train": file, "validation": tmp_path / "." / "x.csv"})


def test_two_files_of_one_name(tmp_path):
    for suffix in ("csv", "tsv"):
        (tmp_path / f"train.{suffix}").write_text("")
    with pytest.raises(
        UserError, match=r"expected one train file in .*, got train.csv, train.tsv; name one with train="
    ):
        load_task(TASK, tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "csv.gz"])
def test_white_space_makes_no_class(suffix, tmp_path):
    rows = [("a", "NUM "), ("b", " NUM"), ("c", "ABBR"), ("d", "ABBR\u00a0")]
    if "json" in suffix:
        text = json.dumps([dict(zip(("text", "kind"), row, strict=True)) for row in rows])
        text = "\n".join(map(json.dumps, json.loads(text))) if suffix == "jsonl" else text
    else:
        separator = "\t" if suffix == "tsv" else ","
        text = "\n".join(separator.join(row) for row in (("text", "kind"), *rows))
    file = tmp_path / f"train.{suffix}"
    file.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    data = load_task(TASK, tmp_path)
    assert data.task.label_names == ("ABBR", "NUM") and list(data.train["label"]) == [1, 1, 0, 0]


def test_a_field_may_be_a_long_document(tmp_path):
    """Longer than the csv module takes by itself; what it took before stays as it was."""
    limit, text = csv.field_size_limit(), "a, b " * 40_000
    assert list(load(tmp_path, "x.csv", f'text\n"{text}"\n', get_task("lm"))["text"]) == [text]
    assert csv.field_size_limit() == limit


def test_a_spreadsheets_empty_columns_are_none(tmp_path):
    rows = load(tmp_path, "x.csv", "text,kind\na,x,,\nb,y,, \n")
    assert list(rows["text"]) == ["a", "b"] and list(rows["label"]) == [0, 1]


@pytest.mark.parametrize(("one", "other"), [("NUM", "num"), ("1", "1.0")])
def test_classes_that_look_alike_are_said(one, other, tmp_path):
    with pytest.warns(UserWarning, match=f"kind: '{one}' and '{other}' are two classes in .*x.csv"):
        load(tmp_path, "x.csv", f"text,kind\na,{one}\nb,{other}\n")


def test_empty_texts_are_said(tmp_path):
    with pytest.warns(UserWarning, match="b: 2 rows of .*x.csv are empty, the first is row 2"):
        load(tmp_path, "x.csv", 'a,b,kind\np,q,x\np,"",y\np," ",y\n', PAIRS)


def test_classes_are_said_with_their_counts(tmp_path):
    (tmp_path / "train.csv").write_text("text,kind\na,x\nb,y\nc,y\nd,z\n")
    (tmp_path / "dev.csv").write_text("text,kind\na,y\ne,y\n")
    assert summary(load_task(TASK, tmp_path)) == [
        "4 training rows; y 2, x 1, z 1",
        "2 validation rows; y 2, none of x, none of z",
        "1 of the 2 validation rows have the texts of training rows",
    ]
    scores = load_task(custom_task(["text"], "kind", regression=True), write(tmp_path / "s.csv", "a,0.5", "b,-3"))
    assert summary(scores) == ["2 training rows, scores from -3 to 0.5"]
    many = load_task(TASK, write(tmp_path / "m.csv", *(f"t{n},{n}" for n in range(25))))
    assert summary(many) == [
        f"25 training rows; {', '.join(f'{n} 1' for n in range(12))}, 13 more",
        "the 25 classes are numbers; if they are scores, give --regression",
    ]


def write(file, *rows):
    file.write_text("\n".join(("text,kind", *rows)) + "\n")
    return file


def test_texts_that_are_cut_are_counted(tmp_path):
    """With [CLS] and [SEP], or two [SEP] in a pair: 7 of 8 tokens, 8 of 8, 9 and 12 of 8."""
    tokenizer = tokenizer_of(("a", "b"))
    words = [" ".join("ab"[n % 2] for n in range(count)) for count in (5, 6, 7, 10)]
    data = load_task(TASK, write(tmp_path / "x.csv", *(f"{text},{'xy'[n % 2]}" for n, text in enumerate(words))))
    split = TokenizedSplit(data.train, data.task, tokenizer, max_length=8)
    assert max(split.lengths) == 8
    assert cut_texts("train", split) == (
        "3 of 4 training texts fill all 8 tokens, and what is longer is cut (--max-length changes it)"
    )
    assert cut_texts("train", TokenizedSplit(data.train, data.task, tokenizer, max_length=13)) is None


def test_a_share_of_one_file_is_held_out(tmp_path):
    """Of each class, the same rows each time, every row once."""
    rows = [f"text {n},{'x' if n % 5 else 'y' if n else 'z'}" for n in range(60)]  # 48 x, 11 y, one z
    data = load_task(TASK, write(tmp_path / "x.csv", *rows))
    held = hold_out(data, "0.25")
    again = hold_out(data, "0.25")
    classes = {name: np.bincount(part["label"], minlength=3).tolist() for name, part in held.splits.items()}
    assert classes == {"train": [36, 8, 1], "validation": [12, 3, 0]}
    assert list(held.validation["text"]) == list(again.validation["text"])
    assert sorted([*held.train["text"], *held.validation["text"]]) == sorted(data.train["text"])
    assert list(held.validation["example_id"]) == list(range(15))
    assert len(hold_out(load_task(TASK, write(tmp_path / "y.csv", "a,x", "b,x", "c,y")), "0.1").validation) == 1
    for way, splits, message in (
        ("1.5", data, "hold-out: expected a share between 0 and 1, or one of halves, train-rows, got '1.5'"),
        ("0.1", held, "hold-out: expected halves, train-rows for data with a validation split, got 0.1"),
        (
            "0.1",
            load_task(TASK, write(tmp_path / "z.csv", "a,x", "b,y")),
            "enough training rows for both splits, got 2",
        ),
    ):
        with pytest.raises(UserError, match=message):
            hold_out(splits, way)


def test_the_same_rows_are_held_out_however_a_model_numbers_its_classes(tmp_path):
    """`finetune` sorts the names of the classes, `eval` takes a model's: other numbers, and another case."""
    file = write(tmp_path / "x.csv", *(f"text {n},{('POSITIVE', 'NEGATIVE', 'odd')[n % 3]}" for n in range(60)))
    held = [
        hold_out(load_task(task, file), "0.2").validation["text"]
        for task in (TASK, *(replace(TASK, label_names=names) for names in (
            ("POSITIVE", "NEGATIVE", "odd"), ("odd", "negative", "positive"), ("ODD", "Positive", "NEGATIVE"),
        )))
    ]  # fmt: skip
    assert all(list(texts) == list(held[0]) for texts in held)


def test_labels_that_differ_in_case_alone_are_two_classes(tmp_path):
    with pytest.warns(UserWarning, match="kind: 'Good' and 'good' are two classes"):
        data = load_task(TASK, write(tmp_path / "x.csv", "a,Good", "b,good", "c,bad", "d,bad"))
    assert data.task.label_names == ("Good", "bad", "good")
    assert list(data.with_label_order(["good", "Good", "bad"]).train["label"]) == [1, 0, 2, 2]
    with pytest.raises(UserError, match=r"labels: expected the model's 3 \(GOOD, x, bad\), got 3 in task custom"):
        data.with_label_order(["GOOD", "x", "bad"])
    with pytest.raises(UserError, match=r"kind: expected one of Good, bad, good in .*, row 1, got 'GOOD'"):
        load_task(data.task, write(tmp_path / "y.csv", "a,GOOD"))


def test_a_models_classes_are_found_in_another_case(tmp_path):
    """As fine-tuning takes them: `positive` in the file is the model's POSITIVE."""
    data = load_task(replace(TASK, label_names=("POSITIVE", "NEGATIVE")), write(tmp_path / "x.csv", "a,negative"))
    assert list(data.train["label"]) == [1]
    with pytest.raises(UserError, match=r"kind: expected one of POSITIVE, NEGATIVE in .*, row 1, got 'neutral'"):
        load_task(data.task, write(tmp_path / "y.csv", "a,neutral"))


def test_questions_are_held_out_by_context(tmp_path):
    rows = [SQUAD | {"context": f"Ann came {n % 4} times."} for n in range(20)]
    file = tmp_path / "x.jsonl"
    file.write_text(lines(*rows))
    held = hold_out(load_task("squad", file), "0.3")
    train, validation = (set(held.split(name)["context"]) for name in ("train", "validation"))
    assert len(validation) == 1 and len(train) == 3 and not train & validation
    assert len(held.train) + len(held.validation) == 20


def test_a_tokenizer_keeps_the_lengths_of_training(tmp_path):
    tokenizer = tokenizer_of(("a",))
    assert trained_lengths(tokenizer, "sst2") == {}
    keep_lengths(tokenizer, "squad", 384, 64)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        trained_lengths(loaded, "squad") == trained_lengths(loaded, "custom") == {"max_length": 384, "doc_stride": 64}
    )
    keep_lengths(loaded, "sst2", 32)
    assert trained_lengths(loaded, "sst2") == {"max_length": 32} and trained_lengths(loaded, "custom") == {}
