"""Every op with its kernels against float64, forward and backward, on few hard shapes; needs no pytest.

python -m benchmarks.gpu_checks BACKEND    # the small ones, for compute-sanitizer
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import moebert_kernels
from benchmarks import gate
from benchmarks.inputs import Draws
from benchmarks.layers import runner
from benchmarks.measuring import Outputs, Provider, Target
from moebert_kernels import Grouping, backend, reference

ROUTING = ("hash_route", "group_tokens", "group_tokens_by_hash")
ONES, ODD, LARGE = (1, 1, 1, 1), (37, 40, 36, 4), (1000, 768, 768, 4)  # T, H, I, E
# Few, since each is compiled: all sizes 1, sizes that no tile divides, and a layer's own; T past a CTA of routing.
HALF = (("gelu", ONES), ("swiglu", ONES), ("gelu", ODD), ("swiglu", ODD), ("top_2", ODD), ("gelu", LARGE))
FORMS = {torch.bfloat16: HALF, torch.float16: (("gelu", ODD),), torch.float32: (("gelu", ODD),)}
FORMS_OF = {"fused_moe_ffn": ("gelu", "swiglu", "top_2"), "fused_moe_ffn_add_norm": ("gelu", "swiglu")}
SMALL = {torch.bfloat16: HALF[1:5]}
LOOKED_UP = ((1, 1, 1), (2500, 300, 4))  # T, V, E
FACTORS = ((2, 3, 4), (3, 2, 4))


def check(op: str, name: str, target: Target, small: bool = False) -> dict[str, Any]:
    """What backend `name` makes of an op: case -> the worst error as a share of what is allowed, or why not.

    Raises:
        RuntimeError: the backend does not offer the op here.
    """
    found: dict[str, Any] = {}
    with backend.use_backend(name, strict=True):
        backend.choose("group_tokens" if op == "group_tokens_by_hash" else op, torch.empty(0, device=target.device))
        for case, dtype, provider in _cases(op, target, small):
            checked = gate.check({case: provider}, dtype)
            found[case] = checked.refused.get(case) or round(checked.error_shares[case], 3)
    return found


def _cases(op: str, target: Target, small: bool) -> Iterator[tuple[str, torch.dtype | None, Provider]]:
    if op in ROUTING:
        for T, V, E in LOOKED_UP:
            yield f"T{T}-V{V}-E{E}", None, _routing(op, Draws(target), T, V, E)
        return
    for dtype, forms in (SMALL if small else FORMS).items():
        if not target.on_gpu and dtype == torch.bfloat16:
            dtype = torch.float32  # Triton's interpreter rounds bfloat16 as no GPU does
        for form, sizes in forms if target.on_gpu else [f for f in forms if f[1] != LARGE]:
            if form not in FORMS_OF.get(op, ("gelu",)):
                continue
            draws = Draws(Target(target.device, dtype))
            name = "-".join((str(dtype).removeprefix("torch."), form, *map(str, sizes)))
            yield name, dtype, _differentiated(op, form, draws, *sizes)


def _routing(op: str, draws: Draws, T: int, V: int, E: int) -> Provider:
    """Token ids outside the table, masked ones, and expert ids of nobody."""
    token_ids, mask = draws.integers(V + 20, T) - 10, draws.integers(2, T)
    tables, expert_ids = draws.integers(E, 3, V).to(torch.uint8), draws.integers(E + 2, T, 2) - 1
    inputs = {
        "hash_route": (token_ids, tables[0], mask), "group_tokens": (expert_ids, E),
        "group_tokens_by_hash": (token_ids, tables, E, mask),
    }[op]  # fmt: skip

    def numbers(function: Callable[..., Any]) -> Outputs:
        got = function(*inputs)
        if isinstance(got, Tensor):
            return (got.double(),)
        groupings: Sequence[Grouping] = [got] if isinstance(got, Grouping) else got
        return tuple(t.double() for g in groupings for t in (g.offsets, g.row_to_assignment, g.assignment_to_row))

    return Provider(lambda: numbers(getattr(moebert_kernels, op)), lambda dtype: numbers(getattr(reference, op)))


def _differentiated(op: str, form: str, draws: Draws, T: int, H: int, I: int, E: int) -> Provider:
    """Values and all gradients, with tokens that no expert takes."""
    ids = draws.integers(E + 2, T, 2) - 1 if form == "top_2" else draws.integers(E + 2, T) - 1
    ids[:1] = 0  # a single token is not skipped
    x, dy = draws.normal(T, H), draws.normal(T, H)
    activation = "swiglu" if form == "swiglu" else "gelu"
    weights = draws.ffn_weights(E, H=H, width=I, rows=2 * I if form == "swiglu" else I)
    ours, exact = getattr(moebert_kernels, op), getattr(reference, op)
    if op == "mpo_expert_weights":
        D, (i, j) = 3, (FACTORS if I > 1 else ((1, 1, 1), (1, 1, 1)))
        x = draws.normal(D, i[1], j[1], D)
        weights = [draws.normal(E, 1, i[0], j[0], D), draws.normal(E, D, i[2], j[2], 1)]
        dy = draws.normal(E, i[0] * i[1] * i[2], j[0] * j[1] * j[2])
        calls = [lambda x, *aux, f=f: f(x, aux) for f in (ours, exact)]
    elif op == "expert_gemm":
        grouping, weights, dy = reference.group_tokens(ids, E), weights[:2], draws.normal(T, I)
        calls = [lambda x, w, bias, f=f: f(x, w, grouping, bias) for f in (ours, exact)]
    elif form == "top_2":
        weights.append(draws.normal(T, 2))
        calls = [lambda x, *w, f=f: f(x, ids, *w[:4], routing_weights=w[4]) for f in (ours, exact)]
    else:
        weights += draws.norm_weights(E, H=H) if op == "fused_moe_ffn_add_norm" else []
        calls = [lambda x, *w, f=f: f(x, ids, *w, activation=activation) for f in (ours, exact)]

    def of(function: Callable[..., Tensor], dtype: torch.dtype) -> Outputs:
        return runner(function, x.to(dtype), [w.to(dtype) for w in weights], dy.to(dtype), "forward_backward")()

    return Provider(lambda: of(calls[0], x.dtype), lambda dtype: of(calls[1], dtype))


def main(name: str) -> int:
    """Check small cases of every op that the backend offers; 1 if one is refused."""
    target, wrong = Target.of(), 0
    for op in (*backend.OPS, "group_tokens_by_hash"):
        try:
            found = check(op, name, target, small=True)
        except RuntimeError as reason:  # the backend does not offer it
            print(f"{op}: left out: {reason}", flush=True)
            continue
        refused = {case: said for case, said in found.items() if isinstance(said, str)}
        print(f"{op}: {len(found) - len(refused)} of {len(found)} right {refused or ''}", flush=True)
        wrong |= bool(refused)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
