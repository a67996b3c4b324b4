"""What runs here and why: versions, devices, the backend of each op, and a self-test of each and of each CUDA form.

It always prints: a probe that fails reports its error instead of ending the report. `python -m moebert_kernels.doctor`
is `moebert doctor` without what the command line imports.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import moebert_kernels
from moebert_kernels import backend, cpu, native, reference
from moebert_kernels.accuracy import error_and_bound
from moebert_kernels.doctor_text import render

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "safetensors", "numpy")
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS = 64, 40, 56, 4
Test: TypeAlias = Callable[[torch.device], str]
Dtypes: TypeAlias = tuple[torch.dtype, ...]


class Sizes(NamedTuple):
    """Of the layers that are tested."""

    tokens: int = TOKENS
    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE
    experts: int = EXPERTS

    @property
    def of_ffn(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of x, w1, b1, w2 and b2."""
        T, H, I, E = self
        return (T, H), (E, I, H), (E, I), (E, H, I), (E, H)


# Sizes at which a GPU takes the tiles of large layers, read by descriptors, and at which programs share the few tiles
# of the weights' gradients.
MANY_ROWS, FEW_TILES = Sizes(4096, 768, 768, 4), Sizes(512, 128, 128, 2)
MANY_TOKENS = 400  # more than the kernels of few tokens take
ADD_NORM, NORM_FORM = "fused_moe_ffn_add_norm", "expert_gemm_norm"


def collect() -> dict[str, Any]:
    """The whole report, as plain data for JSON. `ok` is False if an op disagrees with its reference or fails to run."""
    tests, cuda_tests = self_test(), cuda_self_test()
    return {
        "versions": {"moebert_kernels": moebert_kernels.__version__, "python": platform.python_version()}
        | {name: _probe(importlib.metadata.version, name) for name in PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "cpu": _probe(_cpu_name),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "serving on the cpu": _probe(_serving),
            "cuda": torch.version.cuda or "this torch is built without CUDA",
            "gpus": _probe(_gpus),
        },
        "triton": _probe(_triton),
        "native": _probe(_native),
        "backends": _probe(
            lambda: {choice.op: {"backend": choice.backend, "reason": choice.reason} for choice in backend.explain()}
        ),
        "self_test": tests,
        "cuda_self_test": cuda_tests,
        "ok": all(result["ok"] for result in (*tests.values(), *cuda_tests.values())),
    }


def self_test() -> dict[str, dict[str, Any]]:
    """Run each op on 64 tokens, with gradients, against `moebert_kernels.reference`; float32, on a GPU also bfloat16.

    Returns:
        op -> `ok`, and `message`: the worst error as a share of what is allowed, or what went wrong.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {op: _result(test, device) for op, test in _SELF_TESTS.items()}


def tiles_self_test(some: Sequence[Sizes] = (MANY_ROWS, FEW_TILES)) -> dict[str, dict[str, Any]]:
    """Run the ops that multiply at these sizes, as `self_test` does, in bfloat16 alone; by "op: tokens"."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        f"{op}: {sizes.tokens}": _result(make(sizes, (torch.bfloat16,)), device)
        for sizes in some for op, make in _TESTS_OF_SIZES.items()
    }  # fmt: skip


def cuda_self_test(device: torch.device | None = None) -> dict[str, dict[str, Any]]:
    """Run every form of an op that the GPU has in `moebert_kernels._C`, in inference, as `self_test` does.

    Args:
        device: None: the current GPU, if there is one.

    Returns:
        As `self_test`, by "op: kernel"; empty where none can run.
    """
    if device is None:
        if not torch.cuda.is_available():
            return {}
        device = torch.device("cuda", torch.cuda.current_device())
    results = {}
    with backend.use_backend("cuda", strict=True):
        for (op, kernel), test in _CUDA_SELF_TESTS.items():
            if backend.kernel_unavailable(kernel, device, torch.float32) is None:
                results[f"{op}: {kernel}"] = _result(test, device)
    return results


def _result(test: Callable[[torch.device], str], device: torch.device) -> dict[str, Any]:
    try:
        return {"ok": True, "message": test(device)}
    except Exception as error:  # whatever an op raises is what the report is for
        return {"ok": False, "message": f"{type(error).__name__}: {_first_line(error)}"}


def run(as_json: bool = False) -> int:
    """Print the report; the exit status is 1 if an op disagrees with its reference."""
    report = collect()
    print(json.dumps(report, indent=2) if as_json else render(report))
    return 0 if report["ok"] else 1


def _probe(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:  # a broken part of the machine must not hide the rest of the report
        return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _serving() -> dict[str, Any]:
    """What a prepared model can use; which of the engines runs is measured at preparation."""
    return {
        "int8 instructions": cpu.has_int8_instructions(),
        "bfloat16 instructions": cpu.has_bfloat16_instructions(),
        "int8 engines": ", ".join(e for e in torch.backends.quantized.supported_engines if e in ("fbgemm", "onednn")),
        "oneDNN": torch.backends.mkldnn.is_available(),
        "kernel of all experts": {dtype: _tiles(dtype) for dtype in ("int8", "int8-bfloat16", "bfloat16")},
    }


def _tiles(dtype: str) -> str:
    try:
        from moebert_kernels.serve import tiles
    except ImportError:
        return "transformers is not installed"
    return tiles.unavailable(dtype) or ("AMX" if tiles.by_amx(dtype) else "AVX-512")


def _gpus() -> list[str]:
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [f"{of.name}, sm_{of.major}{of.minor}, {of.total_memory / 2**30:.0f} GiB" for of in found]


def _triton() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        return {"usable": False, "reason": "not installed", "interpreter": False}
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreter:
        return {"usable": False, "reason": "there is no GPU", "interpreter": False}
    return {"usable": True, "reason": "interpreted on the CPU" if interpreter else "GPU", "interpreter": interpreter}


def _native() -> dict[str, Any]:
    found = native.record()
    if not found["built"]:
        return found
    native.module()  # raises where it does not import, and `_probe` says so
    error = native.device_error()
    return found | {"usable": not error, "reason": error or "runs on this GPU"}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)  # our own: a report must not move the caller's random state


def _expert_ids(device: torch.device, tokens: int = TOKENS, experts: int = EXPERTS) -> Tensor:
    ids = torch.randint(0, experts - 1, (tokens,), generator=_generator())  # the last expert gets nobody
    ids[::7] = -1  # skipped tokens
    return ids.to(device)


def _same(op: str, got: list[Tensor], expected: list[Tensor]) -> str:
    for g, e in zip(got, expected, strict=True):
        if g.shape != e.shape or not torch.equal(g, e):
            raise AssertionError(f"{op} differs from the reference")
    return "equal"


def _test_hash_route(device: torch.device) -> str:
    table = torch.randint(0, EXPERTS, (100,), generator=_generator()).to(device)
    token_ids = torch.arange(70, 70 + TOKENS, device=device)  # the last ones lie outside the table
    mask = (torch.arange(TOKENS, device=device) % 5 != 0).long()
    got, expected = (run(token_ids, table, mask) for run in (moebert_kernels.hash_route, reference.hash_route))
    return _same("hash_route", [got], [expected])


def _test_group_tokens(device: torch.device) -> str:
    ids = _expert_ids(device)
    got, expected = (run(ids, EXPERTS) for run in (moebert_kernels.group_tokens, reference.group_tokens))
    return _same("group_tokens", _parts(got), _parts(expected))


def _test_group_tokens_by_hash(device: torch.device) -> str:
    tables = torch.randint(0, EXPERTS, (3, 100), generator=_generator()).to(device)
    token_ids = torch.arange(70, 70 + TOKENS, device=device)
    got, expected = (
        [part for grouping in run(token_ids, tables, EXPERTS) for part in _parts(grouping)]
        for run in (moebert_kernels.group_tokens_by_hash, reference.group_tokens_by_hash)
    )
    return _same("group_tokens_by_hash", got, expected)


def _parts(grouping: moebert_kernels.Grouping) -> list[Tensor]:
    return [grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row]


def _expert_gemm_test(sizes: Sizes, dtypes: Dtypes = ()) -> Test:
    def test(device: torch.device) -> str:
        grouping = moebert_kernels.group_tokens(_expert_ids(device, sizes.tokens, sizes.experts), sizes.experts)
        return _as_accurate(
            lambda x, w, bias: moebert_kernels.expert_gemm(x, w, grouping, bias),
            lambda x, w, bias: reference.expert_gemm(x, w, grouping, bias),
            sizes.of_ffn[:3], device, dtypes,
        )  # fmt: skip

    return test


def _layer_test(op: str, sizes: Sizes, dtypes: Dtypes = ()) -> Test:
    def test(device: torch.device) -> str:
        ids, of_norm = _expert_ids(device, sizes.tokens, sizes.experts), (sizes.experts, sizes.hidden)
        return _as_accurate(
            lambda x, *weights: getattr(moebert_kernels, op)(x, ids, *weights),
            lambda x, *weights: getattr(reference, op)(x, ids, *weights),
            (*sizes.of_ffn, *([of_norm] * 2 if op == ADD_NORM else ())), device, dtypes,
        )  # fmt: skip

    return test


def _add_norm_in_order_test(sizes: Sizes, dtypes: Dtypes = ()) -> Test:
    def test(device: torch.device) -> str:
        T, H, _, E = sizes
        grouping = reference.group_tokens(_expert_ids(device, T, E), E)
        return _as_accurate(
            lambda x, added, weight, bias: moebert_kernels.add_norm_in_order(x, added, weight, bias, grouping),
            lambda x, added, weight, bias: reference.add_norm_in_order(x, added, weight, bias, grouping),
            ((T, H), (T, H), (H,), (H,)), device, dtypes,
        )  # fmt: skip

    return test


def _test_mpo_expert_weights(device: torch.device) -> str:
    offsets = torch.tensor([0, 3, 3, 5, 9], dtype=torch.int32, device=device)  # one expert gets nobody
    return _as_accurate(
        lambda c, *aux: moebert_kernels.mpo_expert_weights(c, aux, offsets=offsets),
        lambda c, *aux: reference.mpo_expert_weights(c, aux, offsets=offsets),
        ((20, 2, 3, 18), (EXPERTS, 1, 3, 2, 6), (EXPERTS, 6, 4, 2, 20), (EXPERTS, 18, 2, 3, 5), (EXPERTS, 5, 3, 2, 1)),
        device,
    )  # fmt: skip


def _cuda_test(op: str, form: str, tokens: int, hidden: int = HIDDEN) -> Callable[[torch.device], str]:
    """One of the two layers on so many tokens in bfloat16, after a check that this form is the first that applies."""

    def test(device: torch.device) -> str:
        from moebert_kernels.cuda_backend import expert_gemm, expert_gemm_norm, tiny_ffn  # these need Triton

        count = max(tokens, expert_gemm_norm.LEAST_TOKENS if form == NORM_FORM else 0)
        ids, of_expert, first = _expert_ids(device, count), (EXPERTS, hidden), (EXPERTS, INTERMEDIATE, hidden)
        shapes = ((count, hidden), first, first[:2], (*of_expert, INTERMEDIATE))
        norm = (of_expert, of_expert) if op == ADD_NORM else ()

        def call(x: Tensor, *rest: Tensor) -> Tensor:
            with backend.use_backend("cuda", strict=True, without=() if form == NORM_FORM else (NORM_FORM,)):
                asked = {"tiny_ffn": tiny_ffn.applies(x, 1, rest[0]), NORM_FORM: expert_gemm_norm.applies(x, rest[2]),
                         "expert_gemm": expert_gemm.applies(x, rest[0])}  # fmt: skip
                if form != next((name for name, applies in asked.items() if applies), None):
                    raise AssertionError(f"{form} is not what takes {count} tokens")
                return getattr(moebert_kernels, op)(x, ids, *rest)

        def naive(x: Tensor, *rest: Tensor) -> Tensor:
            return getattr(reference, op)(x, ids, *rest)

        return _as_accurate(call, naive, (*shapes, of_expert, *norm), device, (torch.bfloat16,), gradients=False)

    return test


def _test_cuda_expert_gemm(device: torch.device) -> str:
    grouping = reference.group_tokens(_expert_ids(device, MANY_TOKENS), EXPERTS)
    return _as_accurate(
        lambda x, w, bias: moebert_kernels.expert_gemm(x, w, grouping, bias, gather=True),
        lambda x, w, bias: reference.expert_gemm(x, w, grouping, bias, gather=True),
        ((MANY_TOKENS, HIDDEN), (EXPERTS, INTERMEDIATE, HIDDEN), (EXPERTS, INTERMEDIATE)), device,
        (torch.bfloat16,), gradients=False,
    )  # fmt: skip


def _as_accurate(
    op: Callable[..., Tensor], naive: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], device: torch.device,
    dtypes: tuple[torch.dtype, ...] = (), gradients: bool = True,
) -> str:  # fmt: skip
    """Output and, if asked, all gradients of `op`, within the bound of `error_and_bound`."""
    compared: list[tuple[int, tuple[Tensor, Tensor, Tensor]]] = []
    worst = 0.0
    for dtype in dtypes or (torch.float32, *((torch.bfloat16,) if device.type == "cuda" else ())):
        generator = _generator()
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        got = _outputs(op, inputs, dtype, device, gradients)
        same_dtype = _outputs(naive, inputs, dtype, device, gradients)
        exact = _outputs(naive, inputs, torch.float64, device, gradients)
        compared += enumerate(zip(got, same_dtype, exact, strict=True))
    for i, tensors in compared:
        name = "output" if i == 0 else f"gradient of argument {i}"
        if not torch.isfinite(tensors[0]).all():
            raise AssertionError(f"{name} is not finite")
        error, bound = error_and_bound(*tensors)
        if float(error.max()) > bound:
            raise AssertionError(f"{name}: expected an error of at most {bound:.1e}, got {float(error.max()):.1e}")
        worst = max(worst, float(error.max()) / bound)
    return f"worst error {worst:.0%} of what is allowed{', gradients included' if gradients else ''}"


def _outputs(
    op: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, device: torch.device, gradients: bool
) -> list[Tensor]:
    if not gradients:
        with torch.no_grad():
            return [op(*(tensor.to(device, dtype) for tensor in inputs))]
    with torch.enable_grad():
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
        y = op(*leaves)
        dy = torch.randn(y.shape, generator=_generator(), dtype=torch.float64).bfloat16()  # the same in each dtype
        return [y, *torch.autograd.grad(y, leaves, dy.to(device, dtype))]


_TESTS_OF_SIZES: dict[str, Callable[[Sizes, Dtypes], Test]] = {
    "expert_gemm": _expert_gemm_test,
    "fused_moe_ffn": functools.partial(_layer_test, "fused_moe_ffn"),
    ADD_NORM: functools.partial(_layer_test, ADD_NORM),
    "add_norm_in_order": _add_norm_in_order_test,
}
_SELF_TESTS: dict[str, Test] = {
    "hash_route": _test_hash_route,
    "group_tokens": _test_group_tokens,
    "group_tokens_by_hash": _test_group_tokens_by_hash,
    **{op: make(Sizes(), ()) for op, make in _TESTS_OF_SIZES.items()},
    "mpo_expert_weights": _test_mpo_expert_weights,
}
# By op and by its kernel in moebert_kernels._C. A training step's forward and backward are Triton's but for the GEMMs.
_CUDA_SELF_TESTS = {
    ("group_tokens", "group_tokens"): _test_group_tokens,
    ("group_tokens_by_hash", "group_tokens"): _test_group_tokens_by_hash,
    ("fused_moe_ffn", "tiny_ffn"): _cuda_test("fused_moe_ffn", "tiny_ffn", TOKENS),
    (ADD_NORM, "tiny_ffn"): _cuda_test(ADD_NORM, "tiny_ffn", TOKENS),
    ("expert_gemm", "expert_gemm"): _test_cuda_expert_gemm,
    ("fused_moe_ffn", "expert_gemm"): _cuda_test("fused_moe_ffn", "expert_gemm", MANY_TOKENS),
    # Four CTAs hold a row, the last one a part of its columns.
    (ADD_NORM, NORM_FORM): _cuda_test(ADD_NORM, NORM_FORM, MANY_TOKENS, hidden=736),
    (ADD_NORM, "expert_gemm"): _cuda_test(ADD_NORM, "expert_gemm", MANY_TOKENS),
}


if __name__ == "__main__":
    sys.exit(run(as_json="--json" in sys.argv[1:]))
