import pytest
import torch

from moebert_kernels import hash_route, reference


@pytest.mark.parametrize(
    "shape, dtype",
    [(shape, torch.int64) for shape in ((11,), (3, 7), (0,), (2, 3, 4))]
    + [((3, 7), dtype) for dtype in (torch.uint8, torch.int16, torch.int32)],
    ids=str,
)
def test_matches_reference(shape, dtype):
    table = torch.randint(0, 4, (20,)).to(dtype)
    token_ids = torch.randint(-5, 25, shape)
    for mask in (None, torch.randint(0, 2, shape), torch.rand(shape) < 0.5):
        got = hash_route(token_ids, table, mask)
        assert got.dtype == torch.int32 and torch.equal(got, reference.hash_route(token_ids, table, mask))


def test_empty_table_routes_nothing():
    assert torch.equal(hash_route(torch.arange(3), torch.empty(0, dtype=torch.int64)), torch.full((3,), -1).int())


def test_extreme_ids_are_never_read():
    token_ids = torch.tensor([2**62, -(2**62), 2**31, 0])
    assert hash_route(token_ids, torch.tensor([3])).tolist() == [-1, -1, -1, 3]


def test_opcheck():
    torch.library.opcheck(
        torch.ops.moebert_kernels.hash_route.default,
        (torch.randint(-1, 9, (12,)), torch.randint(0, 4, (3, 8)), torch.ones(12)),
    )


def test_rejects():
    table = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"token_ids: expected an integer dtype, got torch.float32"):
        hash_route(torch.zeros(3), table)
    with pytest.raises(ValueError, match=r"table: expected shape \(V,\), got \(1, 5\)"):
        hash_route(torch.zeros(3, dtype=torch.int64), table[None])
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(3,\) \(as token_ids\), got \(4,\)"):
        hash_route(torch.zeros(3, dtype=torch.int64), table, torch.ones(4))
