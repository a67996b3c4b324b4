"""The tasks of experiments/base_encoder.py: which files they are, and what is held out of their training rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moebert_kernels.data.held_out import hold_out
from moebert_kernels.data.tasks import TASKS, Task, TaskData, custom_task, load_task

# the folder of a task, and its labelled part that judges; the rest comes from train.tsv
FILES = {
    "rte": ("RTE", "dev"), "mrpc": ("MRPC", "test_labeled"), "cola": ("CoLA", "dev"), "stsb": ("STS-B", "dev"),
    "sst2": ("SST-2", "test_labeled"), "trec": ("TREC", "test"), "sick": ("SICK", "test"),
}  # fmt: skip
OWN_TASKS = {
    "trec": replace(custom_task(("question",)), name="trec", without_header={2: ("label", "question")}),
    "sick": replace(custom_task(("sentence_A", "sentence_B"), "entailment_judgment"), name="sick"),
}
HELD_OUT = "0.1"  # of the training rows, which choose between the tries


def task_named(name: str) -> Task:
    return OWN_TASKS.get(name) or TASKS[name]


def load(name: str, folder: Path, rows: int) -> TaskData:
    """Train, validation (held-out training rows), test, and as "unlabelled" the training rows beyond `rows`."""
    place, test = FILES[name]
    files = {}
    for split, stem in (("train", "train"), ("test", test)):
        found = [folder / place / f"{stem}{ending}" for ending in (".tsv", ".tsv.gz")]
        files[split] = next((file for file in found if file.exists()), found[0])
    data = load_task(task_named(name), files)
    if name == "trec":
        data = _coarse(data)
    train = data.train
    if len(train) > rows:
        mixed = train.shuffle(seed=0)
        parts = {"train": mixed.select(range(rows)), "unlabelled": mixed.select(range(rows, len(train)))}
        data = TaskData(data.task, data.splits | parts)
    return hold_out(data, HELD_OUT)


def _coarse(data: TaskData) -> TaskData:
    """TREC's classes are before the colon of its labels."""
    fine = [name.partition(":")[0] for name in data.task.label_names]
    names = tuple(sorted(set(fine)))
    splits = {
        split: rows.map(lambda row: {"label": names.index(fine[row["label"]])}) for split, rows in data.splits.items()
    }
    return TaskData(replace(data.task, label_names=names), splits)
