import pytest
import torch
import torch.nn.functional as F

from moebert_kernels import expert_gemm, fused_moe_ffn, group_tokens, reference
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

NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2", "drouting_weights")


def call(op):
    def wrapped(x, w1, b1, w2, b2, p, *, ids, **constants):
        return op(x, ids, w1, b1, w2, b2, routing_weights=p, **constants)

    return wrapped


def compare(ids, dtype, p=None, activation="gelu", bias=True, **constants):
    x, dy = torch.randn(len(ids), H).to(dtype), torch.randn(len(ids), H).to(dtype)
    gated = is_gated(activation)
    inputs = [x, *parameters(dtype, gated, bias), None if p is None else p.to(dtype)]
    constants |= {"ids": ids, "activation": activation}
    got = run(call(fused_moe_ffn), inputs, dy, dtype, **constants)
    constants.pop("recompute", None)
    same = run(call(reference.fused_moe_ffn), inputs, dy, dtype, **constants)
    exact = run(call(reference.fused_moe_ffn), inputs, dy, torch.float64, **constants)
    for name, *tensors in zip(names_of(NAMES, inputs), got, same, exact, strict=True):
        assert_as_accurate(*tensors, name=name, factor=slack(dtype))


@pytest.mark.parametrize("routing, dtype", ROUTINGS_AND_DTYPES, ids=str)
def test_matches_reference(routing, dtype):
    ids = ROUTINGS[routing]()
    if dtype == torch.float32 or not in_interpreter():
        compare(ids, dtype)
    if dtype != torch.float32 or not in_interpreter():
        compare(ids, dtype, p=torch.rand(len(ids)))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k(top_k):
    ids = torch.randint(-1, E + 1, (T, top_k))
    compare(ids, torch.float32, p=torch.rand(T, top_k))
    compare(ids, torch.float32)


@pytest.mark.parametrize(
    "activation, bias",
    [(activation, True) for activation in ACTIVATIONS[1:]] + [("relu", False), ("swiglu", False)],
)
def test_activations(activation, bias):
    compare(ROUTINGS[HARDEST](), torch.float32, activation=activation, bias=bias)


@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_dropout(recompute):
    ids = torch.randint(-1, E, (T, 2))
    seed = torch.tensor(99)
    compare(ids, widest(), p=torch.rand(T, 2), hidden_dropout_p=0.3, dropout_seed=seed, recompute=recompute)


@pytest.mark.parametrize("lowest, top_k, bias", [(-1, 1, True), (-1, 2, False), (0, 1, False), (0, 2, True)])
@pytest.mark.parametrize("count", [0, 5, T, 160, 600])  # every way through: nothing, a loop, one batch, pairs, many
def test_inference_equals_training(count, lowest, top_k, bias):
    ids = torch.randint(lowest, E, (count, top_k))
    ids[: count // 3] = 2
    x, weights, p = torch.randn(count, H), parameters(torch.float32, bias=bias), torch.rand(count, top_k)
    with torch.no_grad():
        inference = fused_moe_ffn(x, ids, *weights, routing_weights=p)
    training = fused_moe_ffn(x.requires_grad_(), ids, *weights, routing_weights=p)
    torch.testing.assert_close(inference, training, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_routing_weights_in_float32(autocast):
    """Of 16-bit layers: neither they nor their gradient are rounded."""
    x, dy, ids, p = torch.randn(T, H), torch.randn(T, H), torch.randint(-1, E + 1, (T, 2)), torch.rand(T, 2)
    inputs = [t if autocast else t.bfloat16() for t in (x, *parameters(torch.float32))]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = fused_moe_ffn(inputs[0], ids, *inputs[1:], routing_weights=p.requires_grad_())
    (dp,) = torch.autograd.grad(y, p, dy.bfloat16())
    assert y.dtype == torch.bfloat16 and dp.dtype == torch.float32 and not torch.equal(dp, dp.bfloat16().float())
    same = run(call(reference.fused_moe_ffn), [*inputs, p], dy.bfloat16(), torch.bfloat16, ids=ids)
    exact = run(call(reference.fused_moe_ffn), [*inputs, p], dy.bfloat16(), torch.float64, ids=ids)
    assert_as_accurate(y, same[0], exact[0], name="y", factor=slack(torch.bfloat16))
    assert_as_accurate(dp.bfloat16(), same[-1], exact[-1], name="dp", factor=slack(torch.bfloat16))


def test_equals_the_composition_of_two_expert_gemms():
    x, ids, (w1, b1, w2, b2) = torch.randn(T, H), torch.randint(-1, E, (T,)), parameters(torch.float32)
    grouping = group_tokens(ids, E)
    h = F.gelu(expert_gemm(x, w1, grouping, b1, gather=True))
    rows = expert_gemm(h, w2, grouping, b2)
    y = rows[grouping.assignment_to_row.long()]
    torch.testing.assert_close(fused_moe_ffn(x, ids, w1, b1, w2, b2), y, rtol=1e-5, atol=1e-5)


def test_bitwise_repeatable_and_saved_tensors_stay():
    x, weights = torch.randn(T, H, requires_grad=True), [t.requires_grad_() for t in parameters(torch.float32)]
    ids = torch.randint(-1, E, (T, 2))
    p = torch.rand(T, 2)
    y = fused_moe_ffn(x, ids, *weights, routing_weights=p)
    assert torch.equal(y, fused_moe_ffn(x, ids, *weights, routing_weights=p))
    first = torch.autograd.grad(y.sum(), [x, *weights], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, *weights])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_seed_decides_and_none_draws_from_torch():
    x, weights, ids = torch.randn(T, H), parameters(torch.float32), torch.zeros(T, dtype=torch.int64)

    def once(seed=None):
        return fused_moe_ffn(x, ids, *weights, hidden_dropout_p=0.5, dropout_seed=seed)

    assert torch.equal(once(torch.tensor(3)), once(torch.tensor(3)))
    assert not torch.equal(once(torch.tensor(3)), once(torch.tensor(4)))
    torch.manual_seed(7)
    first, second = once(), once()
    torch.manual_seed(7)
    assert torch.equal(once(), first) and not torch.equal(first, second)


def test_frozen_weights_and_frozen_input():
    x, weights, ids = torch.randn(T, H), parameters(torch.float32), torch.zeros(T, dtype=torch.int64)
    weights[2].requires_grad_()
    fused_moe_ffn(x, ids, *weights).sum().backward()
    assert weights[2].grad is not None and weights[0].grad is None and x.grad is None


def test_opcheck_compile_and_export():
    x, weights = torch.randn(T, H), parameters(torch.float32)
    grouping = group_tokens(torch.randint(-1, E, (T, 2)), E)
    maps = (grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row)
    tensors = [t.requires_grad_() for t in (x, *weights, torch.rand(T, 2))]
    torch.library.opcheck(
        torch.ops.moebert_kernels.fused_moe_ffn.default, (*tensors, *maps, torch.tensor(5), 2, "gelu", 0.1, True)
    )

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = (torch.nn.Parameter(weights[i].detach()) for i in (0, 2))

        def forward(self, x, ids):
            return fused_moe_ffn(x, ids, self.w1, None, self.w2, None)

    layer = Layer()
    x, ids = torch.randn(T, H), torch.randint(-1, E, (T,))
    tokens = torch.export.Dim("tokens")
    program = torch.export.export(layer, (x, ids), dynamic_shapes=({0: tokens}, {0: tokens}))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for count in (T, 5):
        x, ids = torch.randn(count, H), torch.randint(-1, E, (count,))
        torch.testing.assert_close(program.module()(x, ids), layer(x, ids))
        torch.testing.assert_close(compiled(x, ids), layer(x, ids))


def test_rejects():
    x, ids, (w1, b1, w2, b2) = torch.randn(T, H), torch.zeros(T, dtype=torch.int32), parameters(torch.float32)
    for message, arguments in {
        rf"w1: expected shape \(E={E}, I={I}, H={H}\), got \({E}, {I}, {H - 1}\)": (x, ids, w1[..., 1:], b1, w2, b2),
        rf"w2: expected shape \(E, H, I\), got \({I}, {H}\)": (x, ids, w1, b1, w1[0], b2),
        rf"b1: expected shape \(E={E}, I={I}\), got \({I},\)": (x, ids, w1, b1[0], w2, b2),
        rf"b2: expected shape \(E={E}, H={H}\), got \({H},\)": (x, ids, w1, b1, w2, b2[0]),
        r"w1: expected dtype torch.float32 \(as x\), got torch.float16": (x, ids, w1.half(), b1, w2, b2),
        r"x: expected dtype .*, got torch.int64": (x.long(), ids, w1, b1, w2, b2),
        r"x: expected a tensor, got list": ([1.0], ids, w1, b1, w2, b2),
        rf"routing: expected expert ids of shape \({T},\) or \({T}, top_k\), got \({T - 1},\)":
            (x, ids[1:], w1, b1, w2, b2),
        r"routing: expected an integer dtype, got torch.float32": (x, ids.float(), w1, b1, w2, b2),
        rf"routing: expected a grouping over E={E} experts, got 3": (x, group_tokens(ids, 3), w1, b1, w2, b2),
        rf"routing: expected a grouping of {T} tokens, got one of 5 with top_k=1":
            (x, group_tokens(ids[:5], E), w1, b1, w2, b2),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fused_moe_ffn(*arguments)
    with pytest.raises(ValueError, match=r"activation: expected one of gelu, .*, got 'gelu_new'"):
        fused_moe_ffn(x, ids, w1, b1, w2, b2, activation="gelu_new")
    with pytest.raises(ValueError, match=rf"routing_weights: expected shape \({T}, 1\), got \(2,\)"):
        fused_moe_ffn(x, ids, w1, b1, w2, b2, routing_weights=torch.ones(2))
    with pytest.raises(ValueError, match=r"routing_weights: expected dtype torch.float32 \(as x\) or .*, got torch.f"):
        fused_moe_ffn(x, ids, w1, b1, w2, b2, routing_weights=torch.ones(T).double())
    with pytest.raises(ValueError, match=r"hidden_dropout_p: expected a probability in \[0, 1\), got -0.1"):
        fused_moe_ffn(x, ids, w1, b1, w2, b2, hidden_dropout_p=-0.1)
    with pytest.raises(ValueError, match=r"w1: expected shape \(E=4, 2I=72, H=40\), got \(4, 36, 40\)"):
        fused_moe_ffn(x, ids, w1, b1, w2, b2, activation="swiglu")
