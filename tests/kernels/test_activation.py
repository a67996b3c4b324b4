"""Activations in 16 bits, by approximations: right for every number that bfloat16 and float16 have."""

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from moebert_kernels.activation import UNGATED  # noqa: E402
from moebert_kernels.kernels.activation import activate, activate_grad  # noqa: E402

EXACT = {
    "gelu": lambda x: x * torch.special.erfc(-x * 0.5**0.5) / 2,  # torch's cancels below -5
    "gelu_tanh": lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),  # so does its 1 + tanh
    "relu": F.relu, "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(), "identity": lambda x: x,
}  # fmt: skip


@triton.jit
def _activate_kernel(X, Y, DY, NAME: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(Y + at, activate(x, NAME, HALF))
    tl.store(DY + at, activate_grad(x, NAME, HALF))


def computed(x, name, half=True):
    """act(x) and act'(x) in float32."""
    y, dy = torch.empty_like(x), torch.empty_like(x)
    _activate_kernel[(x.numel() // 4096,)](x, y, dy, NAME=name, HALF=half, BLOCK=4096)
    return y, dy


def exact(x, name):
    x = x.double().requires_grad_()
    y = EXACT[name](x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def all_numbers(dtype, device):
    """All that a 16-bit dtype has, in float32."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device, torch.float32)


def every(dtype, device):
    """The finite numbers of a 16-bit dtype, in float32; zeros in the places of the others."""
    numbers = all_numbers(dtype, device)
    return torch.where(numbers.isfinite(), numbers, 0.0)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of numpy in the interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", UNGATED)
def test_every_finite_number(name, dtype, device):
    """At most half a unit in the last place of the 16 bits, and a tenth of one more."""
    x = every(dtype, device)
    limits = torch.finfo(dtype)
    smallest = max(limits.smallest_normal, 1e-32)  # tails that become zero before
    for got, wanted, least in zip(computed(x, name), exact(x, name), (smallest, 0.25), strict=True):
        # a derivative crosses zero: there the parts that it is the sum of decide
        fits = wanted.abs() <= limits.max
        error = (got.to(dtype).double() - wanted).abs()
        assert (error <= 0.6 * limits.eps * wanted.abs().clamp(min=least))[fits].all()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_gelu_is_as_right_relative_to_itself(device):
    """Also where it is small: up to -13, beyond which it is no normal float32."""
    x = every(torch.bfloat16, device)
    (y, dy), (exact_y, exact_dy) = computed(x, "gelu"), exact(x, "gelu")
    inside = (x >= -13) & (x.abs() > 1e-30)
    relative = ((y.double() - exact_y) / exact_y)[inside]
    assert relative.abs().max() < 4e-5
    assert (y.double() - exact_y).abs()[x < 13].max() < 6e-6
    assert (dy.double() - exact_dy).abs().max() < 2e-5
    assert torch.equal(y[x > 13], x[x > 13]) and y[x < -14].abs().max() < 1e-38


# act and act' at infinity, and at minus infinity
LIMITS = {name: ((torch.inf, 1.0), (0.0, 0.0)) for name in UNGATED}
LIMITS |= {"relu2": ((torch.inf, torch.inf), (0.0, 0.0)), "identity": ((torch.inf, 1.0), (-torch.inf, 1.0))}


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("name", UNGATED)
def test_infinities_and_nan(name, half, dtype, device):
    """Their limits at the infinities; NaN stays NaN, and nothing else becomes it."""
    x = all_numbers(dtype, device)
    y, dy = computed(x, name, half)
    nan = x.isnan()
    assert torch.equal(y.isnan(), nan) and nan.any() and not dy[~nan].isnan().any()
    for at, (limit, slope) in zip((torch.inf, -torch.inf), LIMITS[name], strict=True):
        assert (x == at).any() and (y[x == at] == limit).all() and (dy[x == at] == slope).all()
    if name in ("gelu", "gelu_tanh", "silu"):
        assert dy[nan].isnan().all() and y[x.isfinite()].isfinite().all() and dy[x.isfinite()].isfinite().all()


def test_float32_keeps_erf(device):
    x = torch.linspace(-8, 8, 4096, device=device)
    (y, _), (exact_y, _) = computed(x, "gelu", half=False), exact(x, "gelu")
    assert (y.double() - exact_y).abs().max() < 5e-7
