"""Files and folders that are written whole or not at all, and digests of what they hold."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moebert_kernels.errors import UserError

_ALIGNMENT = 64  # bytes, of torch's allocations on a CPU


def aligned(module: Any) -> Any:
    """The module itself, its tensors copied that do not begin where torch allocates, as those mapped from a file do.

    Matrix products of some CPUs sum in another order there, and a run must not depend on where its models came from.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return module


def check_writable(name: str, folder: Path) -> None:
    """Raise UserError, which begins with `name`, unless files can be written into `folder`, made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{name}: expected a folder that can be written, got {folder} ({error.strerror})") from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in a folder that is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def once(file: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON keeps it; made and written only where `file` does not hold it yet."""
    if not file.exists():
        write_text(file, json.dumps(make(), indent=None))
    return json.loads(file.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all, in a folder that is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, facts)
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
    """Size in bytes and CRC-32 of a file."""
    size = value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            size, value = size + len(chunk), zlib.crc32(chunk, value)
    return [size, value]
