"""Every op against the float64 reference on problems that nobody chose. In files of their own: a machine with a GPU
may lack hypothesis. The draws are the same every time; a failing problem is printed by hypothesis.
"""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebert_kernels import (
    expert_gemm,
    fused_moe_ffn,
    fused_moe_ffn_add_norm,
    group_tokens,
    group_tokens_by_hash,
    hash_route,
    mpo_expert_weights,
    reference,
)
from tests.helpers import assert_as_accurate
from tests.ops.cases import slack, widest
from tests.ops.problems import ID_DTYPES, Routed, Sites, routed, sites
from tests.ops.test_group_tokens import assert_same


def luck(dtype):
    """On top of `slack`: of few elements, the largest of plain torch's own errors may be small by chance."""
    return 4.0 if dtype == torch.float32 else 2.0


def gradients_of(function, tensors, dtype, frozen, dy, autocast=None):
    """[y, gradients] of `function` on copies of `tensors` in `dtype`; copies keep the strides."""
    copies = [
        t if t is None else t.detach().to(dtype).requires_grad_(not frozen >> i & 1) for i, t in enumerate(tensors)
    ]
    with torch.autocast(dy.device.type, dtype=autocast) if autocast else nullcontext():
        y = function(*copies)
    wanted = [t for t in copies if t is not None and t.requires_grad]
    return [y.detach(), *(torch.autograd.grad(y, wanted, dy.to(y.dtype)) if wanted else ())]


def compare(op, naive, tensors, dtype, frozen, dy, autocast=None):
    """Values and gradients of `op` by the bound of `moebert_kernels.accuracy`, and inference against training."""
    got = gradients_of(op, tensors, dtype, frozen, dy, autocast)
    same = gradients_of(naive, tensors, dtype, frozen, dy, autocast)
    exact = gradients_of(naive, tensors, torch.float64, frozen, dy)
    narrow = autocast or dtype
    for i, (mine, plain, truth) in enumerate(zip(got, same, exact, strict=True)):
        name = "y" if i == 0 else f"gradient {i - 1} of those wanted"
        if dtype == torch.float64:  # the reference is exact by definition, and sums of another order differ
            torch.testing.assert_close(mine, truth, rtol=0, atol=1e-13 * float(truth.abs().max()) if len(truth) else 0)
        else:
            assert_as_accurate(mine.to(narrow), plain.to(narrow), truth, name=name, factor=luck(narrow) * slack(narrow))
    with torch.no_grad():
        inference = gradients_of(op, tensors, dtype, -1, dy, autocast)[0]
    assert inference.dtype == got[0].dtype
    assert_as_accurate(
        inference.to(narrow), same[0].to(narrow), exact[0], name="inference", factor=luck(narrow) * slack(narrow)
    )


def check_ffn(problem: Routed, norm: bool = False) -> None:
    torch.manual_seed(problem.seed)
    ids, tensors = problem.expert_ids(), problem.tensors(norm)
    ids = ids[:, 0] if norm else ids
    op = fused_moe_ffn_add_norm if norm else fused_moe_ffn
    naive = getattr(reference, op.__name__)
    constants = {"activation": problem.activation, "hidden_dropout_p": problem.hidden_dropout_p,
                 "dropout_seed": torch.tensor(problem.seed)}  # fmt: skip
    if norm:
        constants |= {"eps": problem.eps, "dropout_p": problem.dropout_p}
    dy = problem.output_gradient(problem.tokens, problem.hidden)
    leading = (2, problem.tokens // 2) if problem.leading and problem.tokens % 2 == 0 else (problem.tokens,)

    def ours(x, *weights):
        *weights, p = weights
        routing = ids
        if len(leading) == 2:
            x, routing = x.unflatten(0, leading), ids.unflatten(0, leading)
            p = None if p is None else p.unflatten(0, leading)
        if problem.grouped:
            routing = group_tokens(ids, problem.experts)
        y = op(x, routing, *weights, routing_weights=p, recompute=problem.recompute, **constants)
        assert y.shape == x.shape
        return y.reshape(dy.shape)

    def theirs(x, *weights):
        return naive(x, ids.long(), *weights[:-1], routing_weights=weights[-1], **constants)

    no_gradient = norm and problem.hidden <= 2  # of a norm over two columns: it is constant, and rounding all there is
    compare(ours, theirs, tensors, problem.dtype, -1 if no_gradient else problem.frozen, dy, problem.autocast)


def check_add_norm(problem: Routed) -> None:
    check_ffn(problem, norm=True)


def check_expert_gemm(problem: Routed) -> None:
    torch.manual_seed(problem.seed)
    grouping = group_tokens(problem.expert_ids(), problem.experts)
    x, w, bias = problem.tensors()[:3]
    if not problem.gather:
        x = x.repeat_interleave(problem.top_k, 0)
    dy = problem.output_gradient(problem.tokens * problem.top_k, w.shape[1])

    def call(op):
        return lambda x, w, bias: op(x, w, grouping, bias, gather=problem.gather)

    arguments = [x, w, bias], problem.dtype, problem.frozen & 7, dy, problem.autocast
    compare(call(expert_gemm), call(reference.expert_gemm), *arguments)


def check_mpo(problem: Sites) -> None:
    torch.manual_seed(problem.seed)
    counts = problem.counts
    offsets = None if counts is None else torch.tensor([0, *counts]).cumsum(0).int()
    tensors = problem.tensors()
    rows, columns = (int(torch.tensor(factors).prod()) for factors in (problem.rows, problem.columns))
    dw = torch.randn(problem.experts, rows, columns).to(problem.autocast or problem.dtype).to(problem.dtype)

    def call(op):
        return lambda central, *aux: op(central, aux, offsets=offsets, central_site=problem.central_site)

    arguments = tensors, problem.dtype, problem.frozen, dw, problem.autocast
    compare(call(mpo_expert_weights), call(reference.mpo_expert_weights), *arguments)


def check_group_tokens(problem: Routed) -> None:
    torch.manual_seed(problem.seed)
    ids = problem.expert_ids()
    ids = ids.t().contiguous().t() if problem.layouts[0] == "transposed" else ids
    grouping = group_tokens(ids, problem.experts)
    assert_same(grouping, reference.group_tokens(ids.long(), problem.experts))
    offsets, rows = grouping.offsets.tolist(), grouping.row_to_assignment.tolist()
    assert sorted(rows) == list(range(ids.numel())) and offsets == sorted(offsets) and offsets[0] == 0
    for e in range(problem.experts):
        mine = rows[offsets[e] : offsets[e + 1]]
        assert mine == sorted(mine) and all(ids.reshape(-1)[a] == e for a in mine)
    assert [rows[r] for r in grouping.assignment_to_row.tolist()] == list(range(ids.numel()))


hashes = st.fixed_dictionaries({
    "shape": st.lists(st.integers(0, 9), max_size=3), "vocabulary": st.integers(0, 40), "layers": st.integers(0, 4),
    "experts": st.integers(1, 9), "ids": st.sampled_from(ID_DTYPES), "tables": st.sampled_from(ID_DTYPES),
    "mask": st.sampled_from([None, torch.bool, torch.int64, torch.float32]), "seed": st.integers(0, 2**31),
})  # fmt: skip


def check_hashes(problem: dict) -> None:
    torch.manual_seed(problem["seed"])
    vocabulary, experts = problem["vocabulary"], problem["experts"]
    token_ids = torch.randint(-3, vocabulary + 3, problem["shape"]).to(problem["ids"])
    tables = torch.randint(0, experts, (problem["layers"], vocabulary)).to(problem["tables"])
    mask = None if problem["mask"] is None else torch.randint(0, 2, problem["shape"]).to(problem["mask"])
    wanted = reference.group_tokens_by_hash(token_ids.long(), tables, experts, mask)
    for got, layer in zip(group_tokens_by_hash(token_ids, tables, experts, mask), wanted, strict=True):
        assert_same(got, layer)
    for table in tables:
        assert torch.equal(hash_route(token_ids, table, mask), reference.hash_route(token_ids.long(), table, mask))


# what is drawn, how it is checked; how many with torch and with an interpreted kernel: always, and in the slow test
FUZZ = {
    "fused_moe_ffn": (check_ffn, routed, (25, 4), (200, 8)),
    "fused_moe_ffn_add_norm": (check_add_norm, lambda *a: routed(*a, max_top_k=1), (20, 3), (150, 6)),
    "expert_gemm": (check_expert_gemm, routed, (15, 3), (80, 6)),
    "mpo_expert_weights": (check_mpo, sites, (10, 2), (60, 4)),
    "group_tokens_is_a_stable_permutation": (check_group_tokens, routed, (10, 2), (60, 10)),
    "group_tokens_by_hash": (check_hashes, lambda *a: hashes, (10, 2), (50, 10)),
}


def fuzz(name: str, implementation: str, slow: bool) -> None:
    check, strategy, *counts = FUZZ[name]
    interpreted = implementation != "torch" and not torch.cuda.is_available()
    drawn = strategy(18 if interpreted else 40, widest())

    @settings(
        max_examples=counts[slow][interpreted], deadline=None, derandomize=True, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(problem=drawn)
    def one(problem):
        check(problem)

    one()


@pytest.mark.parametrize("name", FUZZ)
def test_any_problem(name, implementation):
    fuzz(name, implementation, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FUZZ)
def test_six_hundred_problems(name, implementation):
    fuzz(name, implementation, slow=True)
