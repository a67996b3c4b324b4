"""Importance scores on disk: one safetensors file that says which model and which data they belong to."""

import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moebert_kernels.convert.plain_pickle import read_plain_pickle
from moebert_kernels.convert.sites import common_width, find_sites
from moebert_kernels.errors import UserError
from moebert_kernels.files import write_tensors

_FORMAT = "moebert_kernels.importance.1"


class Importance(NamedTuple):
    """Scores (L, D) float32, and facts about them: `fingerprint`, `model`, `data`, `split`, `task`, ..."""

    scores: Tensor
    metadata: dict[str, str]


def model_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over names, shapes, dtypes and values of parameters and persistent buffers: 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_importance(
    path: str | os.PathLike[str], scores: Tensor, *, model: nn.Module, data: str, split: str, task: str, **more: Any
) -> None:
    """Write importance scores and their origin; an existing file is replaced only by a complete one.

    Args:
        path: the file; name it `*.safetensors`.
        scores: (L, D) of `model`.
        model: the dense model that was scored; its fingerprint is stored.
        data: where the samples came from, as the user named it.
        split: which part of it ("train").
        task: the task whose loss was used.
        more: further facts; stored as text.

    Raises:
        UserError: the scores do not fit the model, or the file cannot be written.
    """
    check_scores(scores, model)
    facts = {"data": data, "split": split, "task": task, "model": _model_name(model), **more}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    metadata |= {"format": _FORMAT, "fingerprint": model_fingerprint(model)}
    try:
        write_tensors(Path(path), {"scores": scores.detach().to("cpu", torch.float32)}, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"path: expected a file that can be written, got {path} ({error})") from error


def load_importance(path: str | os.PathLike[str], model: nn.Module | None = None) -> Importance:
    """Read importance scores: our safetensors, or the original code's `.npz` (sorted scores, ranks) and `.pkl` files.

    The authors' files are read for the order of the neurons: equal scores are made to differ by the smallest amount
    that keeps the stored order.

    Args:
        path: the file.
        model: check the scores against this model: another shape is an error, another fingerprint a warning.

    Raises:
        UserError: no such file, not an importance file, damaged, or of a model of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"importance: expected a file, got {path}, which does not exist")
    readers = {".npz": _read_npz, ".pkl": _read_pickle}
    scores, metadata = readers.get(path.suffix, _read_safetensors)(path)
    if scores.ndim != 2 or not torch.isfinite(scores).all():
        raise UserError(f"importance: expected finite scores of shape (L, D), got {tuple(scores.shape)} in {path}")
    if model is not None:
        check_scores(scores, model)
        if metadata.get("fingerprint", fingerprint := model_fingerprint(model)) != fingerprint:
            warnings.warn(f"{path} was scored with another model ({metadata.get('model')})", stacklevel=2)
    return Importance(scores, metadata)


def check_scores(scores: Tensor, model: nn.Module) -> None:
    """Raise UserError unless `scores` is (L, D) of the dense `model`."""
    sites = find_sites(model)
    L, D = len(sites), common_width(sites)
    if scores.shape != (L, D):
        got = " x ".join(str(size) for size in scores.shape)
        raise UserError(f"importance: expected scores of the model's {L} layers x {D} neurons, got {got}")


def _read_safetensors(path: Path) -> tuple[Tensor, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or "scores" not in file.keys():  # noqa: SIM118 (safe_open is no dict)
                raise UserError(f"importance: expected a file of `save_importance`, got {path}")
            return file.get_tensor("scores"), metadata
    except (SafetensorError, OSError) as error:
        raise UserError(f"importance: expected a whole safetensors file, got {path} ({error})") from error


def _read_npz(path: Path) -> tuple[Tensor, dict[str, str]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _from_ranks(arrays["importance_sorted"], arrays["rank"]), {"data": str(path)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"importance: expected arrays importance_sorted and rank, got {path} ({error})") from error


def _read_pickle(path: Path) -> tuple[Tensor, dict[str, str]]:
    content = read_plain_pickle(path)
    try:
        if isinstance(content, Mapping):
            scores = _from_ranks(np.asarray(content["importance"], np.float32), np.asarray(content["idx"]))
        else:
            scores = torch.tensor(content, dtype=torch.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"importance: expected the original code's importance, got {path} ({error})") from error
    return scores, {"data": str(path)}


def _from_ranks(ordered: np.ndarray, rank: np.ndarray) -> Tensor:
    """Scores by neuron (L, D) from descending scores and the neuron numbers they belong to."""
    values = ordered.astype(np.float32)
    neurons = rank.astype(np.int64)
    if values.shape != neurons.shape or values.ndim != 2 or (np.sort(neurons) != np.arange(values.shape[1])).any():
        raise ValueError("the ranks are not permutations of the neurons")
    for place in range(1, values.shape[1]):
        below = np.nextafter(values[:, place - 1], np.float32(-np.inf))
        values[:, place] = np.minimum(values[:, place], below)
    scores = np.empty_like(values)
    np.put_along_axis(scores, neurons, values, axis=1)
    return torch.from_numpy(scores)


def _model_name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
