"""Tasks from files: the formats that GLUE and SQuAD come in, tables of one's own, and what is wrong with a file."""

import gzip
import json
import os
import warnings

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from moebert_kernels.data.tasks import TASKS, custom_task, get_task, label_order, load_task
from moebert_kernels.errors import UserError
from tests.helpers import shared_path

# task -> the text of its own file, with the classes or scores of its rows
FILES = {
    "cola": ("gj04\t1\t\tThey drank.\ngj04\t0\t*\tThey drank the.\n", [1, 0]),
    "sst2": ('sentence\tlabel\nhide new secretions \t0\na "fine film \t1\n', [0, 1]),
    "mrpc": ('\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t1\t2\tHe said .\tHe " said .\r\n', [1]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n", [0]),
    "stsb": ("index\tsentence1\tsentence2\tscore\n0\tA man.\tA boy.\t3.800\n", [3.8]),
    "mnli": ("index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA.\tB.\tneutral\tcontradiction\n", [2]),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n", [1]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n", [0]),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n", [1]),
}


@pytest.mark.parametrize("task", FILES)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_reads_the_files_of_glue(task, compressed, tmp_path):
    text, labels = FILES[task]
    if compressed:
        (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / "train.tsv").write_bytes(text.encode())

    data = load_task(task, tmp_path).train

    assert set(data.column_names) == {*TASKS[task].text_columns, "label", "example_id"}
    assert data["label"] == pytest.approx(labels)
    assert list(data["example_id"]) == list(range(len(labels)))
    assert all(text and "\t" not in text for column in TASKS[task].text_columns for text in data[column])


def test_quotes_are_text(tmp_path):
    (tmp_path / "dev.tsv").write_text(FILES["sst2"][0])
    assert load_task("sst2", tmp_path).validation[1]["sentence"] == 'a "fine film '


@pytest.mark.parametrize(
    ("task", "folder", "rows"),
    [
        ("sst2", "SST-2", {"train": 67349, "validation": 872, "test": 1821}),
        ("cola", "CoLA", {"train": 8551, "validation": 1043}),
        ("mrpc", "MRPC", {"train": 3668, "validation": 408, "test": 1725}),
        ("rte", "RTE", {"train": 2490, "validation": 277}),
        ("stsb", "STS-B", {"train": 5749, "validation": 1500}),
        ("wnli", "WNLI", {"train": 635, "validation": 71}),
        ("qnli", "QNLI", {"validation": 5463}),
        ("qqp", "QQP", {"validation": 23496}),
        ("mnli", "MNLI", {"validation": 1000, "validation_mismatched": 1000}),
    ],
)
def test_reads_the_real_files(task, folder, rows):
    folder = shared_path(f"data/{folder}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the part of QQP at hand has one damaged line
        data = load_task(task, folder)
    assert {split: len(part) for split, part in data.splits.items()} == rows


def test_a_damaged_line_is_left_out_with_a_warning(tmp_path):
    good = "1\t2\t3\tWhy?\tHow?\t0\n"
    (tmp_path / "dev.tsv").write_text("1\t2\t3\tWhy? How?\t0\n" + good * 3)
    with pytest.warns(UserWarning, match=r"dev.tsv: left out lines without 6 columns: line 1 with 5$"):
        assert len(load_task("qqp", tmp_path).validation) == 3


def test_test_files_without_labels_are_no_split(tmp_path):
    (tmp_path / "dev.tsv").write_text(FILES["sst2"][0])
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tfine\n")
    assert list(load_task("sst2", tmp_path).splits) == ["validation"]
    alone = {"test": tmp_path / "test.tsv"}
    assert load_task("sst2", alone).splits == load_task(custom_task(["sentence"]), alone).splits == {}


@pytest.mark.parametrize("labels", [[-1, -1], [None, None]])
def test_a_test_file_whose_labels_are_all_missing_is_no_split(labels, tmp_path):
    """As the Hub's folders of GLUE have them, and tables of one's own."""
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    for split, given in (("train", [1, 0]), ("test", labels)):
        rows = Dataset.from_dict({"sentence": ["a", "b"], "label": given}, features)
        rows.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert list(load_task("sst2", tmp_path).splits) == ["train"]
    for split, given in (("train", "xy"), ("test", ("", " "))):
        write(tmp_path / f"{split}.tsv", f"text\tlabel\na\t{given[0]}\nb\t{given[1]}\n")
    own = {split: tmp_path / f"{split}.tsv" for split in ("train", "test")}
    assert list(load_task(custom_task(["text"]), own).splits) == ["train"]
    own["train"].write_text("text\tlabel\na\t-1\nb\t1\n")
    own["test"].write_text("text\tlabel\na\t-1\n")  # which is a class here
    assert list(load_task(custom_task(["text"]), own).split("test")["label"]) == [1]
    own["train"].write_text("text\tlabel\na\tx\nb\ty\n")
    own["test"].write_text("text\tlabel\na\tx\nb\t\n")
    with pytest.raises(UserError, match=r"label: expected one of x, y in .*test.tsv, row 2, got ''"):
        load_task(custom_task(["text"]), own)


def test_the_matched_test_rows_of_mnli_are_its_test_split(tmp_path):
    text = FILES["mnli"][0]
    for name in ("dev_matched", "dev_mismatched", "test_matched", "test_mismatched"):
        (tmp_path / f"{name}.tsv").write_text(text.replace("A.", name))
    data = load_task("mnli", tmp_path)
    assert {split: rows[0]["premise"] for split, rows in data.splits.items()} == {
        "validation": "dev_matched", "validation_mismatched": "dev_mismatched", "test": "test_matched",
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_reads_tables_of_ones_own(suffix, tmp_path):
    rows = [{"a": "one, two", "b": "x", "kind": "yes"}, {"a": "three", "b": "y", "kind": "no"}]
    separator = {"csv": ",", "tsv": "\t"}.get(suffix)
    quoted = [[f'"{v}"' if suffix == "csv" else v for v in row.values()] for row in rows]
    lines = [separator.join(line) for line in [["a", "b", "kind"], *quoted]] if separator else map(json.dumps, rows)
    (tmp_path / f"mine.{suffix}").write_text("\n".join(lines) + "\n")

    data = load_task(custom_task(["a", "b"], "kind"), {"train": tmp_path / f"mine.{suffix}"})

    assert data.task.label_names == ("no", "yes")
    assert data.train[0] == {"a": "one, two", "b": "x", "label": 1, "example_id": 0}


def own_table():
    return Dataset.from_dict(
        {"text": ["a film", "a book"], "label": [1, 0]},
        Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])}),
    )


def write_feather(table, file):
    from pyarrow import feather

    feather.write_feather(table.data.table, file, compression="uncompressed")


def write_stream(table, file):
    from pyarrow import ipc

    with ipc.new_stream(str(file), table.data.table.schema) as sink:
        sink.write_table(table.data.table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("train.parquet", lambda table, folder: table.to_parquet(folder / "train.parquet")),
        ("train.arrow", lambda table, folder: write_stream(table, folder / "train.arrow")),
        ("feather", lambda table, folder: write_feather(table, folder / "train.arrow")),
        ("saved", lambda table, folder: table.save_to_disk(folder)),
        ("saved splits", lambda table, folder: DatasetDict(train=table, validation=table).save_to_disk(folder)),
    ],
)
def test_reads_binary_tables_and_saved_data_sets(name, write, tmp_path):
    """Classes that the file numbers have their names, in the order of the names as everywhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(own_table(), folder)
    task = custom_task(("text",))
    for place in (folder, folder / name) if (folder / name).exists() else (folder,):
        data = load_task(task, place)
        assert data.task.label_names == ("bad", "good") and data.train["label"] == [1, 0]
        assert data.train["text"] == ["a film", "a book"] and data.train["example_id"] == [0, 1]
    assert ("validation" in load_task(task, folder).splits) == (name == "saved splits")


def test_a_saved_data_set_without_splits_is_the_one_that_a_file_is(tmp_path):
    own_table().save_to_disk(tmp_path)
    assert list(load_task(custom_task(("text",)), tmp_path, file_split="validation").splits) == ["validation"]


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    """Also where it keeps its date, as files out of archives do."""
    file, task = tmp_path / "train.parquet", custom_task(("text",))
    for text in ("one", "two"):
        Dataset.from_dict({"text": [text, "b"], "label": ["x", "y"]}).to_parquet(file)
        os.utime(file, (0, 0))
        assert load_task(task, file).train["text"] == [text, "b"]


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow", "state.json"])
def test_damaged_binary_tables_are_one_line(name, tmp_path):
    (tmp_path / name).write_bytes(b"ARROW1 and so on")
    kind = {"train.parquet": "parquet file", "train.arrow": "arrow file", "state.json": "saved data set"}[name]
    with pytest.raises(UserError, match=f"data: expected a whole {kind} in ") as said:
        load_task(custom_task(("text",)), tmp_path)
    assert "\n" not in str(said.value)
    with pytest.raises(UserError, match="which does not exist"):
        load_task(custom_task(("text",)), {"train": tmp_path / "none.parquet"})


def test_classes_named_by_numbers_are_in_their_order(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,10\nb,2\nc,1\n")
    data = load_task(custom_task(["text"]), tmp_path)
    assert data.task.label_names == ("1", "2", "10")
    assert list(data.train["label"]) == [2, 1, 0]


def test_scores_of_ones_own(tmp_path):
    (tmp_path / "train.csv").write_text("text,score\na,0.5\n")
    data = load_task(custom_task(["text"], "score", regression=True), tmp_path)
    assert data.task.num_labels == 1
    assert list(data.train["label"]) == [0.5]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_reads_squad(suffix, tmp_path):
    question = {"id": "q", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    nothing = {"id": "r", "question": "When?", "answers": [], "is_impossible": True}
    if suffix == "json":
        paragraph = {"context": "Ann came.", "qas": [question, nothing]}
        text = json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": [paragraph]}]})
    else:
        flat = [question | {"answers": {"text": ["Ann"], "answer_start": [0]}}]
        flat += [nothing | {"answers": {"text": [], "answer_start": []}}]
        text = "\n".join(json.dumps(row | {"context": "Ann came."}) for row in flat)
    (tmp_path / f"dev-v2.0.{suffix}").write_text(text)

    data = load_task("squad_v2", tmp_path).validation

    assert [row["answers"]["text"] for row in data] == [["Ann"], []]
    assert data[0]["answers"]["answer_start"] == [0]


def write(path, text):
    path.write_text(text)
    return path


# what is wrong -> (what to load from a folder, what the message says)
REJECTED = {
    "unknown task": (lambda at: get_task("sst-2"), "task: expected one of cola, sst2, .* or custom, got 'sst-2'"),
    "missing path": (lambda at: load_task("sst2", at / "no"), "data: expected a file or a folder, got .*no, which"),
    "missing file": (lambda at: load_task("sst2", {"train": at / "x.tsv"}), "data: expected a file, got .*x.tsv, wh"),
    "empty folder": (lambda at: load_task("sst2", at), "data: expected train.tsv, dev.tsv or the like in .*, got no"),
    "not gzip": (lambda at: load_task("sst2", write(at / "x.tsv.gz", "no")), "data: expected a whole gzip file, got"),
    "label of another table": (
        lambda at: load_task(
            custom_task(["t"]),
            {"train": write(at / "a.csv", "t,label\na,1\nb,2\n"), "validation": write(at / "b.csv", "t,label\na,3\n")},
        ),
        "label: expected one of 1, 2 in .*b.csv, row 1, got '3'",
    ),
    "no split": (
        lambda at: load_task("sst2", write(at / "x.tsv", FILES["sst2"][0])).validation,
        "data: expected a validation split, got train; name a file with validation=FILE",
    ),
    "train and test alone": (
        lambda at: (
            load_task(
                "sst2", {name: write(at / f"{name}.tsv", FILES["sst2"][0]) for name in ("train", "test")}
            ).validation
        ),
        "got train, test; name a file with validation=FILE or hold out training rows with --hold-out 0.1",
    ),
    "texts in a column called label": (
        lambda at: custom_task(["text", "label"], "gold"),
        "text_columns: expected other names than label and example_id, got label; rename it",
    ),
    "two files": (
        lambda at: (write(at / "dev_a.tsv", ""), write(at / "dev_b.tsv", ""), load_task("sst2", at)),
        "data: expected one validation file in .*, got dev_a.tsv, dev_b.tsv; name one with validation=FILE",
    ),
    "three columns of text": (lambda at: custom_task(["a", "b", "c"]), "text_columns: expected one or two names, got"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name, tmp_path):
    load, message = REJECTED[name]
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_labels_are_numbered_as_the_model_does(tmp_path):
    (tmp_path / "dev.tsv").write_text("label\tpremise\thypothesis\nentailment\ta\tb\nneutral\ta\tb\n")
    data = load_task("mnli", tmp_path)
    assert list(data.validation["label"]) == [0, 1]
    reordered = data.with_label_order(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"])
    assert list(reordered.validation["label"]) == [2, 1]
    assert list(data.with_label_order(["LABEL_0", "LABEL_1", "LABEL_2"]).validation["label"]) == [0, 1]


def test_a_model_of_other_classes_is_rejected():
    with pytest.raises(UserError, match=r"labels: expected the model's 2 \(no, yes\), got 3 in task mnli \(entailment"):
        label_order(TASKS["mnli"], ["no", "yes"])
    with pytest.raises(UserError, match="labels: expected the model's 2"):
        label_order(TASKS["sst2"], ["cat", "dog"])


def hub(monkeypatch, **splits):
    """Stands in for the Hub; what was asked for."""
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_reads_glue_from_the_hub(monkeypatch):
    classes = ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = Features(
        {"premise": Value("string"), "hypothesis": Value("string"), "label": classes, "idx": Value("int32")}
    )

    def rows(labels):
        texts = [f"text {i}" for i in range(len(labels))]
        columns = {"premise": texts, "hypothesis": texts, "label": labels, "idx": list(range(len(labels)))}
        return Dataset.from_dict(columns, features=features)

    asked = hub(
        monkeypatch, train=rows([2, 0]), validation_matched=rows([1]), validation_mismatched=rows([0]),
        test_matched=rows([-1, -1]),
    )  # fmt: skip
    data = load_task("mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert list(data.splits) == ["train", "validation", "validation_mismatched"]  # the test labels are not public
    assert data.train[0] == {"premise": "text 0", "hypothesis": "text 0", "label": 2, "example_id": 0}


def test_a_first_label_of_minus_one_is_a_label(monkeypatch):
    hub(
        monkeypatch, train=Dataset.from_dict({"text": ["a", "b"], "label": [-1.0, 0.5]}),
        unlabelled=Dataset.from_dict({"text": ["a", "b"], "label": [-1.0, -1.0]}),
    )  # fmt: skip
    data = load_task(custom_task(["text"], regression=True), "somebody/scores")
    assert list(data.splits) == ["train"] and list(data.train["label"]) == [-1.0, 0.5]


def test_reads_squad_and_other_datasets_from_the_hub(monkeypatch):
    answers = [{"text": ["b"], "answer_start": [2]}]
    squad = Dataset.from_dict({"id": ["x"], "question": ["a?"], "context": ["a b"], "answers": answers, "title": ["t"]})
    asked = hub(monkeypatch, validation=squad)
    assert load_task("squad").validation[0]["answers"] == answers[0]
    mine = Dataset.from_dict({"review": ["a", "b"], "stars": [5, 1]})
    asked = hub(monkeypatch, train=mine)
    data = load_task(custom_task(["review"], "stars"), "somebody/reviews")
    assert asked == [("somebody/reviews",)]
    assert (data.task.label_names, list(data.train["label"])) == (("1", "5"), [1, 0])
    with pytest.raises(
        UserError, match="data: expected a column text in dataset somebody/reviews, train, got review, stars"
    ):
        load_task(custom_task(["text"], "stars"), "somebody/reviews")


def test_an_unreachable_dataset_is_one_line():
    """conftest.py takes the network away."""
    with pytest.raises(
        UserError, match="data: expected a local path or a reachable dataset nyu-mll/glue/sst2, got"
    ) as e:
        load_task("sst2")
    assert "\n" not in str(e.value)
