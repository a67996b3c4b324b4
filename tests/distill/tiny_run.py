"""Tasks and runs small enough to take a second, for `train_stages`."""

import json
import signal

import torch
from datasets import Dataset

from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import custom_task
from moebert_kernels.distill.evaluation import Evaluator
from moebert_kernels.distill.recipe import Recipe, Stage
from moebert_kernels.distill.run import train_stages
from moebert_kernels.distill.trainer import MoETrainer
from tests.distill.tiny import tiny_bert
from tests.distill.tiny_trainer import tiny_data, tiny_tokenizer

TASK, SCORES = custom_task(["text"], label_names=["a", "b", "c"]), custom_task(["text"], regression=True)
SETTINGS = {
    "per_device_train_batch_size": 4, "learning_rate": 3e-3, "num_train_epochs": 3, "use_cpu": True,
    "disable_tqdm": True, "logging_steps": 2,
}  # fmt: skip


def tiny_split(examples=22, seed=0, task=TASK):
    """Sentences of 2 to 9 random words; the label depends on them."""
    data = tiny_data(examples, seed)
    texts = [" ".join(map(str, ids)) for ids in data["input_ids"]]
    labels = [float(label) for label in data["labels"]] if task is SCORES else data["labels"]
    rows = Dataset.from_dict({"text": texts, "label": labels, "example_id": list(range(examples))})
    return TokenizedSplit(rows, task, tiny_tokenizer(), max_length=16)


def one_stage(**settings):
    return Recipe("one", (Stage(settings=SETTINGS | settings),))


def run(folder, student=None, recipe=None, train=None, settings=None, **options):
    """A run of one stage, judged on other sentences; a student with dropout."""
    student = tiny_bert(0, dropout=0.1) if student is None else student
    recipe = one_stage(**(settings or {})) if recipe is None else recipe
    options = {"evaluate": Evaluator(tiny_split(12, seed=7)), "best_metric": "accuracy"} | options
    return train_stages(student, recipe, train or tiny_split(), output_dir=folder, **options)


def log(folder, key="loss"):
    """What was logged together with a value of this name."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if key in entry]


def interrupt(monkeypatch, at, times=1):
    """Send Ctrl-C in the micro-batch number `at`."""
    original, seen = MoETrainer.training_step, []

    def step(self, *arguments):
        seen.append(1)
        for _ in range(times if len(seen) == at else 0):
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(MoETrainer, "training_step", step)


def constant(values, name="score"):
    """A judge that gives these values one after another."""
    values = iter(values)
    return lambda model: {name: next(values)}


def saved_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
