"""Files and folders that are written whole or not at all, and digests of what they hold."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

_ALIGNMENT = 64  # bytes, of torch's allocations on a CPU


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits that name a model's parameters and persistent buffers: names, shapes, dtypes and values."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {zlib.crc32(data)}\n".encode())
    return digest.hexdigest()[:16]


def aligned(module: Any) -> Any:
    """The module itself, its tensors copied that do not begin where torch allocates, as those mapped from a file do.

    Matrix products of some CPUs sum in another order there, and a run must not depend on where its models came from.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return module


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in a folder that is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all, in a folder that is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Replace the folder `path` by what `write(folder)` writes; the old one is kept until the new one is complete.

    A folder cannot be replaced in one step: for a moment the old one is called `<name>.previous`. `recover_folder`
    repairs an interruption at that moment.
    """
    temporary, previous = path.with_name(f".{path.name}.partial"), path.with_name(f"{path.name}.previous")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
    recover_folder(path)
    if path.exists():
        path.rename(previous)
    temporary.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Undo what an interruption of `write_folder` left behind."""
    previous = path.with_name(f"{path.name}.previous")
    if previous.exists():
        if path.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(path)


def size_and_crc32(path: Path) -> list[int]:
    """What `file_damage` compares a file with."""
    size = value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            size, value = size + len(chunk), zlib.crc32(chunk, value)
    return [size, value]


def file_damage(path: Path, size_and_checksum: Sequence[int]) -> str | None:
    """How a file differs from what it was when `size_and_crc32` saw it, or None.

    Raises:
        OSError: it cannot be read.
    """
    size, crc32 = size_and_checksum
    found = path.stat().st_size
    if found != size:
        return f"{path.name}: expected {size} bytes, got {found}"
    if size_and_crc32(path)[1] != crc32:
        return f"{path.name}: expected CRC-32 {crc32}, got another"
    return None
