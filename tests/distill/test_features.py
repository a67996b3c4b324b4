"""Token ids and batches: every example once, the same order for the same seed and epoch, answers where they are."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from moebert_kernels.data.tasks import TASKS
from moebert_kernels.distill.features import Batches, Features, ordered_batches, tokenize
from moebert_kernels.errors import UserError
from tests.distill.words import tokenizer_of

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "ann", "read", "of", "war", "and", "peace", "in", "paris"]


def features_of(lengths):
    rows = [np.arange(1, length + 1, dtype=np.int32) for length in lengths]
    return Features(rows, {"labels": np.arange(len(rows), dtype=np.int64)}, padding_id=0)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(1, 9), st.booleans())
@settings(max_examples=30, deadline=None)
def test_an_epoch_has_every_example_once(lengths, batch_size, bucket):
    batches = Batches(features_of(lengths), batch_size, seed=3, bucket=bucket)
    for epoch in (0, 1):
        order = batches.order(epoch)
        assert len(order) == len(batches)
        assert sorted(np.concatenate(order)) == list(range(len(lengths)))
        assert all(len(batch) <= batch_size for batch in order)


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    one, same = (Batches(features_of(lengths), 8, seed=1) for _ in range(2))
    list(one(0))  # earlier epochs do not matter
    for a, b in zip(one(5), same(5), strict=True):
        assert torch.equal(a["example_id"], b["example_id"])
    orders = [np.concatenate(Batches(features_of(lengths), 8, seed=s).order(e)) for s, e in ((1, 0), (1, 1), (2, 0))]
    assert not any((orders[i] == orders[j]).all() for i, j in ((0, 1), (0, 2), (1, 2)))


def test_buckets_save_padding():
    lengths = np.random.default_rng(0).integers(4, 60, 1000)

    def padded(bucket):
        return sum(batch["input_ids"].numel() for batch in Batches(features_of(lengths), 16, bucket=bucket)(0))

    assert padded(True) < 1.15 * lengths.sum() < padded(False)


def test_a_batch_is_padded_and_masked():
    batch = features_of([2, 4]).collate([1, 0])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["example_id"].tolist() == batch["labels"].tolist() == [1, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert features_of([2]).collate([0], pad_to=5)["input_ids"].shape == (1, 5)


def test_the_fingerprint_names_the_data():
    assert features_of([2, 3]).fingerprint == features_of([2, 3]).fingerprint != features_of([3, 2]).fingerprint
    assert Batches(features_of([2, 3]), 1).fingerprint != Batches(features_of([2, 3]), 2).fingerprint


def test_evaluation_goes_from_long_to_short():
    batches = ordered_batches(features_of([3, 9, 1, 9, 5]), 2)
    assert [batch.tolist() for batch in batches] == [[1, 3], [4, 0], [2]]


def test_rejects_no_data():
    with pytest.raises(UserError, match="data: expected at least one training example, got none"):
        Batches(features_of([]), 2)
    with pytest.raises(UserError, match="batch_size: expected at least 1, got 0"):
        Batches(features_of([1]), 0)


def test_tokenizes_pairs():
    data = Dataset.from_dict({"sentence1": ["the cat"], "sentence2": ["on a mat"], "label": [2.5]})
    features = tokenize(data, TASKS["stsb"], tokenizer_of(WORDS), max_length=7)
    batch = features.collate([0])
    assert batch["input_ids"].shape == (1, 7)  # two words, one of three cut off, three special tokens
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert batch["labels"].dtype == torch.float32


def squad_rows(rows):
    contexts, answers = zip(*rows, strict=True)
    starts = [[c.index(a)] if a else [] for c, a in rows]
    return Dataset.from_dict({
        "question": [" who sat ?"] * len(rows),
        "context": list(contexts),
        "answers": [{"text": [a] if a else [], "answer_start": s} for a, s in zip(answers, starts, strict=True)],
    })  # fmt: skip


def test_windows_hold_answers_where_they_are():
    context = "the cat sat on a mat while ann read of war and peace in paris"
    data = squad_rows([(context, "war and peace"), (context, ""), ("ann read", "ann")])
    features = tokenize(data, TASKS["squad_v2"], tokenizer_of(WORDS), max_length=13, doc_stride=3)
    assert {window.row for window in features.windows} == {0, 1, 2}
    found = set()
    for ids, window, start, end in zip(features.input_ids, features.windows, *features.targets.values(), strict=True):
        assert len(ids) <= 13
        if start == 0 == end:
            continue
        text = data[window.row]["context"][window.offsets[start, 0] : window.offsets[end, 1]]
        assert [text] == data[window.row]["answers"]["text"]
        found.add(window.row)
    assert found == {0, 2}  # and nothing for the question without an answer


def test_rejects_questions_longer_than_the_windows():
    data = squad_rows([("ann read", "ann")])
    with pytest.raises(UserError, match="max_length: expected more than 14 for questions of up to 3 tokens and"):
        tokenize(data, TASKS["squad"], tokenizer_of(WORDS), max_length=12, doc_stride=8)
