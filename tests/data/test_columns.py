"""Tokens as columns, and a task's metrics, from a table to a trained and judged model."""

import math
from collections import Counter

import pytest
import torch
from datasets import Dataset

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.data.columns import collator, tokenized
from moebert_kernels.data.extra import CORRUPTED, corrupted_copies, with_corrupted_copies, with_extra_text
from moebert_kernels.data.judges import judge
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import TASKS, custom_task, load_task
from moebert_kernels.distill.evaluation import Evaluator
from moebert_kernels.distill.trainer import MoETrainer
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from tests.distill.tiny import tiny_bert
from tests.distill.tiny_text import STORY, byte_tokenizer, tiny_gpt2, tiny_t5, word_tokenizer
from tests.distill.tiny_trainer import settings
from tests.distill.words import tokenizer_of

WORDS = "the film was good bad very not so and a story who made it anna did ben in may june"
GOOD, BAD = "the film was very good", "the film was so bad and not good"


def words():
    return tokenizer_of(WORDS.split())


def reviews(count=24):
    return Dataset.from_dict(
        {"text": [GOOD if n % 2 else BAD for n in range(count)], "label": [n % 2 for n in range(count)],
         "example_id": list(range(count))}
    )  # fmt: skip


REVIEWS = custom_task(("text",), label_names=("bad", "good"))
QUESTIONS = Dataset.from_dict(
    {
        "question": ["who made it", "who did it", "who made the story"],
        "context": ["anna made it in may and ben did it in june", "the film was good", "a story ben made in june"],
        "answers": [{"text": ["anna"], "answer_start": [0]}, {"text": [], "answer_start": []},
                    {"text": ["ben"], "answer_start": [8]}],
    }
)  # fmt: skip


def train(folder, model, task, rows, tokenizer, length=16, **options):
    columns = tokenized(rows, task, tokenizer, max_length=length, doc_stride=1 if task.kind == "lm" else 2)
    judged = judge(task, rows, columns)
    run = MoETrainer(
        model, settings(folder, **{"num_train_epochs": 4, "learning_rate": 1e-2, **options}), train_dataset=columns,
        eval_dataset=columns, processing_class=tokenizer, data_collator=collator(task, tokenizer), **judged,
    )  # fmt: skip
    run.train()
    return run


def test_a_table_becomes_a_trained_and_judged_model(tmp_path):
    model = convert_to_moe(tiny_bert(0, num_labels=2), MoEConfig.moebert(), importance=torch.rand(2, 32))
    texts = [f"the film was {'very ' * (n // 2 % 3)}{('bad', 'good')[n % 2]}" for n in range(24)]
    rows = Dataset.from_dict({"text": texts, "label": [n % 2 for n in range(24)]})
    run = train(tmp_path, model, REVIEWS, rows, words(), train_sampling_strategy="group_by_length")
    assert run.evaluate()["eval_accuracy"] == 1.0


def test_columns_of_sentences():
    tokenizer = words()
    columns = tokenized(reviews(), REVIEWS, tokenizer, max_length=6)
    assert columns["input_ids"] == tokenizer(list(reviews()["text"]), truncation=True, max_length=6)["input_ids"]
    assert columns["labels"] == list(reviews()["label"]) and columns["length"] == [6, 6] * 12
    assert columns["example_id"] == list(range(24))
    unlabelled = tokenized(reviews().remove_columns("label"), REVIEWS, tokenizer)
    assert "labels" not in unlabelled.column_names and len(unlabelled) == 24
    scores = tokenized(reviews(), custom_task(("text",), regression=True), tokenizer)
    assert scores["labels"] == [float(n % 2) for n in range(24)]


def test_text_that_streams_trains_as_text_that_does_not(tmp_path):
    ended = []
    for data in (reviews(), reviews().to_iterable_dataset()):
        columns = tokenized(data, REVIEWS, words())
        run = MoETrainer(
            tiny_bert(0, num_labels=2), settings(tmp_path, max_steps=4, train_sampling_strategy="sequential"),
            train_dataset=columns, processing_class=words(),
        )  # fmt: skip
        run.train()
        ended.append([entry["task"] for entry in run.state.log_history if "task" in entry])
    assert ended[0] == ended[1]


def test_questions_are_divided_and_judged(tmp_path):
    task, tokenizer = TASKS["squad_v2"], words()
    columns = tokenized(QUESTIONS, task, tokenizer, max_length=12, doc_stride=2)
    assert set(columns["row"]) == {0, 1, 2} and max(columns["length"]) <= 12
    found = set()
    for window in columns:
        if window["start_positions"] == 0 == window["end_positions"]:
            continue  # it does not have the answer
        offsets, row = window["offset_mapping"], QUESTIONS[window["row"]]
        text = row["context"][offsets[window["start_positions"]][0] : offsets[window["end_positions"]][1]]
        assert [text] == row["answers"]["text"]
        found.add(window["row"])
    assert found == {0, 2}
    run = train(tmp_path, tiny_bert(0, qa=True, positions=32), task, QUESTIONS, tokenizer, 30, num_train_epochs=30)
    judged = run.evaluate()
    assert judged["eval_exact_match"] == 1.0 and judged["eval_f1_no_answer"] == 1.0
    left = words()
    left.padding_side = "left"  # which would shift the answers
    batches = [
        collator(task, pads)([{name: columns[row][name] for name in ("input_ids", "attention_mask")} for row in (0, 1)])
        for pads in (tokenizer, left)
    ]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"]) and left.padding_side == "left"
    stream = QUESTIONS.to_iterable_dataset().map(lambda row: row)  # whose columns nobody knows
    assert [row["row"] for row in tokenized(stream, task, tokenizer, max_length=12, doc_stride=2)] == [*columns["row"]]
    with pytest.raises(UserError, match="judge: expected the split and its columns for questions, got none"):
        judge(task)
    with pytest.raises(UserError, match="max_length: expected more than 9 for questions of up to 4 tokens"):
        tokenized(QUESTIONS, task, tokenizer, max_length=9, doc_stride=2)


def test_running_text_is_judged_by_perplexity(tmp_path):
    rows, tokenizer = Dataset.from_dict({"text": [STORY, STORY]}), byte_tokenizer()
    run = train(tmp_path, tiny_gpt2(0), TASKS["lm"], rows, tokenizer, 12, per_device_eval_batch_size=3)
    judged = run.evaluate()
    columns = tokenized(rows, TASKS["lm"], tokenizer, max_length=12)  # of windows that share one token
    with torch.no_grad():
        losses = [
            run.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
            for ids in columns["input_ids"]
        ]
    exact = math.exp(sum(losses) / sum(len(ids) - 1 for ids in columns["input_ids"]))
    assert judged["eval_perplexity"] == pytest.approx(exact, rel=1e-5)
    found = Evaluator(TokenizedSplit(rows, TASKS["lm"], tokenizer, max_length=12), batch_size=3)(run.model)
    assert found["perplexity"] == pytest.approx(exact, rel=1e-5)


def test_text_to_text_columns(tmp_path):
    tokenizer = word_tokenizer()
    rows = Dataset.from_dict({"text": ["warm day", "cold night"], "label": [0, 1]})
    columns = tokenized(rows, REVIEWS, tokenizer, text_to_text=True)
    assert tokenizer.decode(columns["input_ids"][1]) == "customtext:coldnight</s>"
    assert [tokenizer.decode(labels) for labels in columns["labels"]] == ["0</s>", "1</s>"]
    run = MoETrainer(
        tiny_t5(), settings(tmp_path, max_steps=2), train_dataset=columns, processing_class=tokenizer,
        data_collator=collator(REVIEWS, tokenizer, text_to_text=True),
    )  # fmt: skip
    assert run.train().global_step == 2


def test_a_table_of_parquet_is_one_call_away(tmp_path):
    reviews().remove_columns("example_id").to_parquet(tmp_path / "train.parquet")
    data = load_task(custom_task(("text",)), tmp_path)
    columns = tokenized(data.train, data.task, words())
    assert columns["labels"] == [n % 2 for n in range(24)] and set(columns.column_names) >= {"input_ids", "length"}


def test_a_split_is_padded_masked_and_named():
    split = TokenizedSplit(reviews(4), REVIEWS, words(), max_length=16)
    batch = split.collate([1, 0])
    assert batch["attention_mask"].sum(1).tolist() == [7, 10] and batch["input_ids"].shape == (2, 10)
    assert batch["example_id"].tolist() == batch["labels"].tolist() == [1, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    padded = TokenizedSplit(reviews(4), REVIEWS, words(), max_length=16, pad_to=16)
    assert padded.collate([0])["input_ids"].shape == (1, 16)
    assert [len(batch["input_ids"]) for batch in split.batches(3)] == [3, 1]
    assert split.by_length(2)[0].tolist() == [0, 2]  # the longest first
    same = TokenizedSplit(reviews(4), REVIEWS, words(), max_length=16)
    others = (padded, TokenizedSplit(reviews(4), REVIEWS, words(), max_length=8),
              TokenizedSplit(reviews(3), REVIEWS, words(), max_length=16))  # fmt: skip
    assert split.fingerprint == same.fingerprint
    assert len({split.fingerprint, *(other.fingerprint for other in others)}) == 4
    with pytest.raises(UserError, match="data: expected at least one row, got none"):
        TokenizedSplit(reviews(4).select([]), REVIEWS, words(), max_length=8)


def test_extra_text_is_for_classes_and_scores_of_whole_texts():
    split, more = TokenizedSplit(reviews(4), REVIEWS, words(), max_length=16), reviews(2).remove_columns("label")
    joined = with_extra_text(split, more)
    assert joined.columns["labelled"][:] == [True] * 4 + [False] * 2
    assert with_corrupted_copies(joined, 1, 0).columns["labelled"][:] == [True] * 4 + [False] * 8
    for name, make in (
        ("extra-text", lambda: with_extra_text(split, more)),
        ("corrupted-copies", lambda: with_corrupted_copies(split, 1, 0)),
    ):
        split.text_to_text, split.task = True, REVIEWS
        with pytest.raises(UserError, match=rf"{name}: expected it with classes or scores .*, got an encoder-decoder"):
            make()
        split.text_to_text, split.task = False, TASKS["lm"]
        with pytest.raises(UserError, match=rf"{name}: expected it with .*, got a task of kind lm"):
            make()


def test_corrupted_copies_exchange_ordinary_tokens_by_others_of_the_texts():
    split = TokenizedSplit(reviews(400), REVIEWS, words(), max_length=16)
    joined = with_corrupted_copies(split, 2, seed=3)
    assert len(joined) == 1200 and joined.columns["example_id"][:] == list(range(1200))
    assert joined.columns["labelled"][:] == [True] * 400 + [False] * 800
    special = set(split.tokenizer.all_special_ids)
    counts = Counter(n for ids in split.columns["input_ids"] for n in ids if n not in special)
    ordinary = set(counts)
    changed = total = 0
    for row, copied in enumerate([*joined.columns["input_ids"]][400:]):
        first = split.columns[row % 400]["input_ids"]
        assert joined.columns[400 + row]["length"] == len(copied) == len(first)
        assert {n for n in copied} <= ordinary | special
        assert [n if n in special else 0 for n in copied] == [n if n in special else 0 for n in first]
        changed += sum(a != b for a, b in zip(first, copied, strict=True))
        total += sum(n not in special for n in first)
    others = 1 - sum((count / counts.total()) ** 2 for count in counts.values())  # of the draws are another token
    assert changed / total == pytest.approx(CORRUPTED * others, rel=0.1)
    first, second = (joined.columns[slice(400 * n, 400 * n + 400)]["input_ids"] for n in (1, 2))
    assert first != second
    assert with_corrupted_copies(split, 2, seed=3).fingerprint == joined.fingerprint
    assert with_corrupted_copies(split, 2, seed=4).fingerprint != joined.fingerprint
    alone = corrupted_copies(split.columns.select([0]), split.tokenizer, 1, 0)  # a corpus of one text
    assert len(alone) == 2
