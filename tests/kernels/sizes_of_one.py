"""Does every Triton kernel compile for sizes of 1? Triton makes such an argument a constant, which the interpreter
does not: an int has no `.to`.

    python -m tests.kernels.sizes_of_one    # for sm_90, as far as the assembler, without a GPU; exit status 1 if not

The ops' forward and backward run on tensors that nothing reads, and what they would launch is compiled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from benchmarks.launches import Launch, all_recorded
from moebert_kernels.grouping import Grouping
from moebert_kernels.kernels import expert_gemm as kernels
from moebert_kernels.kernels.config import Config
from moebert_kernels.kernels.fused_moe_ffn import hidden
from moebert_kernels.kernels.fused_moe_ffn_backward import hidden_backward
from moebert_kernels.triton_backend import (
    add_norm_in_order,
    expert_gemm,
    fused_moe_ffn,
    fused_moe_ffn_add_norm,
    group_tokens,
    hash_route,
    mpo_expert_weights,
)

ARCH = 90
# T, H, I, E, top_k: all of them 1, and each alone beside sizes that no tile divides
SIZES = ((1, 1, 1, 1, 1), (1, 5, 7, 3, 2), (3, 1, 7, 3, 1), (3, 5, 1, 3, 2), (3, 5, 7, 1, 2))


def run_ops(T: int, H: int, I: int, E: int, top_k: int, activation: str, dtype: torch.dtype) -> None:
    """Forward and backward of every op, with dropout, biases, routing weights and every gradient."""
    rows, width = T * top_k, 2 * I if activation == "swiglu" else I

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    x, p, seed, eps, every = new(T, H), new(T, top_k), torch.zeros((), dtype=torch.int64), 1e-12, (True,) * 8
    weights, norm = (new(E, width, H), new(E, width), new(E, H, I), new(E, H)), (new(E, H), new(E, H))
    ids, ints = torch.zeros(1, rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    group_tokens.forward(ids, E)
    hash_route.forward(ids[0], torch.zeros(1, H, dtype=torch.int64), ints)
    grouping = Grouping(torch.zeros(E + 1, dtype=torch.int32), ints, ints, top_k)
    expert_gemm.forward(x, weights[0], weights[1], grouping, True)
    expert_gemm.backward(new(rows, width), x, weights[0], grouping, True, every[:3])
    for dropout_p in (0.0, 0.1):
        y, h_pre = fused_moe_ffn.forward(x, grouping, *weights, p, activation, dropout_p, seed, True)
        fused_moe_ffn.backward(y, x, h_pre, grouping, *weights, p, activation, dropout_p, seed, every[:6])
        if top_k == 1:
            last = (p, eps, activation, dropout_p, dropout_p, seed)
            for in_order in (False, True) if T == H == I == E else (False,):
                y, h_pre, ffn = fused_moe_ffn_add_norm.forward(
                    x, grouping, *weights, *norm, *last, True, in_order=in_order
                )
                fused_moe_ffn_add_norm.backward(
                    y, x, h_pre, ffn, grouping, *weights, *norm, *last, every, in_order=in_order
                )
            options = (x, x, norm[0][0], norm[1][0], grouping, eps, dropout_p, seed)
            add_norm_in_order.backward(add_norm_in_order.forward(*options), *options)
    central, aux = new(1, H, I, T), [new(E, 1, T, top_k, 1), new(E, T, I, H, 1)]
    w = mpo_expert_weights.forward(central, aux, grouping.offsets, 1)
    mpo_expert_weights.backward(w, central, aux, grouping.offsets, 1, every[:3])


def run_descriptors(T: int, N: int, E: int) -> None:
    """The GEMMs that TMA reads for, whose rows of 16 bytes begin at multiples of 16 bytes."""
    tile, ints = Config(64, 64, 64, 4, 4), torch.zeros(T, dtype=torch.int32)
    grouping = Grouping(torch.zeros(E + 1, dtype=torch.int32), ints, ints)
    a, w, y, b = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((T, 8), (E, N, 8), (T, N), (E, N)))
    kernels.expert_gemm(a, w, y, grouping, bias=b, residual=y, skipped=y, config=tile, descriptors=True)
    hidden(a, w, b, y, y, grouping, "gelu", 0.0, None, tile, gather=False, descriptors=True)
    hidden_backward(
        a, w.mT, y, y, y, None, None, grouping, "gelu", 0.0, None, gather=False, config=tile, descriptors=True
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """What the ops launch, each key once."""
    seen = set()
    for ones in ((1, 1, 1), (1, 5, 3), (3, 1, 3), (3, 5, 1)):
        yield from all_recorded(f"T={ones[0]} N={ones[1]} E={ones[2]} descriptors", lambda o=ones: run_descriptors(*o))
    for sizes in SIZES:
        for activation, dtype in (("gelu", torch.bfloat16), ("swiglu", torch.float32)):
            name = f"T={sizes[0]} H={sizes[1]} I={sizes[2]} E={sizes[3]} top_k={sizes[4]} {activation} {dtype}"
            for launch in all_recorded(name, lambda s=sizes, a=activation, d=dtype: run_ops(*s, a, d)):
                key = replace(launch, name="")
                if key not in seen:
                    seen.add(key)
                    yield launch


def complaint(launch: Launch) -> str | None:
    """Why it does not compile."""
    try:
        launch.lower(ARCH)
    except Exception as error:  # of Triton's, or what Python raises in a kernel's source
        return f"{launch.kernel}, {launch.name}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return None


def main() -> int:
    found = list(launches())
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        wrong = [line for line in pool.map(complaint, found, chunksize=4) if line]
    for line in wrong:
        print(line)
    kernels = {launch.kernel for launch in found}
    print(f"{len(found)} launches of {len(kernels)} kernels compiled, {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
