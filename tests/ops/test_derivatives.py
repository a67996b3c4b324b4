"""What may be asked of an op besides its value: first derivatives in reverse mode, and nothing else in silence."""

import sys
from functools import partial
from itertools import islice

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moebert_kernels import fused_moe_ffn, group_tokens, group_tokens_by_hash, hash_route
from tests.ops.every_op import NAMES, E, T, op, require_grad


def losses(name):
    """The op as a function of its first tensor, one of its second, and losses that are linear and not."""
    function, (first, second, *others) = op(name)
    yield lambda a: function(a, second, *others).sum(), first
    yield lambda a: function(a, second, *others).square().sum(), first
    yield lambda a: function(first, a, *others).sum(), second


def by_autograd(loss, tensor, **options):
    (leaf,) = require_grad([tensor])
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, **options)
    return gradient, leaf


@pytest.mark.parametrize("form", ["eager", "opaque"])
@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_raises(name, form, monkeypatch):
    if form == "opaque":
        monkeypatch.setattr(sys.modules[f"moebert_kernels.ops.{name}"], "opaque", lambda x: True)
    for loss, tensor in losses(name):
        first, leaf = by_autograd(loss, tensor, create_graph=True)
        torch.testing.assert_close(first.detach(), by_autograd(loss, tensor)[0])
        with pytest.raises(ValueError, match=f"^{name}: expected a first derivative, got a second one"):
            torch.autograd.grad(first.sum(), leaf)


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_gives_first_derivatives(name):
    for loss, tensor in losses(name):
        gradient, _ = by_autograd(loss, tensor)
        torch.testing.assert_close(grad(loss)(tensor), gradient)
        value, pull = vjp(loss, tensor)
        assert value == loss(tensor)
        torch.testing.assert_close(pull(torch.tensor(3.0))[0], 3 * gradient)


@pytest.mark.parametrize("name", NAMES)
def test_no_graph_of_a_transform(name):
    """It would hold the example's routing."""
    loss, tensor = next(iter(losses(name)))
    with pytest.raises(ValueError, match=f"^{name}: expected no transform of torch.func while make_fx"):
        make_fx(grad(loss))(tensor)


def refused(loss, tensor):
    """What asks for more than a first derivative in reverse mode, by the message that it must meet."""
    several = torch.stack([tensor, tensor])
    return {
        "expected a first derivative, got a second one": (
            lambda: grad(lambda a: grad(loss)(a).sum())(tensor),
            lambda: jacrev(grad(loss))(tensor),
            lambda: torch.autograd.functional.hvp(loss, tensor, tensor),
            lambda: torch.autograd.functional.jvp(loss, tensor, tensor),
        ),
        "expected reverse-mode differentiation, got forward mode": (
            lambda: jvp(loss, (tensor,), (tensor,)),
            lambda: jacfwd(loss)(tensor),
            lambda: hessian(loss)(tensor),
        ),
        r"expected no torch\.vmap": (
            lambda: jacrev(lambda a: loss(a).expand(2))(tensor),
            lambda: vmap(loss)(several),
            lambda: vmap(grad(loss))(several),
        ),
    }


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_gives_nothing_else(name, implementation):
    for loss, tensor in islice(losses(name), 3 if implementation == "torch" else 1):
        for message, requests in refused(loss, tensor).items():
            for request in requests:
                with pytest.raises(ValueError, match=f"^{name}: {message}"):
                    request()


@pytest.mark.parametrize("form", ["eager", "opaque"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tangent_is_never_dropped(name, form, monkeypatch):
    if form == "opaque":
        monkeypatch.setattr(sys.modules[f"moebert_kernels.ops.{name}"], "opaque", lambda x: True)
    for loss, tensor in losses(name):
        with forward_ad.dual_level():
            loss(tensor)  # without a tangent all is well
            with pytest.raises(ValueError, match=f"^{name}: expected reverse-mode differentiation, got forward mode"):
                loss(forward_ad.make_dual(tensor, tensor))


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_under_autocast(name):
    def in_float(function, *arguments):
        with torch.autocast(torch.empty(0).device.type, dtype=torch.bfloat16):
            return function(*arguments).float().square().sum()

    function, tensors = op(name)
    wanted = torch.autograd.grad(in_float(function, *(leaves := require_grad(tensors))), leaves)
    got = grad(partial(in_float, function), argnums=tuple(range(len(tensors))))(*tensors)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_routing_inside_torch_func():
    """Ids that a gate computed inside a transform, and functional_call of a module that trains one."""

    class Layer(torch.nn.Module):
        def __init__(self, gate, *weights):
            super().__init__()
            self.gate = torch.nn.Parameter(gate)
            self.experts = torch.nn.ParameterList(weights)

        def forward(self, x):
            p, ids = (x @ self.gate).softmax(-1).topk(2)
            return fused_moe_ffn(x, group_tokens(ids, E), *self.experts, routing_weights=p)

    _, (x, *weights) = op("fused_moe_ffn")
    layer = Layer(torch.randn(x.shape[1], E), *weights)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    got = grad(lambda values: functional_call(layer, values, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_ids():
    tables, ids = torch.randint(0, E, (2, 20)), torch.randint(-1, 22, (3, T))
    got = vmap(lambda i: hash_route(i, tables[0]))(ids)
    assert torch.equal(got, torch.stack([hash_route(row, tables[0]) for row in ids]))
    got = vmap(lambda i: group_tokens_by_hash(i, tables, E)[1].row_to_assignment)(ids)
    assert torch.equal(got, torch.stack([group_tokens_by_hash(row, tables, E)[1].row_to_assignment for row in ids]))


def test_no_op_can_be_traced_by_torch_jit():
    ids, table = torch.arange(T) % E, torch.arange(20) % E
    calls = {name: op(name) for name in NAMES} | {
        "hash_route": (lambda ids: hash_route(ids, table), (ids,)),
        "group_tokens": (lambda ids: group_tokens(ids, E).row_to_assignment, (ids,)),
        "group_tokens_by_hash": (lambda ids: group_tokens_by_hash(ids, table[None], E)[0].row_to_assignment, (ids,)),
    }
    for name, (function, tensors) in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a call that torch.jit.trace does not record"):
            torch.jit.trace(function, tensors)
