"""No length of a batch compiles anything that `warmup` did not."""

import importlib
import pkgutil
import random

import pytest
import torch

pytest.importorskip("triton")

from moebert_kernels import (
    backend,
    expert_gemm,
    fused_moe_ffn,
    fused_moe_ffn_add_norm,
    group_tokens,
    group_tokens_by_hash,
    kernels,
    warmup,
)
from moebert_kernels.kernels import launch
from tests.tiny_tiles import use_tiny_tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter is given")

E, H, I, V = 3, 24, 40, 50


def specialised(kernel, arguments, constants):
    """What Triton compiles a kernel for: types, constants, ones and multiples of 16."""
    key = []
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            anywhere = name in (kernel.kwargs["do_not_specialize_on_alignment"] or ())
            key.append((value.dtype, anywhere or value.data_ptr() % 16 == 0))
        elif isinstance(value, float) or name in (kernel.kwargs["do_not_specialize"] or ()):
            key.append(type(value))
        else:
            key.append(value if value in (None, 1) else value % 16 == 0)
    return kernel.fn.__name__, tuple(key), tuple(sorted(constants.items()))


@pytest.fixture
def compiled(monkeypatch):
    """The keys of all launches; nothing is computed."""
    keys, users = set(), launch_users()  # a module that is imported later would keep the stand-in
    monkeypatch.setattr(
        launch, "launch",
        lambda kernel, grid, arguments, constants: keys.add(specialised(kernel, arguments, constants)),
    )  # fmt: skip
    for module in users:
        monkeypatch.setattr(module, "launch", launch.launch)
    launch.forget()
    yield keys
    launch.forget()


def launch_users():
    """The modules that launch kernels."""
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    return [module for module in modules if module is not launch and hasattr(module, "launch")]


WEIGHTS = ((E, I, H), (E, I), (E, H, I), (E, H))


def step(T, dtype=torch.float16):
    """Forward and backward of the ops with T tokens, with all that a kernel can be told."""
    x, *weights = [torch.zeros(shape, dtype=dtype).requires_grad_() for shape in ((T, H), *WEIGHTS)]
    norm = [torch.zeros(E, H, dtype=dtype).requires_grad_() for _ in range(2)]
    p = torch.zeros(T, 2, dtype=dtype).requires_grad_()
    maps = group_tokens_by_hash(torch.zeros(T, dtype=torch.int64), torch.zeros(4, V, dtype=torch.uint8), E,
                                torch.ones(T, dtype=torch.int64))  # fmt: skip
    assert len(maps) == 4
    single, pair = (trusted_grouping(T, top_k) for top_k in (1, 2))
    group_tokens(torch.zeros(T, 2, dtype=torch.int64), E)
    y = fused_moe_ffn_add_norm(x, single, *weights, *norm, routing_weights=p[:, :1], dropout_p=0.1)
    z = fused_moe_ffn(y, pair, *weights, routing_weights=p, hidden_dropout_p=0.1)
    rows = expert_gemm(z, weights[0], single, weights[1], gather=True)
    torch.autograd.grad(rows, [x, p, *weights, *norm], torch.zeros_like(rows))


def trusted_grouping(T, top_k):
    """Any routing: no kernel that could use it runs."""
    from moebert_kernels.grouping import Grouping
    from moebert_kernels.ops._checks import trusted

    rows = torch.zeros(T * top_k, dtype=torch.int32)
    return trusted(Grouping(torch.zeros(E + 1, dtype=torch.int32), rows, torch.zeros_like(rows), top_k))


def test_the_length_of_a_batch_is_no_constant(compiled, monkeypatch):
    use_tiny_tiles(monkeypatch)
    with backend.use_backend("triton", strict=True):
        step(17)
        first = set(compiled)
        assert len({name for name, *_ in first}) >= 12
        for length in (1, 2, 16, 31, 64, 1024):
            step(length)
    assert compiled == first, {key for key in compiled if key not in first}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_is_compiled_after_warmup(dtype, compiled):
    low, high = 5, 1500
    with backend.use_backend("triton", strict=True):
        ran = warmup(lambda T: step(T, dtype), (low, high))
        assert len(ran) < 25 and min(ran) == low and max(ran) == high
        warm = set(compiled)
        for length in (*random.sample(range(low, 1025), 6), *random.sample(range(1024, high, 64), 3)):
            step(length, dtype)
    assert compiled == warm, {key for key in compiled if key not in warm}
    assert len({key for key in warm if key[0] == "_hidden_kernel"}) > 1  # or the lengths would not matter


def test_where_nothing_is_compiled_few_lengths_run():
    ran = []
    assert warmup(ran.append, (3, 20)) == ran == [20, 16, 8, 4, 3]


@pytest.mark.parametrize("tokens", [(0, 4), (5, 4), (1.0, 2), (True, 2), 7, (1, 2, 3)])
def test_a_range_that_is_none(tokens):
    with pytest.raises(ValueError, match="tokens: expected the least and the most, integers of at least 1, got"):
        warmup(print, tokens)
