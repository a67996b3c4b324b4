"""What a Triton kernel's launch would compile, recorded without a GPU, and what its machine code takes."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend

from moebert_kernels.kernels import launch as launching

SECOND = ("group_tokens.place", "add_partials")  # come after another kernel
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What one launch would compile."""

    name: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    def source(self) -> ASTSource:
        module = sys.modules[self.module]
        fn = getattr(module, self.kernel)
        position = {name: i for i, name in enumerate(fn.arg_names)}
        return ASTSource(
            fn, dict(self.signature), {(position[name],): value for name, value in self.constants},
            {(position[name],): [["tt.divisibility", 16]] for name in self.divisible},
        )  # fmt: skip

    def lower(self, arch: int) -> None:
        """Compile as far as Triton's own passes for the GPU, without the assembler: a fifth of the time."""
        target, source = GPUTarget("cuda", arch, 32), self.source()
        backend = make_backend(target)
        options = backend.parse_options(dict(self.options) | source.parse_options())
        stages: dict[str, Callable[..., Any]] = {}
        backend.add_stages(stages, options, source.language)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        code = source.make_ir(
            target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
        for stage in ("ttir", "ttgir"):
            code = stages[stage](code, {"target": target, **vars(options)})

    def compile(self, arch: int) -> dict[str, Any]:
        """Registers, shared bytes, spilled bytes, whether the code uses wgmma, its length and asynchronous copies."""
        compiled = triton.compile(self.source(), target=GPUTarget("cuda", arch, 32), options=dict(self.options))
        cubin = compiled.asm["cubin"]
        usage = {
            k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _printed(cubin, "cuobjdump", "-res-usage"))
        }
        return {
            "registers": usage["REG"],
            "shared": compiled.metadata.shared,
            # a stack may also be that of a called function, such as an exact division
            "spilled": _spilled(compiled.asm["ptx"], arch) if usage["STACK"] + usage["LOCAL"] else 0,
            "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
            "instructions": len(re.findall(r"^\s*/\*[0-9a-f]+\*/", _printed(cubin, "nvdisasm", "-c"), re.MULTILINE)),
            # 16 bytes or a block at a time, from memory to shared memory: what a load that is not coalesced cannot be
            "async_copies": compiled.asm["ptx"].count("cp.async.cg.shared.global")
            + compiled.asm["ptx"].count("cp.async.bulk.tensor"),
        }


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _printed(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def _spilled(ptx: str, arch: int) -> int:
    """Bytes of spill stores, as the assembler counts them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", source.name]
        printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", printed))


def recorded(name: str, launch: Callable[[], None]) -> Launch:
    """The launch of the kernel that `launch` is about, without making it."""
    return all_recorded(name, launch)[1 if name.startswith(SECOND) else 0]


def all_recorded(name: str, run: Callable[[], None]) -> list[Launch]:
    """The launches that `run` makes, without making them."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    run_kernel = mock.patch.object(triton.runtime.jit.JITFunction, "run", lambda fn, *a, **k: seen.append((fn, a, k)))
    without_gpu = mock.patch.object(launching, "_INTERPRETED", True)  # which asks no driver
    with run_kernel, without_gpu:
        run()
    return [_launch(name, *call) for call in seen]


def _launch(name: str, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in kwargs}
    values = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = {}, {}, []
    for parameter in fn.params:
        value = values[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                divisible.append(parameter.name)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if specialized and value % 16 == 0:
                divisible.append(parameter.name)
    return Launch(
        name, fn.fn.__module__, fn.fn.__name__, tuple(signature.items()), tuple(constants.items()), tuple(divisible),
        tuple(options.items()),
    )  # fmt: skip
