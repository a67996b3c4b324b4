"""Importance of neurons on a tokenised split, as a file; an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from moebert_kernels.convert import importance_scores, model_fingerprint, save_importance
from moebert_kernels.data.split import Batch, TokenizedSplit

_SAVE_EVERY_S = 30.0


def score_split(
    model: nn.Module,
    texts: TokenizedSplit,
    path: str | Path,
    *,
    batch_size: int = 32,
    data: str,
    split: str,
    task: str,
    call: Mapping[str, Any] | None = None,
) -> Tensor:
    """Score every FFN neuron on all examples, show a bar, and write `path`.

    Totals so far are kept in `<path>.unfinished`, at least every 30 s and when the run is interrupted.

    Args:
        model: the fine-tuned dense model.
        texts: the split.
        data, split, task: kept in the file; see `save_importance`.
        call: further JSON-able facts of what was asked for, kept as JSON under this name.

    Returns:
        (L, D) float32.

    Raises:
        UserError: as `importance_scores` and `save_importance`.
    """
    path = Path(path)
    order = texts.by_length(batch_size)
    identity = f"{model_fingerprint(model)} {texts.fingerprint} {batch_size}"
    unfinished = path.with_name(path.name + ".unfinished")
    done, start = _load(unfinished, identity)
    latest: dict[str, Any] = {"done": done, "totals": start, "saved": time.monotonic()}

    def on_batch(samples: int, totals: Tensor) -> None:
        latest["done"] += 1
        latest["totals"] = totals.clone()
        if time.monotonic() - latest["saved"] > _SAVE_EVERY_S:
            _save(unfinished, identity, latest)

    def batches() -> Iterator[Batch]:
        for indices in tqdm(order[done:], initial=done, total=len(order), desc="importance"):
            yield texts.collate(indices)

    try:
        scores = importance_scores(model, batches(), start=start, on_batch=on_batch)
    except KeyboardInterrupt:
        if latest["totals"] is not None:
            _save(unfinished, identity, latest)
        raise
    facts = {"samples": len(texts), "features": texts.fingerprint, "call": dict(call or {})}
    save_importance(path, scores, model=model, data=data, split=split, task=task, **facts)
    unfinished.unlink(missing_ok=True)
    return scores


def _save(path: Path, identity: str, latest: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(
        {"totals": latest["totals"]}, partial, metadata={"identity": identity, "done": json.dumps(latest["done"])}
    )
    os.replace(partial, path)
    latest["saved"] = time.monotonic()


def _load(path: Path, identity: str) -> tuple[int, Tensor | None]:
    """Batches that are done and their totals; nothing of another model, other data or a damaged file."""
    if not path.exists():
        return 0, None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") == identity:
                return int(metadata["done"]), file.get_tensor("totals").to(torch.float64)
    except (SafetensorError, OSError, KeyError, ValueError):
        pass
    return 0, None
