"""Batches that a model cannot read are one clear error, in each function that reads some."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from moebert_kernels.convert import choose_experts, convert_to_moe, importance_scores
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.convert.text_pass import read_text
from moebert_kernels.errors import UserError
from tests.convert.families import make

READERS = {
    "convert": lambda model, batches: convert_to_moe(model, batches=batches),
    "choose": choose_experts,
    "score": importance_scores,
}


def batch(length=8, largest=99):
    ids = torch.randint(3, 90, (2, length))
    ids[1, 2] = largest
    return {"input_ids": ids, "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("bert", {"largest": 100}, "batches: expected input_ids from 0 to 99, the model's vocabulary, got . to 100;"),
        ("gpt2", {"largest": -1}, "batches: expected input_ids from 0 to 99, the model's vocabulary, got -1 to"),
        ("bert", {"length": 65}, "batches: expected texts of at most 64 tokens, .* got 65; call"),
        ("roberta", {"length": 63}, "batches: expected texts of at most 62 tokens"),
    ],
)
def test_what_a_model_cannot_read(family, given, message, read):
    model = make(family, AutoModelForSequenceClassification, pad_token_id=1)
    with pytest.raises(UserError, match=message):
        read(model, [batch(**given)])


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (batch(), "expected several in an iterable, got a single one; put it in a list"),
        ([(1, 2)], "expected mappings with input_ids, tokenized texts, got tuple"),
        (
            [{"input_ids": [[5]], "labels": [0]}],
            r"expected tensors in each, got input_ids \(list\), labels \(list\); call",
        ),
        ([{}], "expected tensors in each, got an empty one"),
        ([batch() | {"input_ids": torch.tensor([5, 6])}], r"expected input_ids as whole .*, got \(2,\) of torch.int64"),
        ([batch() | {"input_ids": torch.ones(2, 8)}], r"expected input_ids as whole .* got \(2, 8\) of torch.float32"),
        ([{"input_ids": torch.ones(2, 0).long()}], r"\(B, T\), at least one, got \(2, 0\)"),
        ([batch() | {"attention_mask": torch.ones(2, 5)}], r"of the input_ids' shape \(2, 8\), got \(2, 5\)"),
        ([], "got no|got none.* an iterator that was read before is empty"),
    ],
)
def test_what_is_no_batch_of_tokens(batches, message, read):
    with pytest.raises(UserError, match=f"batches: .*{message}"):
        read(make("bert", AutoModelForSequenceClassification), batches)


def test_labels_are_not_read_where_no_loss_is_wanted():
    """Running text has some for each token, which a classifier would refuse."""
    model = make("bert", AutoModelForSequenceClassification)
    assert choose_experts(model, [batch(largest=80) | {"labels": torch.zeros(2, 8, dtype=torch.long)}])


def test_rotary_positions_reach_beyond_the_configuration():
    model = make("modernbert")
    assert len(read_text(model, find_sites(model), [batch(70)], 10)) == 2


def test_other_errors_of_a_forward_stay_what_they_are():
    model = make("bert")
    with pytest.raises(RuntimeError, match="must match"):
        choose_experts(model, [batch() | {"token_type_ids": torch.zeros(2, 5, dtype=torch.long)}])


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("bert-base-uncased", r"expected a loaded model, got the name 'bert-base-uncased'; AutoModel.from_pretrained"),
        (None, "expected a model of transformers, got NoneType"),
    ],
)
def test_a_name_is_no_model(model, message, read):
    with pytest.raises(UserError, match=f"model: {message}"):
        read(model, [batch()])


def test_a_module_around_a_model_is_scored():
    """It has no configuration and no embeddings of its own."""
    model = make("bert", AutoModelForSequenceClassification)

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask=None, return_dict=True):
            return self.inner(input_ids, attention_mask, return_dict=return_dict)

    given = batch()
    assert torch.equal(importance_scores(Around(), [given]), importance_scores(model, [given]))
    with pytest.raises(IndexError):
        importance_scores(Around(), [batch(largest=100)])
