"""The kernels by AMX or by AVX-512, whichever a test asks for; AMX is emulated on CPUs that have none."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from moebert_kernels.serve import tiles

HEADER = Path(__file__).parent / "emulated_amx.h"


@functools.cache
def _emulated() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "emulated.so"
        sources = [tiles.FOLDER / name for name in tiles.COMPILED]
        command = [*tiles.compiler_command(), *tiles.FLAGS, "-include", HEADER, "-o", file, *sources]
        subprocess.run(command, check=True)
        return tiles._loaded(file)


def run_by(amx: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels of one of `serve.dtypes.DTYPES` take AMX, or not; skip the test where that cannot be."""
    if amx and (tiles.unavailable(dtype) is not None or not tiles.by_amx(dtype)):
        if isinstance(reason := tiles.attention_kernel(torch.bfloat16), str):
            pytest.skip(reason)
        library = _emulated()
        monkeypatch.setattr(tiles, "_library", lambda: library)
        monkeypatch.setattr(tiles, "_lacking", lambda _: None)
    elif reason := tiles.unavailable(dtype):
        pytest.skip(reason)
    monkeypatch.setattr(tiles, "by_amx", lambda _: amx)
