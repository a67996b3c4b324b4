"""The LayerNorm that writes rows, alone and before the expert that reads them: against the same by token."""

import pytest
import torch

from moebert_kernels import Grouping, add_norm_in_order, fused_moe_ffn_add_norm, group_tokens, reference
from tests.helpers import assert_as_accurate
from tests.ops.cases import (
    HARDEST,
    ROUTINGS,
    E,
    H,
    T,
    parameters,
    run,
    slack,
    widest,
)

NAMES = ("y", "dresidual", "dadded", "dweight", "dbias", "dw1", "db1", "dw2", "db2", "dnorm_weight", "dnorm_bias", "dp")


def both(residual, added, weight, bias, *rest, ids, seeds=(None, None), p=0.0):
    """The rows and their expert in the order of the experts, as ops; y by token."""
    grouping = group_tokens(ids.to(residual.device), E)
    rows = add_norm_in_order(residual, added, weight, bias, grouping, dropout_p=p, dropout_seed=seeds[0])
    *experts, routing_weights = rest
    options = {"dropout_p": p, "hidden_dropout_p": p, "dropout_seed": seeds[1]}
    return fused_moe_ffn_add_norm(rows, grouping, *experts, routing_weights=routing_weights, in_order=True, **options)


def by_token(residual, added, weight, bias, *rest, ids, seeds=(None, None), p=0.0):
    grouping = reference.group_tokens(ids, E)
    rows = reference.add_norm_in_order(residual, added, weight, bias, grouping, dropout_p=p, dropout_seed=seeds[0])
    *experts, routing_weights = rest
    options = {"dropout_p": p, "hidden_dropout_p": p, "dropout_seed": seeds[1]}
    x = rows[grouping.assignment_to_row.long()]
    return reference.fused_moe_ffn_add_norm(x, ids, *experts, routing_weights=routing_weights, **options)


def norm_inputs(count, dtype):
    tensors = torch.randn(count, H), torch.randn(count, H), 1 + 0.1 * torch.randn(H), 0.1 * torch.randn(H)
    return [tensor.to(dtype) for tensor in tensors]


def compare(ids, dtype, **constants):
    experts = [*parameters(dtype, norm=True), torch.rand(len(ids)).to(dtype)]
    inputs, dy = [*norm_inputs(len(ids), dtype), *experts], torch.randn(len(ids), H).to(dtype)
    constants["ids"] = ids
    found = [run(both, inputs, dy, dtype, **constants), run(by_token, inputs, dy, dtype, **constants)]
    for name, *tensors in zip(NAMES, *found, run(by_token, inputs, dy, torch.float64, **constants), strict=True):
        assert_as_accurate(*tensors, name=name, factor=slack(dtype))


FEW = [("one_expert_empty", torch.float32), ("no_tokens", torch.float32), ("all_skipped", torch.float32)]


@pytest.mark.parametrize("routing, dtype", [*FEW, (HARDEST, torch.bfloat16), (HARDEST, torch.float64)], ids=str)
def test_the_rows_and_the_expert_that_reads_them(routing, dtype):
    compare(ROUTINGS[routing](), dtype)


def test_dropout_is_that_of_the_tokens_and_backward_replays_it():
    compare(ROUTINGS[HARDEST](), widest(), p=0.25, seeds=(torch.tensor(5), torch.tensor(2**40 + 17)))


@pytest.mark.parametrize("routing", [HARDEST, "no_tokens"])
def test_every_token_has_its_row(routing):
    ids = ROUTINGS[routing]()
    inputs, grouping = norm_inputs(len(ids), torch.float32), group_tokens(ids, E)
    rows = add_norm_in_order(*inputs, grouping, eps=1e-5)
    wanted = torch.nn.functional.layer_norm(inputs[0] + inputs[1], (H,), *inputs[2:], 1e-5)
    torch.testing.assert_close(rows, wanted[grouping.row_to_assignment.long()], rtol=1e-5, atol=1e-5)


def test_leading_dimensions_strides_and_frozen_tensors():
    _, _, weight, bias = norm_inputs(15, torch.float32)
    grouping = group_tokens(torch.randint(-1, E, (15,)), E)
    residual, added = torch.randn(3, 5, 2 * H)[..., ::2], torch.randn(3, H, 5).transpose(1, 2).requires_grad_()
    rows = add_norm_in_order(residual, added, weight, bias, grouping)
    flat = add_norm_in_order(residual.reshape(15, H), added.reshape(15, H), weight, bias, grouping)
    assert rows.shape == residual.shape and torch.equal(rows.view(15, H), flat)
    dy = torch.randn_like(rows)
    (got,), (wanted,) = (torch.autograd.grad(y, added, dy.view(y.shape)) for y in (rows, flat))
    assert torch.equal(got, wanted)


def test_autocast_adds_and_normalises_in_float32():
    residual, added, weight, bias = norm_inputs(T, torch.float32)
    leaves = [residual.requires_grad_(), added.bfloat16().requires_grad_()]
    grouping = group_tokens(ROUTINGS[HARDEST](), E)
    with torch.autocast(residual.device.type, dtype=torch.bfloat16):
        rows = add_norm_in_order(*leaves, weight, bias, grouping)
    exact = reference.add_norm_in_order(residual, leaves[1].float(), weight, bias, grouping)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, exact, rtol=1e-5, atol=1e-5)
    dresidual, dadded = torch.autograd.grad(rows, leaves, torch.randn_like(rows))
    assert (dresidual.dtype, dadded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(dadded, dresidual.bfloat16())


def test_opcheck_and_compile():
    grouping = group_tokens(torch.randint(-1, E, (T,)), E)
    maps = (grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row)
    leaves = [tensor.requires_grad_() for tensor in norm_inputs(T, torch.float32)]
    op = torch.ops.moebert_kernels.add_norm_in_order.default
    torch.library.opcheck(op, (*leaves, *maps, None, 1e-12, 0.0, True))
    compiled = torch.compile(add_norm_in_order, fullgraph=True, dynamic=True, backend="aot_eager")
    dy = torch.randn(T, H)
    y, eager = compiled(*leaves, grouping), add_norm_in_order(*leaves, grouping)
    assert torch.equal(y, eager)
    for got, wanted in zip(*(torch.autograd.grad(rows, leaves, dy) for rows in (y, eager)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_rejects():
    residual, added, weight, bias = norm_inputs(T, torch.float32)
    grouping = group_tokens(torch.zeros(T, dtype=torch.int64), E)
    of_two = Grouping(grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row, top_k=2)
    for arguments, message in (
        ((residual, added[1:], weight, bias, grouping), rf"added: expected shape \({T}, {H}\) \(as residual\), got"),
        ((residual, added, weight[1:], bias, grouping), rf"norm_weight: expected shape \(H={H}\), got \({H - 1},\)"),
        ((residual, added.double(), weight, bias, grouping), r"added: expected dtype torch.float32 \(as residual\)"),
        ((residual, added, weight, bias, torch.zeros(T)), r"grouping: expected a top-1 Grouping, got Tensor"),
        ((residual, added, weight, bias, of_two), r"grouping: expected a top-1 Grouping, got one of top_k=2"),
        (
            (residual[1:], added[1:], weight, bias, grouping),
            rf"grouping: expected a grouping of {T - 1} tokens, got one of {T} ",
        ),
        ((None, added, weight, bias, grouping), r"residual: expected a tensor, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            add_norm_in_order(*arguments)
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\), got 1"):
        add_norm_in_order(residual, added, weight, bias, grouping, dropout_p=1)
    with pytest.raises(ValueError, match=r"routing: expected with in_order the Grouping by which x is ordered"):
        fused_moe_ffn_add_norm(residual, torch.zeros(T).int(), *parameters(torch.float32, norm=True), in_order=True)
