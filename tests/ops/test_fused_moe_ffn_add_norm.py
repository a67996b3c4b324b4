import pytest
import torch

from moebert_kernels import fused_moe_ffn, fused_moe_ffn_add_norm, group_tokens, reference
from moebert_kernels.activation import ACTIVATIONS, is_gated
from tests.helpers import assert_as_accurate
from tests.ops.cases import (
    HARDEST,
    ROUTINGS,
    ROUTINGS_AND_DTYPES,
    E,
    H,
    I,
    T,
    in_interpreter,
    names_of,
    parameters,
    run,
    slack,
    widest,
)

NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2", "dnorm_weight", "dnorm_bias", "drouting_weights")


def call(op):
    def wrapped(x, w1, b1, w2, b2, norm_weight, norm_bias, p, *, ids, **constants):
        return op(x, ids, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights=p, **constants)

    return wrapped


def compare(ids, dtype, p=None, activation="gelu", **constants):
    x, dy = torch.randn(len(ids), H).to(dtype), torch.randn(len(ids), H).to(dtype)
    gated = is_gated(activation)
    inputs = [x, *parameters(dtype, gated, norm=True), None if p is None else p.to(dtype)]
    constants |= {"ids": ids, "activation": activation}
    got = run(call(fused_moe_ffn_add_norm), inputs, dy, dtype, **constants)
    constants.pop("recompute", None)
    same = run(call(reference.fused_moe_ffn_add_norm), inputs, dy, dtype, **constants)
    exact = run(call(reference.fused_moe_ffn_add_norm), inputs, dy, torch.float64, **constants)
    for name, *tensors in zip(names_of(NAMES, inputs), got, same, exact, strict=True):
        assert_as_accurate(*tensors, name=name, factor=slack(dtype))


@pytest.mark.parametrize("routing, dtype", ROUTINGS_AND_DTYPES, ids=str)
def test_matches_reference(routing, dtype):
    ids = ROUTINGS[routing]()
    if dtype == torch.float32 or not in_interpreter():
        compare(ids, dtype)
    if dtype != torch.float32 or not in_interpreter():
        compare(ids, dtype, p=torch.rand(len(ids)))


def test_an_eps_of_zero_counts_no_row_past_the_end():
    """Which would have a deviation of 0."""
    compare(torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2]), torch.float32, eps=0.0)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(activation):
    compare(ROUTINGS[HARDEST](), torch.float32, activation=activation)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_that_of_the_reference_and_backward_replays_it(recompute):
    seed = torch.tensor(2**40 + 17)
    constants = {"dropout_p": 0.1, "hidden_dropout_p": 0.3, "dropout_seed": seed, "recompute": recompute}
    compare(ROUTINGS[HARDEST](), widest(), p=torch.rand(T), **constants)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("lowest", [-1, 0])
@pytest.mark.parametrize("count", [0, 5, T, 160, 600])  # every way through: nothing, a loop, one batch, pairs, many
def test_inference_equals_training(count, lowest, weighted):
    ids = torch.randint(lowest, E, (count,))
    ids[: count // 3] = 2
    x, weights = torch.randn(count, H), parameters(torch.float32, norm=True)
    p = torch.rand(count) if weighted else None
    with torch.no_grad():
        inference = fused_moe_ffn_add_norm(x, ids, *weights, routing_weights=p)
    x.requires_grad_()
    training = fused_moe_ffn_add_norm(x, ids, *weights, routing_weights=p)
    torch.testing.assert_close(inference, training, rtol=1e-5, atol=1e-5)


def test_skipped_tokens_pass_unchanged():
    x = torch.randn(3, H, requires_grad=True)
    ids = torch.tensor([-1, 0, E])
    y = fused_moe_ffn_add_norm(x, ids, *parameters(torch.float32, norm=True), routing_weights=torch.full((3,), 0.5))
    dy = torch.randn(3, H)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y[[0, 2]], x[[0, 2]]) and torch.equal(dx[[0, 2]], dy[[0, 2]])
    assert not torch.equal(y[1], x[1])


def test_autocast_adds_and_normalises_in_float32():
    x, weights = torch.randn(T, H, requires_grad=True), parameters(torch.float32, norm=True)
    weights[0].requires_grad_()
    ids = ROUTINGS["even"]()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = fused_moe_ffn_add_norm(x, ids, *weights)
        from_bf16 = fused_moe_ffn_add_norm(x.bfloat16(), ids, *weights)
    assert y.dtype == from_bf16.dtype == torch.float32
    exact = reference.fused_moe_ffn_add_norm(x, ids, *weights)
    assert 0 < (y - exact).abs().max() < 0.1
    dx, dw1 = torch.autograd.grad(y.sum(), [x, weights[0]])
    assert dx.dtype == dw1.dtype == torch.float32


def test_a_column_times_its_stride_passes_2_31(device):
    """x and dy by columns, 2^23 + 2^15 elements apart, in memory of which nobody touches the most."""
    hidden, apart, ids = 256, 2**23 + 2**15, torch.arange(4, device=device) % 2

    def by_columns():
        wide = torch.Tensor(torch.UntypedStorage(2 * hidden * apart, device=device)).view(torch.bfloat16)
        return wide.as_strided((4, hidden), (1, apart)).copy_(torch.randn(4, hidden))

    shapes = ((2, 8, hidden), (2, 8), (2, hidden, 8), (2, hidden), (2, hidden), (2, hidden))
    weights = [torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    x, dy, p = by_columns(), by_columns(), torch.rand(4, device=device, dtype=torch.bfloat16)
    for op, given in ((fused_moe_ffn_add_norm, weights), (fused_moe_ffn, weights[:4])):
        results = []
        for inputs in ((x, dy), (x.contiguous(), dy.contiguous())):
            leaves = [t.detach().requires_grad_() for t in (inputs[0], *given, p)]
            y = op(leaves[0], ids, *leaves[1:-1], routing_weights=leaves[-1])
            results.append([y, *torch.autograd.grad(y, leaves, inputs[1])])
        torch.testing.assert_close(*results)


def test_leading_dimensions_and_prebuilt_grouping():
    x, ids, weights = torch.randn(3, 5, H), torch.randint(-1, E, (3, 5)), parameters(torch.float32, norm=True)
    p = torch.rand(3, 5)
    y = fused_moe_ffn_add_norm(x, ids, *weights, routing_weights=p)
    assert y.shape == x.shape
    grouping = group_tokens(ids.view(-1), E)
    assert torch.equal(fused_moe_ffn_add_norm(x, grouping, *weights, routing_weights=p), y)
    assert torch.equal(fused_moe_ffn_add_norm(x, ids[..., None], *weights, routing_weights=p[..., None]), y)


def test_opcheck_and_compile():
    x, weights = torch.randn(T, H), parameters(torch.float32, norm=True)
    grouping = group_tokens(torch.randint(-1, E, (T,)), E)
    maps = (grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row)
    tensors = [t.requires_grad_() for t in (x, *weights, torch.rand(T, 1))]
    torch.library.opcheck(
        torch.ops.moebert_kernels.fused_moe_ffn_add_norm.default,
        (*tensors, *maps, torch.tensor(5), 1e-12, "gelu", 0.1, 0.2, False, True),
    )
    compiled = torch.compile(fused_moe_ffn_add_norm, fullgraph=True, dynamic=True)
    for count in (T, 11):
        x, ids = torch.randn(count, H, requires_grad=True), torch.randint(-1, E, (count,))
        y, y_eager = compiled(x, ids, *weights), fused_moe_ffn_add_norm(x, ids, *weights)
        assert torch.equal(y, y_eager)
        dy = torch.randn(count, H)
        for got, wanted in zip(torch.autograd.grad(y, [x, *weights], dy),
                               torch.autograd.grad(y_eager, [x, *weights], dy), strict=True):  # fmt: skip
            torch.testing.assert_close(got, wanted)


def test_rejects():
    x, ids, weights = torch.randn(T, H), torch.zeros(T, dtype=torch.int32), parameters(torch.float32, norm=True)
    with pytest.raises(ValueError, match=r"routing: expected top_k <= 1, got 2"):
        fused_moe_ffn_add_norm(x, ids[:, None].expand(T, 2), *weights)
    with pytest.raises(ValueError, match=rf"norm_weight: expected shape \(E={E}, H={H}\), got \({E}, {I}\)"):
        fused_moe_ffn_add_norm(x, ids, *weights[:4], torch.ones(E, I), weights[5])
    with pytest.raises(ValueError, match=r"norm_bias: expected dtype torch.float32 \(as x\), got torch.float64"):
        fused_moe_ffn_add_norm(x, ids, *weights[:5], weights[5].double())
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\), got 1.0"):
        fused_moe_ffn_add_norm(x, ids, *weights, dropout_p=1.0)
    with pytest.raises(ValueError, match=r"dropout_seed: expected a tensor, got int"):
        fused_moe_ffn_add_norm(x, ids, *weights, dropout_p=0.1, dropout_seed=3)
