import pytest
import torch

from moebert_kernels import expert_gemm, group_tokens, reference
from tests.helpers import assert_as_accurate
from tests.ops.cases import DTYPES, HARDEST, ROUTINGS, ROUTINGS_AND_DTYPES, E, H, I, T, run, slack, widest


def call(op):
    def wrapped(x, w, bias, *, grouping, gather):
        return op(x, w, grouping, bias, gather=gather)

    return wrapped


@pytest.mark.parametrize(
    "routing, dtype, gather, bias",
    [(routing, dtype, True, True) for routing, dtype in ROUTINGS_AND_DTYPES]
    + [(HARDEST, dtype, False, False) for dtype in DTYPES],
    ids=str,
)
def test_matches_reference(routing, dtype, gather, bias):
    ids = ROUTINGS[routing]()
    inputs = [torch.randn(len(ids), H).to(dtype), torch.randn(E, I, H).to(dtype) / H**0.5,
              torch.randn(E, I).to(dtype) if bias else None]  # fmt: skip
    dy = torch.randn(len(ids), I).to(dtype)
    constants = {"grouping": group_tokens(ids, E), "gather": gather}
    got = run(call(expert_gemm), inputs, dy, dtype, **constants)
    same = run(call(reference.expert_gemm), inputs, dy, dtype, **constants)
    exact = run(call(reference.expert_gemm), inputs, dy, torch.float64, **constants)
    names = ("y", "dx", "dw", "dbias") if bias else ("y", "dx", "dw")
    for name, *tensors in zip(names, got, same, exact, strict=True):
        assert_as_accurate(*tensors, name=name, factor=slack(dtype))


def test_gather_with_top_k_sums_gradients_of_a_token():
    ids = torch.randint(-1, E, (T, 3))
    inputs = [torch.randn(T, H), torch.randn(E, I, H), torch.randn(E, I)]
    constants = {"grouping": group_tokens(ids, E), "gather": True}
    dy = torch.randn(3 * T, I)
    got = run(call(expert_gemm), inputs, dy, widest(), **constants)
    exact = run(call(reference.expert_gemm), inputs, dy, torch.float64, **constants)
    for tensor, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(tensor.double(), truth, rtol=1e-5, atol=1e-4)


def test_opcheck():
    grouping = group_tokens(torch.randint(-1, E, (T,)), E)
    maps = (grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row)
    tensors = [t.requires_grad_() for t in (torch.randn(T, H), torch.randn(E, I, H), torch.randn(E, I))]
    torch.library.opcheck(torch.ops.moebert_kernels.expert_gemm.default, (*tensors, *maps, 1, True))


def test_rejects():
    grouping = group_tokens(torch.zeros(T, dtype=torch.int64), E)
    x, w = torch.randn(T, H), torch.randn(E, I, H)
    with pytest.raises(ValueError, match=rf"x: expected shape \(T \* top_k={T}, K={H}\), got \({T}, {I}\)"):
        expert_gemm(torch.randn(T, I), w, grouping)
    with pytest.raises(ValueError, match=r"w: expected shape \(E, N, K\) of sizes >= 1, got"):
        expert_gemm(x, w[0], grouping)
    with pytest.raises(ValueError, match=r"grouping: expected a grouping over E=3 experts, got 4"):
        expert_gemm(x, w[:3], grouping)
    with pytest.raises(ValueError, match=r"grouping: expected a Grouping, got Tensor"):
        expert_gemm(x, w, grouping.offsets)
    with pytest.raises(ValueError, match=rf"bias: expected shape \(E={E}, N={I}\), got \({I},\)"):
        expert_gemm(x, w, grouping, torch.zeros(I))
