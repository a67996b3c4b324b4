"""Files and folders that are written whole or not at all, and digests of what they hold."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from moebert_kernels.errors import UserError

_ABANDONED_S = 2 * 24 * 3600  # nothing is written for so long


def cache_folder() -> Path:
    """Where downloads and compiled kernels are kept: `MOEBERT_KERNELS_CACHE`, else a folder in the user's cache."""
    if own := os.environ.get("MOEBERT_KERNELS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moebert_kernels"


def check_writable(name: str, folder: Path) -> None:
    """Raise UserError, which begins with `name`, unless files can be written into `folder`, made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{name}: expected a folder that can be written, got {folder} ({error.strerror})") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a new file that takes the place of `path` when the block ends, and is removed where it raises.

    The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # what is there may be why the disk is full
        raise


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process writes; what one left that was killed days ago is removed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):  # another process may remove it too
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in a folder that is made if missing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all, in a folder that is made if missing."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def once(file: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON keeps it; made and written only where `file` does not hold it yet."""
    if not file.exists():
        write_text(file, json.dumps(make()))
    return json.loads(file.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all, in a folder that is made if missing."""
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, facts)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Replace the folder `path` by what `write(folder)` writes; the old one is kept until the new one is complete.

    A folder cannot be replaced in one step: for a moment the old one is called `<name>.previous`. `recover_folder`
    repairs an interruption at that moment. Of a link the folder is replaced that it leads to. Of several processes that
    write the same folder one wins with all of its files.
    """
    path = path.resolve()
    temporary, previous = _temporary(path), path.with_name(f"{path.name}.previous")
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        recover_folder(path)
        if path.exists():
            path.rename(previous)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Undo what an interruption of `write_folder` left behind."""
    previous = path.with_name(f"{path.name}.previous")
    if previous.exists():
        if path.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(path)


@contextmanager
def alone_in(name: str, folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of `folder`, made if missing, until the block or the process ends.

    Raises:
        UserError: which begins with `name`; another process is in it, or it cannot be written.
    """
    check_writable(name, folder)
    file = folder / ".lock"
    lock = FileLock(file, timeout=0)  # the system releases it when a process is killed
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{name}: expected a folder that no other process writes, got {folder}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # where open files cannot be removed
            file.unlink()
        lock.release()


def size_and_crc32(path: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file."""
    size = value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            size, value = size + len(chunk), zlib.crc32(chunk, value)
    return [size, value]
