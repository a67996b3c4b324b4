"""State of a run on disk, for an exact resume: written whole or not at all, verified before it is loaded, never pickle.

A checkpoint is a folder `step-00000120/` with, for each trained part, weights and optimizer state (safetensors), the
random generators of each process (safetensors), `state.json` (counters, scheduler, identity of the run) and
`manifest.json` (size and CRC-32 of every other file). The newest two are kept: if one is damaged, the other loads.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from moebert_kernels.distill.identity import check_run
from moebert_kernels.errors import UserError

FORMAT_VERSION = 1
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


@dataclass(frozen=True)
class Part:
    """One trained module with its optimizer and schedule, not wrapped by anything."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any  # state_dict() and load_state_dict() of JSON-able values


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: where they lie; made by the first save.
        identity: JSON-able facts that must agree when a run is resumed.
        rank, barrier: of a distributed run; every process saves its own random generators, rank 0 the rest.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        rank: int = 0,
        barrier: Callable[[], None] = lambda: None,
    ):
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._rank, self._barrier = rank, barrier

    def save(self, step: int, parts: Mapping[str, Part], progress: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step`, then drop all but it and the one before."""
        target = self.folder / f"step-{step:08d}"
        temporary = self.folder / ".partial"
        if self._rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._barrier()
        save_file(_rng_state(), temporary / f"rng-{self._rank}.safetensors")
        self._barrier()
        if self._rank != 0:
            return
        state = {
            "format_version": FORMAT_VERSION,
            "identity": self._identity,
            "progress": dict(progress),
            "schedulers": {name: part.scheduler.state_dict() for name, part in parts.items()},
        }
        for name, part in parts.items():
            save_model(part.module, str(temporary / f"{name}.safetensors"))
            save_file(_optimizer_state(part), temporary / f"{name}.optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        manifest = {file.name: size_and_crc32(file) for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        older = [path for path in self._all() if path.name < target.name]
        for path in self._all():
            if path != target and path not in older[:1]:  # the one before, and nothing of a later, abandoned course
                shutil.rmtree(path)

    def check(self) -> None:
        """Raise UserError if the newest checkpoint belongs to another run; whether it is whole, `load` finds out."""
        for path in self._all()[:1]:
            try:
                identity = json.loads((path / "state.json").read_text(encoding="utf-8"))["identity"]
            except (OSError, ValueError, KeyError):
                return
            self._check(identity)

    def load(self, parts: Mapping[str, Part]) -> dict[str, Any] | None:
        """Load the newest checkpoint that is whole into `parts`; returns its progress, or None if there is none.

        The random generators are left alone: `restore_rng` sets them, when the caller is done with drawing from them.

        Raises:
            UserError: the checkpoints belong to another run, or none of them is whole.
        """
        problems: list[str] = []
        for path in self._all():
            problem = _damage(path)
            if problem is None:
                if problems:
                    warnings.warn(f"{problems[0]}: going on from {path.name}", stacklevel=2)
                return self._load(path, parts)
            problems.append(f"{path}: {problem}")
        if problems:
            raise UserError(f"{problems[0]}; no other checkpoint is whole (start again in another output folder)")
        return None

    def _load(self, path: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: expected format_version {FORMAT_VERSION}, got {state['format_version']}")
        self._check(state["identity"])
        for name, part in parts.items():
            load_model(part.module, str(path / f"{name}.safetensors"))
            _load_optimizer_state(part, load_file(path / f"{name}.optimizer.safetensors"))
            part.scheduler.load_state_dict(state["schedulers"][name])
            for group, rate in zip(part.optimizer.param_groups, part.scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        self._rng = load_file(path / f"rng-{self._rank}.safetensors")
        return state["progress"]

    def _check(self, saved: Mapping[str, Any]) -> None:
        check_run(self.folder.parent, False, saved, self._identity)

    def restore_rng(self) -> None:
        """Set this process's random generators to what they were at the checkpoint that was loaded."""
        _set_rng_state(self._rng)

    def clear(self) -> None:
        """Remove all checkpoints."""
        if self._rank == 0:
            for path in (*self._all(), self.folder / ".partial"):
                shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)


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


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, facts in manifest.items():
            damage = file_damage(path / name, facts)
            if damage is not None:
                return f"corrupt checkpoint: {damage}"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"corrupt checkpoint: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _optimizer_names(part: Part) -> list[str]:
    """The names of the optimizer's parameters, in its own order."""
    names = {id(parameter): name for name, parameter in part.module.named_parameters()}
    return [names[id(parameter)] for group in part.optimizer.param_groups for parameter in group["params"]]


def _optimizer_state(part: Part) -> dict[str, Tensor]:
    names = _optimizer_names(part)
    state = part.optimizer.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}


def _load_optimizer_state(part: Part, tensors: Mapping[str, Tensor]) -> None:
    index = {name: i for i, name in enumerate(_optimizer_names(part))}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        state.setdefault(index[name], {})[key] = tensor.clone()  # not the mapped file, which is removed one day
    part.optimizer.load_state_dict({"state": state, "param_groups": part.optimizer.state_dict()["param_groups"]})


def _rng_state() -> dict[str, Tensor]:
    """The generators of torch (CPU, this process's GPU), numpy and the standard library, as tensors."""
    version, words, python_gauss = random.getstate()
    _, keys, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        # the standard library's second normal value, if it has one in store, and numpy's
        "gauss": torch.tensor(
            [float("nan") if python_gauss is None else python_gauss, numpy_gauss], dtype=torch.float64
        ),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"].clone())
    python_gauss, numpy_gauss = state["gauss"].tolist()
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), None if python_gauss != python_gauss else python_gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, numpy_gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())
