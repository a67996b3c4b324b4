"""Hash tables, against the original code's."""

import pytest
import torch

from moebert_kernels.convert import balanced_hash_table, count_tokens, random_hash_table
from moebert_kernels.convert.tables import stacked_tables
from moebert_kernels.errors import UserError
from tests.golden_arrays import golden


@pytest.mark.parametrize("V,E", [(1000, 4), (257, 3)])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_random_tables_equal_the_original(seed, V, E):
    state = torch.get_rng_state()
    assert torch.equal(random_hash_table(V, E, seed), golden("c_hash_tables", "random.")[f"seed{seed}.V{V}.E{E}"])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_draws_tables_in_a_row():
    generator = torch.Generator().manual_seed(3)
    first, second = (random_hash_table(100, 4, generator) for _ in range(2))
    assert torch.equal(first, random_hash_table(100, 4, 3))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("E", [4, 3])
@pytest.mark.parametrize("counts", ["distinct", "zipf"])
def test_balanced_tables_equal_the_original(counts, E):
    arrays = golden("c_hash_tables", f"balance.{counts}.")
    table = balanced_hash_table(arrays["freq"], E, visit_order=arrays["visit_order"])
    assert torch.equal(table, arrays[f"E{E}.table"])
    loads = torch.zeros(E, dtype=torch.int64).index_add_(0, table, arrays["freq"])
    assert torch.equal(loads, arrays[f"E{E}.bucket_load"])


def test_balanced_without_an_order_balances_as_well():
    arrays = golden("c_hash_tables", "balance.zipf.")
    table = balanced_hash_table(arrays["freq"], 4)
    loads = torch.zeros(4, dtype=torch.int64).index_add_(0, table, arrays["freq"])
    assert sorted(loads.tolist()) == sorted(arrays["E4.bucket_load"].tolist())
    assert torch.equal(table, balanced_hash_table(arrays["freq"], 4))


def test_count_tokens_leaves_padding_out():
    batch = {"input_ids": torch.tensor([[1, 2, 2, 0], [3, 0, 0, 0]]), "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]]}
    assert count_tokens([batch, [2, 4], torch.tensor([[4]])], 6).tolist() == [1, 1, 3, 1, 2, 0]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: random_hash_table(0, 4, 0), "vocab_size: expected at least 1, got 0"),
        (lambda: random_hash_table(4, 0, 0), "num_experts: expected at least 1, got 0"),
        (lambda: balanced_hash_table(torch.tensor([1.0]), 2), "counts: expected .* integers >= 0, got torch.float32"),
        (lambda: balanced_hash_table(torch.tensor([-1]), 2), "counts: expected .* integers >= 0"),
        (
            lambda: balanced_hash_table(torch.tensor([1, 2]), 2, torch.tensor([0, 0])),
            "visit_order: expected a permutation of 0 to 1",
        ),
        (lambda: count_tokens([[1, 9]], 9), "input_ids: expected 0 to 8, got 1 to 9"),
        (lambda: count_tokens([], 9), "batches: expected tokens to count, got none"),
        (lambda: count_tokens([[1]], 0), "vocab_size: expected at least 1, got 0"),
        (lambda: count_tokens(3, 9), "batches: expected several in an iterable, such as a list, got int"),
        (lambda: count_tokens({"input_ids": [[1]]}, 9), "batches: expected several in an iterable, .*, got dict"),
        (lambda: count_tokens([{"text": "a", "label": 1}], 9), "expected input_ids in each, got text, label"),
        (lambda: count_tokens([None], 9), r"lists of one length, got others \(Could not infer"),
        (lambda: count_tokens(["a film"], 9), "batches: expected input_ids as a tensor or lists of one length"),
        (lambda: count_tokens([{"input_ids": [[1, 2], [3]]}], 9), r"lists of one length, got others \(expected seq"),
        (lambda: count_tokens([[0.5, 1]], 9), "batches: expected input_ids as whole numbers, got torch.float32"),
        (
            lambda: count_tokens([{"input_ids": [[1, 2]], "attention_mask": [1, 1, 1]}], 9),
            r"batches: expected an attention_mask of the input_ids' shape \(1, 2\), got \(3,\)",
        ),
        (lambda: stacked_tables([0] * 5, 2, 6, 4), r"tables: expected shape \(6,\) or \(2, 6\)"),
        (lambda: stacked_tables([0, 4], 2, 2, 4), "tables: expected experts 0 to 3, got 0 to 4"),
        (lambda: stacked_tables([0.5, 1], 2, 2, 4), "tables: expected integers, got torch.float32"),
        (lambda: stacked_tables("table", 2, 2, 4), "tables: expected integers of shape"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(UserError, match=message):
        call()
