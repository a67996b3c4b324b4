"""Ops at shapes that nobody chose. In a file of its own: a machine with a GPU may lack hypothesis."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from moebert_kernels import fused_moe_ffn, group_tokens, reference
from tests.ops.cases import run
from tests.ops.test_fused_moe_ffn import call
from tests.ops.test_group_tokens import assert_same


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 70), hidden=st.integers(1, 19), width=st.integers(1, 19), experts=st.integers(1, 7),
    top_k=st.integers(1, 3), weighted=st.booleans(), strided=st.booleans(), data=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(tokens, hidden, width, experts, top_k, weighted, strided, data):
    torch.manual_seed(data)
    x = torch.randn(hidden, tokens).t() if strided else torch.randn(tokens, hidden)
    ids = torch.randint(-1, experts + 1, (tokens, top_k))
    w1 = torch.randn(experts, hidden, width).transpose(1, 2) if strided else torch.randn(experts, width, hidden)
    w2 = torch.randn(experts, hidden, width)
    b1, b2 = torch.randn(experts, width), torch.randn(experts, hidden)
    p = torch.rand(tokens, top_k) if weighted else None
    inputs, constants = [x, w1, b1, w2, b2, p], {"ids": ids}
    dy = torch.randn(1, hidden).expand(tokens, hidden)
    got = run(call(fused_moe_ffn), inputs, dy, torch.float32, **constants)
    exact = run(call(reference.fused_moe_ffn), inputs, dy, torch.float64, **constants)
    with torch.no_grad():
        inference = fused_moe_ffn(x, ids, w1, b1, w2, b2, routing_weights=p)
    torch.testing.assert_close(inference, got[0], rtol=1e-4, atol=1e-4)
    for tensor, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(tensor.double(), truth, rtol=1e-3, atol=1e-3)


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(0, 90), experts=st.integers(1, 40), top_k=st.integers(1, 3), data=st.integers(0, 2**31))
def test_group_tokens_is_a_stable_permutation(tokens, experts, top_k, data):
    torch.manual_seed(data)
    ids = torch.randint(-2, experts + 2, (tokens, top_k))
    grouping = group_tokens(ids, experts)
    assert_same(grouping, reference.group_tokens(ids, experts))
    offsets, rows = grouping.offsets.tolist(), grouping.row_to_token.tolist()
    assert sorted(rows) == list(range(tokens * top_k))
    assert offsets == sorted(offsets) and offsets[0] == 0
    for e in range(experts):
        mine = rows[offsets[e] : offsets[e + 1]]
        assert mine == sorted(mine) and all(ids.view(-1)[a] == e for a in mine)
    assert [rows[r] for r in grouping.token_to_row.tolist()] == list(range(tokens * top_k))
