"""GLUE as text to text: targets, the loss, and answers judged by scoring or read."""

import pytest
import torch
from datasets import Dataset

from moebert_kernels.data.columns import target_text
from moebert_kernels.data.held_out import hold_out
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import TaskData, custom_task, get_task
from moebert_kernels.distill.evaluation import Evaluator, read_score
from moebert_kernels.distill.objectives import task_loss
from moebert_kernels.errors import UserError
from tests.distill.tiny import assert_same_weights, tiny_bert, weights
from tests.distill.tiny_run import log, run
from tests.distill.tiny_text import tiny_t5, word_tokenizer

RTE = get_task("rte")


def rows(count=24, score=False):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count,), generator=generator).tolist()
    texts = [f"the day was {('cold', 'warm')[label]} {'very ' * (number % 3)}" for number, label in enumerate(labels)]
    columns = {"sentence1": texts, "sentence2": ["a night"] * count, "label": labels, "example_id": list(range(count))}
    return Dataset.from_dict(columns | ({"label": [4.2 * label for label in labels]} if score else {}))


def split_of(data, task=RTE):
    return TokenizedSplit(data, task, word_tokenizer(), max_length=128, text_to_text=True)


def test_rows_and_targets_as_text():
    split = split_of(rows(3))
    tokens = word_tokenizer()(f"rte sentence1: {rows(3)['sentence1'][2]} sentence2: a night")["input_ids"]
    assert split.columns[2]["input_ids"] == tokens
    batch = split.collate([0, 1, 2])
    assert batch["labels"].tolist() == [[word_tokenizer().convert_tokens_to_ids(str(n)), 1] for n in rows(3)["label"]]
    stsb = get_task("stsb")
    assert [target_text(stsb, score) for score in (0.0, 2.29, 3.31, 5.0)] == ["0.0", "2.2", "3.4", "5.0"]
    assert target_text(RTE, 1) == "1"
    assert [read_score(text) for text in ("3.4", " 4 ", "-1.0", "3.4.2", "", "warm")] == [
        3.4,
        4.0,
        -1.0,
        None,
        None,
        None,
    ]
    with pytest.raises(UserError, match=r"task: expected classification or regression .*, got squad"):
        split_of(rows(3), get_task("squad"))


def test_loss_is_a_mean_over_sequences_with_label_smoothing():
    split = split_of(rows(4, score=True), get_task("stsb"))
    batch, model = split.collate(range(4)), tiny_t5()
    batch["labels"][0, 1:] = -100  # of another length
    outputs = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    log_p = outputs.logits.log_softmax(-1)
    means = []
    for row, labels in enumerate(batch["labels"]):
        labels = labels[labels != -100]
        nll = -log_p[row, range(len(labels)), labels.tolist()]
        means.append((0.9 * nll - 0.1 * log_p[row, : len(labels)].mean(-1)).mean())
    torch.testing.assert_close(task_loss(outputs, batch, 0.0, label_smoothing=0.1), torch.stack(means).mean())
    with pytest.raises(UserError, match=r"label_smoothing: expected 0 for a task without labels by token, got 0.1"):
        labels = torch.tensor([0, 1])
        outputs = tiny_bert()(input_ids=torch.ones(2, 3, dtype=torch.int64), labels=labels)
        task_loss(outputs, {"labels": labels}, 0.0, label_smoothing=0.1)


def test_learns_and_follows_its_teacher(tmp_path):
    split = split_of(rows())
    judging = {"train": split, "evaluate": Evaluator(split, batch_size=5), "best_metric": "accuracy"}
    teacher, common = tiny_t5(), {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "logging_steps": 10}
    settings = common | {"num_train_epochs": 25, "eval_steps": 15, "label_smoothing_factor": 0.1}
    assert run(tmp_path / "t", teacher, settings=settings, **judging).best_metrics == {"accuracy": 1.0}

    settings = common | {"num_train_epochs": 15, "objective": "tokens", "loss_weights": {"task": 0.0}}
    run(tmp_path / "s", tiny_t5(1), settings=settings, teacher=teacher, **judging)
    first, *_, last = (line["prediction"] for line in log(tmp_path / "s", "prediction"))
    assert last < 0.3 * first


def test_accumulation_equals_the_large_batch(tmp_path):
    split, ends = split_of(rows(12, score=True), get_task("stsb")), []
    for size, accumulation in ((12, 1), (3, 4)):
        model = tiny_t5()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation,
                    "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}  # fmt: skip
        run(tmp_path / str(size), model, train=split, settings=settings, evaluate=None)
        ends.append(model)
    assert_same_weights(ends[0], weights(ends[1]), tolerance=1e-6)


def test_classes_are_scored_and_never_anything_else():
    """The answer is the class whose text is likeliest, though a random model would generate something else."""
    split, tokenizer, model = split_of(rows(6)), word_tokenizer(), tiny_t5(3)
    found = Evaluator(split, batch_size=4).predict(model)
    for row, answer in enumerate(found):
        batch = split.collate([row])
        scores = []
        for text in ("0", "1"):
            labels = torch.tensor([tokenizer(text)["input_ids"]])
            loss = model.eval()(input_ids=batch["input_ids"], labels=labels).loss
            scores.append(-loss.item() * labels.numel())
        assert answer == scores.index(max(scores))


def test_scores_are_generated_and_what_cannot_be_read_is_counted():
    tokenizer = word_tokenizer()
    judge = Evaluator(split_of(rows(6, score=True), get_task("stsb")))

    class Parrot(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, input_ids, **_):
            warm = tokenizer.convert_tokens_to_ids("warm")
            answers = [("4.2" if warm in row else "0.0") for row in input_ids.tolist()]
            return [tokenizer(answer)["input_ids"] for answer in (*answers[:-1], "very cold")]

    model = Parrot()
    answers = judge.predict(model)
    assert answers.count(None) == 1 and set(answers) == {4.2, 0.0, None}
    assert judge(model)["unread"] == pytest.approx(1 / 6)
    assert judge(model)["spearman"] > 0.5


@pytest.mark.parametrize("way", ["halves", "train-rows"])
def test_test_rows_are_apart_from_validation_and_always_the_same(way):
    def sample(count, name):
        return Dataset.from_dict({"text": [f"{name} {n}" for n in range(count)], "label": [0] * count,
                                  "example_id": list(range(count))})  # fmt: skip

    data = TaskData(custom_task(["text"]), {"train": sample(1010, "t"), "validation": sample(31, "v")})
    held = hold_out(data, way)
    texts = {split: list(rows["text"]) for split, rows in held.splits.items()}
    everything = {*data.train["text"], *data.validation["text"]}
    assert sum(len(part) for part in texts.values()) == len(everything) == len({t for p in texts.values() for t in p})
    sizes = {split: len(part) for split, part in texts.items()}
    assert sizes == ({"train": 1010, "validation": 15, "test": 16} if way == "halves" else
                     {"train": 10, "validation": 1000, "test": 31})  # fmt: skip
    assert {split: list(rows["text"]) for split, rows in hold_out(data, way).splits.items()} == texts
    assert all(list(rows["example_id"]) == list(range(len(rows))) for rows in held.splits.values())


def test_what_cannot_be_held_out():
    one = Dataset.from_dict({"text": ["a"], "label": [0], "example_id": [0]})
    data = TaskData(custom_task(["text"]), {"train": one, "validation": one})
    with pytest.raises(UserError, match="hold-out: expected at least 2 rows in validation, got 1"):
        hold_out(data, "halves")
    with pytest.raises(UserError, match="hold-out: expected at least 1001 rows in train, got 1"):
        hold_out(data, "train-rows")
    with pytest.raises(UserError, match="or one of halves, train-rows, got 'half'"):
        hold_out(data, "half")
    with pytest.raises(UserError, match="hold-out: expected rows to divide, got running text"):
        hold_out(TaskData(get_task("lm"), {"validation": one}), "halves")
