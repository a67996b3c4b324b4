"""Call every recorded function under a driver that launches nothing, by its key and without, and compare the launches.

Nothing is compiled: a kernel is known by what Triton would have compiled it for. An address is known by the argument
that has it, or by when it first appears. Prints the calls, and how many of them repeated what an earlier one had noted.
`tests/kernels/test_launch.py` runs it without the interpreter.
"""

import itertools
from types import SimpleNamespace
from unittest import mock

import torch
import triton

from benchmarks.host_time import NullDriver
from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels import config, launch
from moebert_kernels.triton_backend import expert_gemm, fused_moe_ffn, fused_moe_ffn_add_norm, group_tokens, hash_route

counts = {"calls": 0, "repeated": 0}
log = []


def compiled(source, target, options):
    """What stands for a compiled kernel: equal if everything that it is compiled for is."""
    name = (source.fn.fn.__name__, str(source.signature), str(source.constants), str(source.attrs), str(options))
    return SimpleNamespace(
        function=name, packed_metadata=0, metadata=SimpleNamespace(global_scratch_size=0),
        run=lambda *arguments: log.append(arguments), launch_metadata=lambda *_: None,
    )  # fmt: skip


def launches(function, arguments):
    """What the call returns, and its launches with places instead of addresses."""
    log.clear()
    kept, new_empty = [], torch.Tensor.new_empty  # no address twice

    def keeping(*args, **kwargs):
        kept.append(new_empty(*args, **kwargs))
        return kept[-1]

    with mock.patch.object(torch.Tensor, "new_empty", keeping):
        outputs = function(*arguments)
    tensors, maps = [], []
    launch._flat(arguments, tensors, maps)
    places = {tensor.data_ptr(): i for i, tensor in enumerate([*tensors, *maps]) if tensor.numel()}

    def place(value):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        return places.setdefault(value, len(places)) if isinstance(value, int) and value > 2**32 else value

    found = [(*values[:6], *map(place, values[9:])) for values in log]
    returned = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return outputs, found, [t is not None and t.numel() and (place(t), t.shape, t.stride(), t.dtype) for t in returned]


def call(function, *arguments):
    """Both ways, with equal launches and outputs."""
    counts["calls"] += 1
    launch._local.recording = launch.Recording([])  # so that what it calls is not repeated, and its tensors live on
    _, *expected = launches(function.__wrapped__, arguments)
    launch._local.recording = None
    with mock.patch.object(launch._Plan, "run", autospec=True, side_effect=launch._Plan.run) as repeated:
        outputs, *got = launches(function, arguments)
    counts["repeated"] += repeated.call_count
    for one, other in zip(got[0], expected[0], strict=True):
        assert one == other, (function.__module__, one, other)
    assert got[1] == expected[1], function.__module__
    return outputs


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
        _, h_pre = call(fused_moe_ffn.forward, x, grouping, w1, b1, w2, b2, p, activation, dropout_p, seed, save)
    call(fused_moe_ffn.backward, dy, x, h_pre, grouping, w1, b1, w2, b2, p, activation, dropout_p, seed, needs)
    call(expert_gemm.forward, new(rows, inner), new(experts, width, inner), None, grouping, False)
    call(expert_gemm.backward, new(rows, inner), x, w1, grouping, True, (True, True, True))
    if top_k == 1:
        norm = (new(experts, hidden), new(experts, hidden))
        last = (p, 1e-12, activation, dropout_p, dropout_p, seed)
        _, h_pre, ffn = call(fused_moe_ffn_add_norm.forward, x, grouping, w1, b1, w2, b2, *norm, *last, True)
        call(
            fused_moe_ffn_add_norm.backward,
            dy, x, h_pre, ffn, grouping, w1, b1, w2, b2, *norm, *last, (*needs[:5], True, True, weighted),
        )  # fmt: skip
    ids = torch.zeros(2, rows, dtype=torch.int64)
    call(group_tokens.forward, ids, experts)
    call(hash_route.forward, ids[0], torch.zeros(3, hidden, dtype=torch.uint8), ids[1] if weighted else None)


triton.runtime.driver.set_active(NullDriver())
triton.compiler.compile = compiled
config.Device.of = staticmethod(lambda _: config.Device(90, 132))
sizes = [
    (5, 24, 40, 3, 1),
    (7, 24, 40, 3, 2),
    (5, 64, 128, 3, 1),
    (5, 24, 40, 1, 1),
    (1, 24, 40, 3, 1),
    (300, 64, 128, 3, 1),
    (1000, 64, 128, 3, 1),
]
flags = list(itertools.product((torch.bfloat16, torch.float32), ("gelu", "swiglu"), (False, True), (False, True)))
for repeat, size, (dtype, activation, bias, drops) in itertools.product(range(2), sizes, flags):
    run(*size, dtype, activation, bias, repeat == 1 or bias, drops, (hash((size, bias, drops)) + repeat) % 3)
    run(*size, dtype, activation, bias, bias, drops, 0)
print(counts["calls"], counts["repeated"])
