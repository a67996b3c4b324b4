"""Casts under autocast: of the weights as they are, whoever changed them, and with gradients in every setting."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.ops.every_op import NAMES, H, T, op, require_grad


def autocast(dtype=torch.bfloat16, **options):
    return torch.autocast(torch.empty(0).device.type, dtype=dtype, **options)


def fused_step(weights):
    for w in weights:
        w.grad = torch.ones_like(w)
    torch.optim.SGD(weights, lr=0.5, fused=True).step()


def write_to_data(weights):
    for w in weights:
        w.data.mul_(-0.5)


def write_through_a_view(weights):
    for w in weights:
        torch.utils.dlpack.from_dlpack(w.detach()).mul_(-0.5)


def replace_data(weights):
    for w in weights:
        w.data = -0.5 * w.data


@pytest.mark.parametrize("change", [fused_step, write_to_data, write_through_a_view, replace_data])
@pytest.mark.parametrize("name", NAMES)
def test_a_cast_is_never_older_than_its_weight(name, change):
    function, tensors = op(name)
    tensors = require_grad(tensors)
    with autocast():
        kept = function(*tensors)  # its graph holds the casts
        change(tensors)
        inside = function(*tensors)
    with autocast():
        outside = function(*tensors)
        wanted = function(*require_grad(tensors))
    assert torch.equal(inside, wanted) and torch.equal(outside, wanted)
    assert not torch.allclose(kept, wanted, rtol=0.1)


def gradients(y, leaves):
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_every_setting(name):
    function, tensors = op(name)
    leaves = require_grad(tensors)
    with autocast():
        wanted = gradients(function(*leaves), leaves)
    assert wanted[0].dtype == (torch.float32 if "norm" in name else torch.bfloat16)
    assert all(grad.dtype == torch.float32 and grad.any() for grad in wanted[1:])

    def nested():
        with autocast(enabled=False), autocast():
            return function(*leaves)

    def uncached():
        with autocast(cache_enabled=False):
            return function(*leaves)

    def after_inference():
        with autocast(), torch.no_grad():
            function(*leaves)
        with autocast():
            with torch.no_grad():
                function(*leaves)
            return function(*leaves)

    def of_weights_that_are_no_leaves():
        with autocast():
            return function(*(2 * (leaf / 2) for leaf in leaves))

    def recomputed(reentrant):
        with autocast():
            return checkpoint(function, *leaves, use_reentrant=reentrant)

    settings = (nested, uncached, after_inference, of_weights_that_are_no_leaves)
    for setting in (*settings, lambda: recomputed(True), lambda: recomputed(False)):
        y = setting()
        y.float().square().sum().backward()
        for got, exact in zip([y, *(leaf.grad for leaf in leaves)], wanted, strict=True):
            assert torch.equal(got, exact)
        for leaf in leaves:
            leaf.grad = None


def test_disabled_inside_needs_one_dtype():
    function, (x, *weights) = op("fused_moe_ffn")
    with autocast(), autocast(enabled=False):
        assert function(x, *weights).dtype == torch.float32
        with pytest.raises(ValueError, match=r"w1: expected dtype torch.bfloat16 \(as x\), got torch.float32"):
            function(x.bfloat16(), *weights)


def test_a_weight_used_twice_gets_both_gradients():
    function, (x, *weights) = op("fused_moe_ffn")
    leaves = require_grad(weights)
    with autocast():
        y = function(function(x, *leaves), *leaves)
        once = function(x, *leaves).detach()
    cast = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    twice = function(function(x.bfloat16(), *cast), *cast)
    assert y.dtype == torch.bfloat16 and y.shape == (T, H) and torch.equal(y, twice)
    assert torch.equal(once, function(x.bfloat16(), *cast))
    for got, wanted in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(twice.sum(), cast), strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=2e-2, atol=2e-2)  # two casts' gradients add in float32


def test_float64_stays(implementation):
    if implementation != "torch":
        pytest.skip("only plain torch computes float64")
    function, tensors = op("fused_moe_ffn")
    with autocast():
        assert function(*(t.double() for t in tensors)).dtype == torch.float64
