"""All experts of a layer in one call of a kernel of our own, on x86-64 CPUs with AMX or AVX-512.

torch's libraries multiply one expert at a time: rows are copied before and after, and each product is prepared anew.
`experts.cpp` reads a token's row where it is, goes through both products with what is between and behind them while
the operands are in the cache, and writes the row where it belongs. In int8 each row of a product's inputs has a scale
and a zero point of its own. As torch's Inductor and Triton do, this compiles the source where it runs, once, with the
C++ compiler of the machine (`CXX`, else c++, g++ or clang++), into the cache of the package.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moebert_kernels.activation import ACTIVATIONS, is_gated
from moebert_kernels.cpu import capabilities
from moebert_kernels.errors import UserError
from moebert_kernels.files import cache_folder, replacing
from moebert_kernels.grouping import Grouping
from moebert_kernels.serve.dtypes import DTYPES, input_dtype, is_int8

ENGINE = "tiles"
SWITCH = "MOEBERT_KERNELS_TILES"
FOLDER = Path(__file__).parent
COMPILED = ("experts.cpp", "attention.cpp")
SOURCES = (*COMPILED, "chunks.h", "quantised.h", "products.h", "numbers.h", "threads.h")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16",
    "-mamx-tile", "-mamx-bf16", "-mamx-int8",
)  # fmt: skip
# instructions by torch's names: of all that is compiled, then of a dtype
_ALWAYS = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl", "fma3")
_NEEDED = {
    "bfloat16": ("avx512_vnni", "avx512_bf16"), "int8": ("avx512_vnni",), "int8-token": ("avx512_vnni",),
    "int8-bfloat16": ("avx512_vnni", "avx512_bf16"),
}  # fmt: skip
_OF_W1, _OF_W2 = ("w1_scale", "b1"), ("w2_scale", "b2")
_POINTERS = ("w1", "w2", "sum1", "sum2", "w1_scale", "w2_scale", "b1", "b2", "norm_weight", "norm_bias")
_ROWS, _COLUMNS, _ROW_BYTES = 16, 32, 64  # of a tile, of a block of outputs, and of a row of a tile

_pointer = ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("is_int8", "is_float32", "activation", "experts", "hidden")),
        ("width", ctypes.c_int),
        ("amx", ctypes.c_int),
        ("eps", ctypes.c_float),
        *((name, _pointer) for name in ("w1", "w2", "sum1", "sum2", "scale1", "scale2", "b1", "b2")),
        *((name, _pointer) for name in ("norm_weight", "norm_bias")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("x", _pointer), ("y", _pointer), ("x_stride", ctypes.c_int64), ("offsets", _pointer),
        ("assignments", _pointer), ("weights", _pointer),
        *((name, ctypes.c_int) for name in ("tokens", "top_k", "threads")),
    )  # fmt: skip


def unavailable(dtype: str) -> str | None:
    """Why the kernel is not taken for one of `serve.dtypes.DTYPES` on this machine, or None."""
    return f"{SWITCH} is 0" if os.environ.get(SWITCH) == "0" else _lacking(dtype)


def _lacking(dtype: str) -> str | None:
    """Why the kernel cannot run here, or None."""
    if dtype not in _NEEDED:
        return f"it computes in bfloat16 or int8, asked for {dtype}"
    found = capabilities()
    if missing := [name for name in (*_ALWAYS, *_NEEDED[dtype]) if not found.get(name)]:
        return f"this CPU has no {missing[0]}"
    library = _library()
    return library if isinstance(library, str) else None


def by_amx(dtype: str) -> bool:
    """Whether products are AMX's where the kernel runs, and not AVX-512's."""
    library: Any = _library()
    products = "amx_int8" if is_int8(dtype) else "amx_bf16"
    return all(map(capabilities().get, ("amx_tile", products))) and bool(library.mbk_tiles_amx())


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernel, or in one line why there is none: then torch's libraries run everything."""
    try:
        # a home that two systems share has a file for each C library; one that is there needs no compiler
        digest = hashlib.sha256(" ".join((*FLAGS, *platform.libc_ver())).encode())
        for name in SOURCES:
            digest.update((FOLDER / name).read_bytes())
        file = cache_folder().resolve() / f"tiles-{digest.hexdigest()[:16]}.so"
        if file.exists():
            with suppress(OSError, AttributeError):  # a damaged file is made again
                return _loaded(file)
        compiler = compiler_command()
        if not compiler:
            return "no C++ compiler was found (c++, g++ or clang++; CXX names another one)"
        with replacing(file) as partial:
            command = [*compiler, *FLAGS, "-o", str(partial), *(str(FOLDER / name) for name in COMPILED)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            with partial.open("rb") as written:
                os.fsync(written.fileno())  # a file of which a power cut left a part would end the process
        return _loaded(file)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return f"{error.cmd[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}"
    except (
        OSError,
        ValueError,
        RuntimeError,
        AttributeError,
    ) as error:  # no such compiler, no home, no quotation mark, a full disk
        return f"it could not be compiled or loaded: {error}"


def compiler_command() -> list[str]:
    """The machine's C++ compiler, and nothing if there is none."""
    given = os.environ.get("CXX")
    return shlex.split(given) if given else [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]


def _loaded(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    library.mbk_tiles_run.argtypes = (ctypes.POINTER(_Layer), ctypes.POINTER(_Call))
    library.mbk_tiles_run.restype = library.mbk_attention.restype = None
    return library


@functools.cache
def attention_kernel(dtype: torch.dtype) -> tuple[Any, bool] | str:
    """The kernel of attention for queries of this dtype, and whether products are AMX's; or why it cannot run here."""
    in_bfloat16 = dtype == torch.bfloat16
    if reason := _lacking("bfloat16" if in_bfloat16 else "int8"):  # float32 needs what int8 needs
        return reason
    library: Any = _library()
    return library.mbk_attention, in_bfloat16 and by_amx("bfloat16")


def _run(dtype: str) -> Any:
    """The kernel.

    Raises:
        UserError: it cannot run here, as with a pickle of another machine.
    """
    if reason := _lacking(dtype):
        raise UserError(f"tiles: expected a machine on which this kernel runs, got one where {reason}; prepare again")
    library: Any = _library()
    return library.mbk_tiles_run


def _checked(x: Tensor, dtype: torch.dtype, inputs: int) -> Tensor:
    """x with its last dimension without gaps; the kernel reads where it is told to."""
    if torch.jit.is_tracing() or isinstance(x, FakeTensor):
        raise RuntimeError(f"tiles: this kernel can be neither traced nor exported; prepare the model with {SWITCH}=0")
    if x.dtype is not dtype or x.shape[-1] != inputs or x.device.type != "cpu":
        got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
        raise ValueError(f"x: expected {dtype} (..., {inputs}) on the CPU in this prepared model, got {got}")
    return x if x.stride(-1) == 1 else x.contiguous()


class TiledLinear:
    """x (..., K) -> x w' + bias (..., N): one expert's first product alone.

    Args:
        weight: (N, K) bfloat16 or int8.
        scale: (N,) of an int8 weight, else None.
        bias: (N,) or None.
        activations: the dtype of x and of what comes out.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activations: torch.dtype) -> None:
        dtype = next(name for name, numbers in DTYPES.items() if numbers[:2] == (weight.dtype, activations))
        self._run, self.amx = _run(dtype), by_amx(dtype)
        (self.outputs, self.inputs), step = weight.shape, _ROW_BYTES // weight.element_size()
        self.input_dtype = activations
        self._bias_dtype = None if bias is None else bias.dtype
        n = _up(self.outputs, _COLUMNS)
        self._held = {
            "w1": _tiled(_padded(weight[None], n, _up(self.inputs, step)), step),
            "sum1": None if scale is None else _padded(weight.sum(1, dtype=torch.int32)[None], n),
            "scale1": None if scale is None else _padded(scale.float()[None], n),
            "b1": None if bias is None else _padded(bias.float()[None], n),
        }
        pointers = {name: None if tensor is None else tensor.data_ptr() for name, tensor in self._held.items()}
        identity = ACTIVATIONS.index("identity")
        sizes = identity, 1, self.inputs, self.outputs
        self._layer = _Layer(is_int8(dtype), activations == torch.float32, *sizes, self.amx, 0.0, **pointers)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What it was made of, bit for bit."""
        weight, scale, bias = self._held["w1"], self._held["scale1"], self._held["b1"]
        assert weight is not None
        return (
            _untiled(weight)[0, : self.outputs, : self.inputs].contiguous(),
            None if scale is None else scale[0, : self.outputs].clone(),
            None if bias is None else bias[0, : self.outputs].to(self._bias_dtype),
        )

    def __call__(self, x: Tensor) -> Tensor:
        rows = _checked(x, self.input_dtype, self.inputs).reshape(-1, self.inputs)
        y = x.new_empty(*x.shape[:-1], self.outputs)
        call = _Call(
            rows.data_ptr(), y.data_ptr(), rows.stride(0), None, None, None, len(rows), 1, torch.get_num_threads()
        )
        self._run(self._layer, call)
        return y


class TiledExperts:
    """The experts of a layer in the kernel's form.

    Args:
        tensors: the buffers of `PackedExperts`; missing ones and None are not there.
        dtype: one of `DTYPES`, but not "float32".
        activation: one of `ACTIVATIONS`.
        eps: of the norms.
    """

    engine = ENGINE

    def __init__(
        self, tensors: Mapping[str, Tensor | None], dtype: str, activation: str, eps: float | None = None
    ) -> None:
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self._run, self.amx = _run(dtype), by_amx(dtype)
        self.dtype, self.activation, self.eps = dtype, activation, eps
        self._dtypes = {name: tensor.dtype for name, tensor in given.items()}
        w1, w2 = given["w1"], given["w2"]
        step = _ROW_BYTES // w1.element_size()
        self.input_dtype = input_dtype(dtype)
        (self.num_experts, self.outputs, self.hidden), self.width = w1.shape, w2.shape[2]
        n1, n2 = self._padded_outputs(), _up(self.hidden, _COLUMNS)
        width = n1 // 2 if is_gated(activation) else n1
        held = {
            "w1": _tiled(_padded(self._in_turns(w1), n1, _up(self.hidden, step)), step),
            "w2": _tiled(_padded(w2, n2, _up(width, step)), step),
        }
        if is_int8(dtype):
            held["sum1"] = _padded(self._in_turns(w1.sum(2, dtype=torch.int32)), n1)
            held["sum2"] = _padded(w2.sum(2, dtype=torch.int32), n2)
        for name in given.keys() - {"w1", "w2"}:
            values = given[name].float()
            if name in _OF_W1:
                values = _padded(self._in_turns(values), n1)
            elif name in _OF_W2:
                values = _padded(values, n2)
            held[name] = values.contiguous()
        self._held = held
        self._layer = _Layer(
            is_int8(dtype), self.input_dtype == torch.float32, ACTIVATIONS.index(activation), self.num_experts,
            self.hidden, self.width, self.amx, eps or 0.0,
            *(held[name].data_ptr() if name in held else None for name in _POINTERS),
        )  # fmt: skip

    def _padded_outputs(self) -> int:
        """N1: of a gated expert 16 gates and their 16 factors are in turns."""
        return 2 * _up(self.width, _ROWS) if is_gated(self.activation) else _up(self.width, _COLUMNS)

    def _in_turns(self, tensor: Tensor) -> Tensor:
        """(E, 2I, ...), gates first -> (E, N1, ...) in turns; of ungated experts itself."""
        if not is_gated(self.activation):
            return tensor
        E, N, *rest = tensor.shape
        halves = _padded_at(tensor.view(E, 2, N // 2, *rest), 2, self._padded_outputs() // 2)
        return halves.view(E, 2, -1, _ROWS, *rest).transpose(1, 2).reshape(E, -1, *rest)

    def _back(self, tensor: Tensor) -> Tensor:
        """The opposite of `_in_turns` and of padding behind it."""
        if not is_gated(self.activation):
            return tensor[:, : self.outputs]
        E, N, *rest = tensor.shape
        halves = tensor.view(E, -1, 2, _ROWS, *rest).transpose(1, 2).reshape(E, 2, N // 2, *rest)
        return halves[:, :, : self.width].reshape(E, -1, *rest)

    def tensors(self) -> dict[str, Tensor]:
        """What it was made of, bit for bit."""
        found = {}
        for name, dtype in self._dtypes.items():
            values = self._held[name]
            if name == "w1":
                values = self._back(_untiled(values))[..., : self.hidden]
            elif name == "w2":
                values = _untiled(values)[:, : self.hidden, : self.width]
            elif name in _OF_W1:
                values = self._back(values)
            elif name in _OF_W2:
                values = values[:, : self.hidden]
            found[name] = values.to(dtype).contiguous()
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return TiledExperts, (self.tensors(), self.dtype, self.activation, self.eps)

    def __call__(self, x: Tensor, grouping: Grouping, weights: Tensor | None = None) -> Tensor:
        """y (T top_k, H) of the assignments that have an expert; the rows of the others hold anything.

        Args:
            x: (T, H) in `input_dtype`.
            grouping: of these tokens.
            weights: (T, top_k) that the rows are multiplied by.
        """
        x = _checked(x, self.input_dtype, self.hidden)
        if grouping.num_rows != len(x) * grouping.top_k or grouping.num_experts != self.num_experts:
            raise ValueError(
                f"routing: expected a Grouping of {len(x)} tokens to {self.num_experts} experts, got one of "
                f"{grouping.num_tokens} to {grouping.num_experts}"
            )
        y = x.new_empty(grouping.num_rows, self.hidden)
        p = None if weights is None else weights.float().contiguous()
        call = _Call(
            x.data_ptr(), y.data_ptr(), x.stride(0), grouping.offsets.data_ptr(),
            grouping.row_to_assignment.data_ptr(), None if p is None else p.data_ptr(), len(x), grouping.top_k,
            torch.get_num_threads(),
        )  # fmt: skip
        self._run(self._layer, call)
        return y


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded_at(tensor: Tensor, dim: int, size: int) -> Tensor:
    """With zeros behind, up to this size; contiguous."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor.contiguous()
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _padded(tensor: Tensor, *sizes: int) -> Tensor:
    """(E, ...) with these sizes behind the first one."""
    for dim, size in enumerate(sizes, 1):
        tensor = _padded_at(tensor, dim, size)
    return tensor


def _tiled(weight: Tensor, step: int) -> Tensor:
    """(E, N, K), padded -> (E, N / 16, K / step, 16, 16, numbers of 4 bytes)."""
    E, N, K = weight.shape
    return weight.view(E, N // _ROWS, _ROWS, K // step, _ROWS, step // _ROWS).permute(0, 1, 3, 4, 2, 5).contiguous()


def _untiled(tiles: Tensor) -> Tensor:
    """The opposite of `_tiled`."""
    E, N, K, rows, _, numbers = tiles.shape
    return tiles.permute(0, 1, 4, 2, 3, 5).reshape(E, N * rows, K * rows * numbers)
