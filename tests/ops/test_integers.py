"""Ids and tables of every integer dtype mean the same, also where the dtype cannot hold E or V itself."""

import pytest
import torch

from moebert_kernels import fused_moe_ffn, group_tokens, group_tokens_by_hash, hash_route, reference
from tests.ops.test_group_tokens import assert_same

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES = [*SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def some(dtype, limit):
    """Ids below `limit`, as far as the dtype goes, some outside, and both its ends."""
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    inside = torch.randint(0, min(high, limit - 1) + 1, (40,))
    outside = torch.tensor([-1, limit - 1, limit, limit + 7]).clamp(max(low, -(2**62)), min(high, 2**62))
    ends = torch.tensor([low, min(high, 2**63 - 1)])
    ids = torch.cat([inside, outside, ends]).to(dtype)
    if dtype == torch.uint64:
        ids = torch.cat([ids.long(), torch.tensor([-1, -(2**63)])]).to(dtype)  # 2^64 - 1 and 2^63
    return ids


def wide(ids):
    return ids.long()  # of uint64 what is past int64 wraps to negative ids: outside, too


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_ids(dtype):
    for vocabulary in (1, 200, 256, 259, 40_000):
        ids, tables = some(dtype, vocabulary), torch.arange(2 * vocabulary).view(2, vocabulary) % 5
        mask = torch.rand(ids.shape) < 0.8
        got = hash_route(ids, tables[0], mask)
        assert torch.equal(got, reference.hash_route(wide(ids), tables[0], mask))
        assert torch.equal(got, reference.hash_route(ids, tables[0], mask))
        wanted = reference.group_tokens_by_hash(wide(ids), tables, 5, mask)
        for layer, truth in zip(group_tokens_by_hash(ids, tables, 5, mask), wanted, strict=True):
            assert_same(layer, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_ids(dtype):
    for experts in (1, 127, 128, 255, 256, 300):
        ids = some(dtype, experts)
        assert_same(group_tokens(ids, experts), reference.group_tokens(wide(ids), experts))
        assert_same(reference.group_tokens(ids, experts), reference.group_tokens(wide(ids), experts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables(dtype):
    table, ids = some(dtype, 5), torch.arange(-1, 50)
    assert torch.equal(hash_route(ids, table), reference.hash_route(ids, wide(table)))
    got = group_tokens_by_hash(ids, table[None], 5)[0]
    assert_same(got, reference.group_tokens_by_hash(ids, wide(table)[None], 5)[0])


def test_an_entry_that_is_no_int32_is_nobody():
    entries = [2**32 + 1, 1 - 2**32, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63), 2**31 - 1, -(2**31), 3]
    table, ids = torch.tensor(entries), torch.arange(len(entries))
    wanted = [-1, -1, -1, -1, -1, -1, 2**31 - 1, -(2**31), 3]
    assert hash_route(ids, table).tolist() == reference.hash_route(ids, table).tolist() == wanted
    assert group_tokens_by_hash(ids, table[None], 4)[0].offsets.tolist() == [0, 0, 0, 0, 1]


def test_ids_of_fused_moe_ffn():
    ids, x = torch.tensor([[0, 3], [5, 2], [1, 1]]), torch.randn(3, 4)
    weights = [torch.randn(s) for s in ((4, 3, 4), (4, 3), (4, 4, 3), (4, 4))]
    wanted = fused_moe_ffn(x, ids, *weights)
    for dtype in DTYPES:
        assert torch.equal(fused_moe_ffn(x, ids.to(dtype), *weights), wanted), dtype


def test_bytes_as_ids_of_256_experts():
    experts, ids = 256, torch.tensor([0, 255, 7, 255, 128], dtype=torch.uint8)
    weights = [torch.randn(s) for s in ((experts, 3, 4), (experts, 3), (experts, 4, 3), (experts, 4))]
    x = torch.randn(5, 4)
    exact = reference.fused_moe_ffn(x.double(), ids.long(), *(w.double() for w in weights))
    torch.testing.assert_close(fused_moe_ffn(x, ids, *weights).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.fused_moe_ffn(x.double(), ids, *(w.double() for w in weights)), exact)


def test_a_mask_of_any_dtype():
    ids, table, kept = torch.arange(12), torch.arange(12), torch.arange(12) % 3
    for dtype in (*DTYPES, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        got = hash_route(ids, table, kept.to(dtype))
        assert torch.equal(got, torch.where(kept != 0, ids, -1).int()), dtype
