"""The Hopper GEMM: what is passed to it, by a stand-in that reads the same pointers; on a GPU, its values."""

import pytest
import torch

from moebert_kernels import backend, group_tokens, native, reference
from moebert_kernels.activation import UNGATED
from moebert_kernels.cuda_backend import expert_gemm, expert_gemm_norm
from moebert_kernels.cuda_backend import fused_moe_ffn as cuda_ffn
from moebert_kernels.cuda_backend import fused_moe_ffn_add_norm as cuda_add_norm
from tests.backends import why_not_built
from tests.helpers import assert_as_accurate
from tests.kernels.cuda_stand_in import StandIn

E = 4
HOPPER = tuple(name for name in UNGATED if name != "relu2")


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(native, "module", lambda: found)
    monkeypatch.setattr(expert_gemm_norm, "LEAST_TOKENS", 12)
    for form in (expert_gemm, expert_gemm_norm):
        monkeypatch.setattr(form, "stream_of", lambda tensor: 0)
    reasons = {"expert_gemm": None, "expert_gemm_norm": None}
    monkeypatch.setattr(backend, "kernel_unavailable", lambda kernel, *where: reasons.get(kernel, "not in this test"))
    return found


def ids_of(tokens, top_k=1, device="cpu"):
    ids = torch.randint(-1, E, (tokens, top_k), device=device)
    ids[ids == 2] = 0  # an expert without rows
    return ids


def grouping_of(*arguments, **options):
    return group_tokens(ids_of(*arguments, **options), E)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "odd_rows", "one_expert"])
def test_expert_gemm_passes_what_the_kernel_reads(stand_in, dtype, gather, layout):
    grouping = grouping_of(37, top_k=2)
    x = torch.randn(37 if gather else 74, 24, dtype=dtype)
    w, bias = torch.randn(E, 40, 24, dtype=dtype), torch.randn(E, 40, dtype=dtype)
    if layout == "sliced":
        w = torch.randn(2 * E, 48, 32, dtype=dtype)[::2, :40, :24]
    elif layout == "odd_rows":  # made whole pieces by a copy
        x, bias = torch.randn(len(x), 27, dtype=dtype)[:, :24], torch.randn(40, E, dtype=dtype).T
    elif layout == "one_expert":
        w, bias = w[1:2].expand(1, 40, 24), bias[:1]
        grouping = group_tokens(torch.randint(-1, 1, (37, 2)), 1)
    got = expert_gemm.forward(x, w, bias, grouping, gather)
    assert stand_in.calls == [False]
    same = reference.expert_gemm(x, w, grouping, bias, gather=gather)
    exact = reference.expert_gemm(x.double(), w.double(), grouping, bias.double(), gather=gather)
    assert_as_accurate(got, same, exact, "y")


@pytest.mark.parametrize("activation", HOPPER)
@pytest.mark.parametrize("save", [False, True])
def test_fused_moe_ffn_is_two_launches(stand_in, activation, save):
    tensors, ids = ffn_arguments(50, 24, 40, torch.bfloat16), ids_of(50)
    grouping = group_tokens(ids, E)
    x, w1, b1, w2, b2, p = tensors
    y, h_pre = cuda_ffn.forward(x, grouping, w1, b1, w2, b2, p, activation, 0.0, None, save)
    assert stand_in.calls == [False, True]
    assert_ffn(y, tensors, ids, activation)
    assert h_pre.shape == (50 if save else 0, 40)
    if save:
        exact = reference.expert_gemm(x.double(), w1.double(), grouping, b1.double(), gather=True)
        same = reference.expert_gemm(x, w1, grouping, b1, gather=True)
        assert_as_accurate(h_pre, same, exact, "h_pre")


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_the_moebert_expert_is_two_launches_and_a_pass(stand_in, x_dtype, save, dropout_p):
    tensors, ids = ffn_arguments(50, 24, 40, torch.bfloat16), ids_of(50)
    x, w1, b1, w2, b2, p = tensors
    x, p = x.to(x_dtype), p.to(x_dtype)
    norm = [torch.rand(E, 24, dtype=x_dtype) + 0.5, torch.randn(E, 24, dtype=x_dtype)]
    grouping, seed = group_tokens(ids, E), torch.tensor(5)
    y, h_pre, ffn = cuda_add_norm.forward(
        x, grouping, w1, b1, w2, b2, *norm, p, 1e-5, "gelu", dropout_p, 0.0, seed, save
    )  # fmt: skip
    assert stand_in.calls == [False, True]
    assert y.dtype == x_dtype and h_pre.shape == (50 if save else 0, 40) and ffn.shape == (50 if save else 0, 24)

    def expected(dtype):
        wide = [tensor.to(dtype) for tensor in (x, w1, b1, w2, b2, *norm)]
        return reference.fused_moe_ffn_add_norm(
            wide[0], ids, *wide[1:], routing_weights=p.to(dtype), eps=1e-5, dropout_p=dropout_p, dropout_seed=seed
        )  # fmt: skip

    assert_as_accurate(y.bfloat16(), expected(torch.bfloat16), expected(torch.float64), "y")


NORMED = 96  # columns that the form which normalises in the GEMM takes


@pytest.mark.parametrize("layout", ["contiguous", "odd", "no_options"])
@pytest.mark.parametrize("in_order", [False, True])
def test_the_moebert_expert_normalises_in_its_second_launch(stand_in, in_order, layout):
    tensors, ids = ffn_arguments(50, NORMED, 40, torch.bfloat16), ids_of(50)
    x, w1, b1, w2, b2, p = tensors
    norm = [torch.rand(E, NORMED, dtype=x.dtype) + 0.5, torch.randn(E, NORMED, dtype=x.dtype)]
    if layout == "odd":  # made whole pieces by copies
        x = torch.randn(50, NORMED + 3, dtype=x.dtype)[:, 1 : NORMED + 1]
        norm, b2 = [tensor.T.contiguous().T for tensor in norm], b2.T.contiguous().T
        p = torch.rand(100, 1, dtype=x.dtype)[::2]
    elif layout == "no_options":
        b2 = p = None
    grouping = group_tokens(ids, E)
    order = grouping.row_to_assignment.long()
    y, h_pre, ffn = cuda_add_norm.forward(
        x[order] if in_order else x, grouping, w1, b1, w2, b2, *norm, p, 1e-5, "gelu", 0.0, 0.0, None, False, in_order
    )  # fmt: skip
    assert stand_in.calls == [False, True] and stand_in.normed == [in_order]
    assert h_pre.shape == (0, 40) and ffn.shape == (0, NORMED)
    same, exact = (
        reference.fused_moe_ffn_add_norm(
            x.to(wide), ids, *(None if t is None else t.to(wide) for t in (w1, b1, w2, b2, *norm)), eps=1e-5,
            routing_weights=None if p is None else p.to(wide),
        )
        for wide in (torch.bfloat16, torch.float64)
    )  # fmt: skip
    assert_as_accurate(y, same, exact, "y")


@pytest.mark.parametrize(
    "why", ["few_tokens", "training", "dropout", "float32", "odd_columns", "wide", "left_out", "two_experts", "swiglu"]
)
def test_what_the_normalising_gemm_cannot_take_runs_without_it(stand_in, why):
    hidden = {"odd_columns": 72, "wide": 1056}.get(why, NORMED)
    tokens = 11 if why == "few_tokens" else 12
    x, w1, b1, w2, b2, p = ffn_arguments(tokens, hidden, 40, torch.bfloat16)
    x = x.float() if why == "float32" else x
    norm = [torch.ones(E, hidden, dtype=x.dtype), torch.zeros(E, hidden, dtype=x.dtype)]
    drop, seed = (0.25, torch.tensor(5)) if why == "dropout" else (0.0, None)
    if why == "two_experts":
        assert not cuda_ffn.gemms_apply(x, grouping_of(12, top_k=2), w1, w2, "gelu", 0.0, None)
        return
    if why == "swiglu":
        w1, b1 = w1.repeat(1, 2, 1), b1.repeat(1, 2)
    with backend.use_backend("triton", without=("expert_gemm_norm",) if why == "left_out" else ()):
        y, *_ = cuda_add_norm.forward(
            x, grouping_of(tokens), w1, b1, w2, b2, *norm, p.to(x.dtype), 1e-5, "swiglu" if why == "swiglu" else "gelu",
            drop, 0.0, seed, why == "training",
        )  # fmt: skip
    assert stand_in.normed == [] and torch.isfinite(y).all()


def ffn_arguments(tokens, hidden, width, dtype, device="cpu"):
    """x, w1, b1, w2, b2, p."""
    shapes = [(tokens, hidden), (E, width, hidden), (E, width), (E, hidden, width), (E, hidden)]
    scales = [1, hidden**-0.5, 1, width**-0.5, 1]
    made = [torch.randn(shape) * scale for shape, scale in zip(shapes, scales, strict=True)]
    return [tensor.to(device, dtype) for tensor in (*made, torch.rand(tokens, 1))]


def assert_ffn(y, tensors, ids, activation):
    options = {"activation": activation}
    *wide, wide_p = (tensor.double() for tensor in tensors)
    x, *weights, p = tensors
    same = reference.fused_moe_ffn(x, ids, *weights, routing_weights=p, **options)
    exact = reference.fused_moe_ffn(wide[0], ids, *wide[1:], routing_weights=wide_p, **options)
    assert_as_accurate(y, same, exact, "y")


@pytest.mark.parametrize(
    "w, expected",
    [
        (torch.empty(E, 40, 24, dtype=torch.bfloat16), True),
        (torch.empty(E, 40, 24, dtype=torch.float16)[1:, 8:], True),
        (torch.empty(E, 40, 32, dtype=torch.float16)[:, :, 8:], True),
        (torch.empty(E, 40, 32, dtype=torch.float16)[:, :, 4:28], False),
        (torch.empty(E, 40, 24), False),
        (torch.empty(E, 40, 24, dtype=torch.float64), False),
        (torch.empty(E, 24, 40, dtype=torch.bfloat16).transpose(1, 2), False),
        (torch.empty(1, 40, 24, dtype=torch.bfloat16).expand(E, 40, 24), False),
        (torch.empty(E, 40, 23, dtype=torch.bfloat16), False),
        (torch.empty(E, 39, 24, dtype=torch.bfloat16), False),
        (torch.empty(E, 40, 0, dtype=torch.bfloat16), False),
        (torch.empty(E, 0, 24, dtype=torch.bfloat16), False),
    ],
)
def test_applies(stand_in, w, expected):
    assert expert_gemm.applies(torch.empty(5, w.shape[2]), w) is expected
    assert expert_gemm.applies(torch.empty(5, w.shape[2]), torch.empty(2, 8, 8, dtype=torch.float16), w) is expected


def test_what_the_kernel_cannot_take_runs_in_triton(stand_in):
    grouping = grouping_of(19)
    x, w = torch.randn(19, 24), torch.randn(E, 40, 24)
    got = expert_gemm.forward(x, w, None, grouping, True)
    torch.testing.assert_close(got, reference.expert_gemm(x, w, grouping, gather=True))
    tensors = ffn_arguments(19, 24, 40, torch.float16)
    seed = torch.tensor(3)
    x, *weights, _ = tensors
    for p, ids in ((0.5, ids_of(19)), (0.0, ids_of(19, top_k=2))):
        y, _ = cuda_ffn.forward(x, group_tokens(ids, E), *weights, None, "gelu", p, seed, False)
        same = reference.fused_moe_ffn(x, ids, *weights, hidden_dropout_p=p, dropout_seed=seed)
        torch.testing.assert_close(y, same, atol=2e-2, rtol=2e-2)
    norm = [torch.ones(E, 24, dtype=torch.float16), torch.zeros(E, 24, dtype=torch.float16)]
    y, *_ = cuda_add_norm.forward(
        x, grouping_of(19), *weights, *norm, None, 1e-5, "gelu", 0.0, 0.5, seed, False
    )  # fmt: skip
    assert y.shape == x.shape and stand_in.calls == []


@pytest.mark.skipif(why_not_built("expert_gemm") is not None, reason=str(why_not_built("expert_gemm")))
@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch fails only where there is no CUDA GPU")
def test_a_launch_that_fails_says_which_and_why(monkeypatch):
    monkeypatch.setattr(expert_gemm, "stream_of", lambda tensor: 0)
    monkeypatch.setattr(backend, "kernel_unavailable", lambda *_: None)
    x, w = torch.randn(19, 24, dtype=torch.float16), torch.randn(E, 40, 24, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"^expert_gemm\(rows=19, E=4, N=40, K=24\): .*(CUDA|driver)"):
        expert_gemm.forward(x, w, None, grouping_of(19), True)


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a GPU of sm_90"
)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("block_n, cluster", [(128, 1), (128, 2), (192, 1), (192, 2), (256, 1), (256, 2)])
@pytest.mark.parametrize(
    "tokens, columns, depth",
    [(1, 8, 8), (1000, 768, 768), (700, 200, 72), (9001, 456, 1016)],
    ids=["small-one", "large-even", "small-ragged", "large-ragged"],
)
@pytest.mark.parametrize("gather, scatter", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_on_hopper(block_n, cluster, tokens, columns, depth, gather, scatter, dtype):
    grouping = grouping_of(tokens, device="cuda")
    x, w = torch.randn(tokens, depth), torch.randn(E, columns, depth) * depth**-0.5
    x, w, bias = (tensor.to("cuda", dtype) for tensor in (x, w, torch.randn(E, columns)))
    y = torch.full((tokens, columns), float("nan"), dtype=dtype, device="cuda")
    pre = torch.full_like(y, float("nan"))
    expert_gemm.expert_gemm(
        x, w, y, grouping, bias=bias, pre=pre, gather=gather, scatter=scatter, activation="gelu",
        block_n=block_n, cluster=cluster,
    )  # fmt: skip
    same, exact = (
        reference.expert_gemm(x.to(wide), w.to(wide), grouping, bias.to(wide), gather=gather)
        for wide in (dtype, torch.float64)
    )
    if scatter:
        same, exact = (rows[grouping.assignment_to_row.long()] for rows in (same, exact))
    assert_as_accurate(pre, same, exact, "pre")
    same, exact = (torch.nn.functional.gelu(rows) for rows in (same, exact))
    assert_as_accurate(y, same, exact, "y")
    again = torch.empty_like(y)
    expert_gemm.expert_gemm(
        x, w, again, grouping, bias=bias, gather=gather, scatter=scatter, activation="gelu",
        block_n=block_n, cluster=cluster,
    )  # fmt: skip
    assert torch.equal(again, y)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    "block_n, cluster", [(0, 0), (128, 1), (192, 1), (128, 2), (192, 2), (128, 4), (192, 4), (128, 8)]
)
@pytest.mark.parametrize(
    "tokens, depth", [(1, 8), (1000, 768), (9001, 1016)], ids=["small-one", "large-even", "large-ragged"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_normalised_values_on_hopper(block_n, cluster, tokens, depth, dtype):
    for columns in {block_n * cluster or 768, 32 * max(1, (block_n * cluster or 1024) // 40)}:
        check_normalised(block_n, cluster, tokens, columns, depth, dtype)


def check_normalised(block_n, cluster, tokens, columns, depth, dtype):
    grouping = grouping_of(tokens, device="cuda")
    h, w = torch.randn(tokens, depth), torch.randn(E, columns, depth) * depth**-0.5
    bias, gain, shift = torch.randn(3, E, columns)
    tensors = (h, w, bias, torch.randn(tokens, columns), gain, shift)
    h, w, bias, x, gain, shift = (tensor.to("cuda", dtype) for tensor in tensors)
    rows_of_x, row = x[grouping.row_to_assignment.long()], grouping.assignment_to_row.long()
    routed = row < grouping.offsets[-1]
    expert = torch.bucketize(row, grouping.offsets[1:-1].long(), right=True)

    def expected(wide):
        ffn = reference.expert_gemm(h.to(wide), w.to(wide), grouping, bias.to(wide))[row]
        z = torch.nn.functional.layer_norm(x.to(wide) + ffn, (columns,), eps=1e-5)
        y = z * gain.to(wide)[expert] + shift.to(wide)[expert]
        return torch.where(routed[:, None], y, x.to(wide))

    for x_by_row in (False, True):
        y, again = torch.full_like(x, float("nan")), torch.empty_like(x)
        for out in (y, again):
            expert_gemm_norm.expert_gemm_norm(
                h, w, rows_of_x if x_by_row else x, out, grouping, gain, shift, 1e-5, bias=bias, x_by_row=x_by_row,
                block_n=block_n, cluster=cluster,
            )  # fmt: skip
        assert_as_accurate(y, expected(dtype), expected(torch.float64), f"y of {columns} columns")
        assert torch.equal(again, y)
