"""Run all ops under a driver that launches nothing, and compare every launch by a key with the one that Triton makes.

Nothing is compiled: a kernel is known by what Triton would have compiled it for. Prints the launches, and how many of
them had a key that was known. `tests/kernels/test_launch.py` runs it without the interpreter.
"""

import itertools
from types import SimpleNamespace

import torch
import triton

from benchmarks.host_time import NullDriver
from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels import config
from moebert_kernels.kernels.launch import Launcher
from moebert_kernels.triton_backend import expert_gemm, fused_moe_ffn, fused_moe_ffn_add_norm, group_tokens, hash_route

counts = {"launches": 0, "by_key": 0}


def compiled(source, target, options):
    """What stands for a compiled kernel: equal if everything that it is compiled for is."""
    name = (source.fn.fn.__name__, str(source.signature), str(source.constants), str(source.attrs), str(options))
    kernel = SimpleNamespace(function=name, packed_metadata=0, seen=[])
    kernel.run = lambda *arguments: kernel.seen.append(arguments)
    kernel.launch_metadata = lambda *_: None
    return kernel


def compare(launcher, key, tensors, plan):
    """Launch by Triton; if the key is known, launch by it, too: the same kernel with the same arguments."""
    counts["launches"] += 1
    grid, arguments, constants = plan()
    kernel = launcher._kernel[grid](*arguments, **constants)
    expected = kernel.seen.pop()
    kernel.seen.clear()
    known = launcher._ready.get((0, key))
    launch(launcher, key, tensors, plan)
    if known is not None and kernel.seen:
        counts["by_key"] += 1
        got = kernel.seen.pop()
        addresses = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in expected[9:]]
        assert got[:6] == expected[:6] and list(got[9:]) == addresses, (key, expected, got)
    elif known is not None:
        aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
        assert not aligned, f"{launcher._kernel.fn.__name__}: the key is that of another kernel: {key}"


def strided(tensor, which):
    """The same shape with other strides."""
    if which == 0:
        return tensor
    if which == 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 8, dtype=tensor.dtype)[..., : tensor.shape[-1]]


def run(tokens, hidden, width, experts, top_k, dtype, activation, bias, weighted, drops, layout):
    rows = tokens * top_k
    inner = 2 * width if activation == "swiglu" else width

    def new(*shape, dtype=dtype):
        return strided(torch.zeros(shape, dtype=dtype), layout) if len(shape) > 1 else torch.zeros(shape, dtype=dtype)

    maps = [torch.zeros(size, dtype=torch.int32) for size in (experts + 1, rows, rows)]
    grouping = Grouping(*maps, top_k)
    x, dy = new(tokens, hidden), new(tokens, hidden)
    w1, w2 = new(experts, inner, hidden), new(experts, hidden, width)
    b1, b2 = (new(experts, inner), new(experts, hidden)) if bias else (None, None)
    p, seed = torch.zeros(tokens, top_k, dtype=dtype) if weighted else None, torch.zeros((), dtype=torch.int64)
    seed, dropout_p = (seed, 0.1) if drops else (None, 0.0)
    needs = (True, True, bias, True, bias, weighted)
    for save in (False, True):
        _, h_pre = fused_moe_ffn.forward(x, grouping, w1, b1, w2, b2, p, activation, dropout_p, seed, save)
    fused_moe_ffn.backward(dy, x, h_pre, grouping, w1, b1, w2, b2, p, activation, dropout_p, seed, needs)
    expert_gemm.backward(new(rows, inner), x, w1, grouping, True, (True, True, True))
    if top_k == 1:
        norm = (new(experts, hidden), new(experts, hidden))
        last = (p, 1e-12, activation, dropout_p, dropout_p, seed)
        _, h_pre, ffn = fused_moe_ffn_add_norm.forward(x, grouping, w1, b1, w2, b2, *norm, *last, True)
        fused_moe_ffn_add_norm.backward(
            dy, x, h_pre, ffn, grouping, w1, b1, w2, b2, *norm, *last, (*needs[:5], True, True, weighted)
        )  # fmt: skip
    ids = torch.zeros(2, rows, dtype=torch.int64)
    group_tokens.forward(ids, experts)
    hash_route.forward(ids[0], torch.zeros(3, hidden, dtype=torch.uint8), ids[1] if weighted else None)


triton.runtime.driver.set_active(NullDriver())
triton.compiler.compile = compiled
launch, Launcher.__call__ = Launcher.__call__, compare
config.Device.of = staticmethod(lambda _: config.Device(90, 132))
sizes = [
    (5, 24, 40, 3, 1),
    (7, 24, 40, 3, 2),
    (5, 64, 128, 3, 1),
    (5, 24, 40, 1, 1),
    (1, 24, 40, 3, 1),
    (300, 64, 128, 3, 1),
]
flags = list(itertools.product((torch.bfloat16, torch.float32), ("gelu", "swiglu"), (False, True), (False, True)))
for repeat, size, (dtype, activation, bias, drops) in itertools.product(range(2), sizes, flags):
    run(*size, dtype, activation, bias, repeat == 1 or bias, drops, (hash((size, bias, drops)) + repeat) % 3)
    run(*size, dtype, activation, bias, bias, drops, 0)
print(counts["launches"], counts["by_key"])
