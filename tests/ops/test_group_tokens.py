import pytest
import torch
from torch.utils import _pytree as pytree

from moebert_kernels import Grouping, expert_gemm, group_tokens, group_tokens_by_hash, reference
from tests.ops.cases import HARDEST, ROUTINGS, E


def assert_same(got: Grouping, wanted: Grouping) -> None:
    assert got.top_k == wanted.top_k
    for name in ("offsets", "row_to_assignment", "assignment_to_row"):
        assert getattr(got, name).dtype == torch.int32
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize(
    "routing, dtype",
    [(routing, torch.int64) for routing in ROUTINGS]
    + [(HARDEST, dtype) for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32)],
    ids=str,
)
def test_matches_reference(routing, dtype):
    ids = ROUTINGS[routing]().to(dtype)
    assert_same(group_tokens(ids, E), reference.group_tokens(ids, E))


def test_many_experts():
    ids = torch.randint(-1, 40_000, (300,))
    assert_same(group_tokens(ids, 40_000), reference.group_tokens(ids, 40_000))


@pytest.mark.parametrize("masked", [True, False])
def test_by_hash_is_one_grouping_per_layer(masked):
    tables = torch.randint(0, E, (3, 50), dtype=torch.int16)
    token_ids = torch.randint(-3, 55, (4, 9))
    mask = torch.randint(0, 2, (4, 9)) if masked else None
    for got, wanted in zip(
        group_tokens_by_hash(token_ids, tables, E, mask),
        reference.group_tokens_by_hash(token_ids, tables, E, mask),
        strict=True,
    ):
        assert_same(got, wanted)


def test_grouping_is_a_pytree():
    grouping = group_tokens(torch.tensor([[1, 0], [0, -1]]), 2)
    leaves, spec = pytree.tree_flatten(grouping)
    assert len(leaves) == 3 and pytree.tree_unflatten(leaves, spec).top_k == 2
    with pytest.raises(AttributeError):
        grouping.top_k = 3


def test_of_counts_is_that_of_sorted_ids():
    counts = torch.tensor([3, 0, 5, 1], dtype=torch.int16)
    grouping, wanted = Grouping.from_counts(counts), group_tokens(torch.arange(4).repeat_interleave(counts.long()), 4)
    assert_same(grouping, wanted)
    assert grouping.num_experts == 4 and grouping.num_tokens == 9
    x, w = torch.randn(9, 8), torch.randn(4, 6, 8)
    assert torch.equal(expert_gemm(x, w, grouping), expert_gemm(x, w, wanted))
    for message, wrong in {
        "counts: expected a tensor, got list": [1, 2],
        r"counts: expected integers \(E,\), got torch.float32 of shape \(2,\)": torch.ones(2),
        r"counts: expected integers \(E,\), got torch.int64 of shape \(0,\)": torch.ones(0, dtype=torch.int64),
        "counts: expected at least 0 for each expert, got -1": torch.tensor([2, -1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            Grouping.from_counts(wrong)


def test_opcheck_and_compile():
    ids = torch.randint(-1, E, (2, 20))
    torch.library.opcheck(torch.ops.moebert_kernels.group_tokens.default, (ids, E))
    tables = torch.randint(0, E, (3, 50))
    by_hash = torch.ops.moebert_kernels.group_tokens_by_hash.default
    for mask in (None, torch.randint(0, 2, (20,))):
        torch.library.opcheck(by_hash, (torch.randint(-1, 60, (20,)), tables, mask, E))
    compiled = torch.compile(lambda ids, tables: group_tokens_by_hash(ids, tables, E), fullgraph=True, dynamic=True)
    for got, wanted in zip(compiled(ids[0], tables), group_tokens_by_hash(ids[0], tables, E), strict=True):
        assert_same(got, wanted)


def test_rejects():
    with pytest.raises(ValueError, match=r"expert_ids: expected an integer dtype, got torch.float32"):
        group_tokens(torch.zeros(3), E)
    with pytest.raises(ValueError, match=r"expert_ids: expected shape \(T,\) or \(T, top_k\), got \(1, 1, 1\)"):
        group_tokens(torch.zeros(1, 1, 1, dtype=torch.int64), E)
    with pytest.raises(ValueError, match=r"expert_ids: expected top_k >= 1, got \(3, 0\)"):
        group_tokens(torch.zeros(3, 0, dtype=torch.int64), E)
    with pytest.raises(ValueError, match=r"num_experts: expected an integer >= 1, got 0"):
        group_tokens(torch.zeros(3, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"tables: expected shape \(L, V\), got \(5,\)"):
        group_tokens_by_hash(torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), E)
