"""Importance of neurons on a tokenised split, as a file; an interrupted run goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from moebert_kernels.convert import importance_scores, model_fingerprint, save_importance
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.files import write_tensors

_SAVE_EVERY_S = 30.0


def score_split(
    model: nn.Module, texts: TokenizedSplit, path: str | Path, *, batch_size: int = 32, data: str, split: str,
    task: str, call: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
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
    unfinished = Path(path).with_name(f"{Path(path).name}.unfinished")
    order = texts.by_length(batch_size)
    identity = f"{model_fingerprint(model)} {texts.fingerprint} {batch_size}"
    done, start = _read(unfinished, identity)
    first, so_far, saved = done, start, time.monotonic()

    def keep() -> None:
        if so_far is not None:
            write_tensors(unfinished, {"totals": so_far}, {"identity": identity, "done": str(done)})

    def on_batch(samples: int, totals: Tensor) -> None:
        nonlocal done, so_far, saved
        done, so_far = done + 1, totals.clone()
        if time.monotonic() - saved > _SAVE_EVERY_S:
            keep()
            saved = time.monotonic()

    bar = tqdm(order[first:], initial=first, total=len(order), desc="importance")
    try:
        scores = importance_scores(model, map(texts.collate, bar), start=start, on_batch=on_batch)
    except KeyboardInterrupt:
        keep()
        raise
    facts = {"samples": len(texts), "features": texts.fingerprint, "call": dict(call or {})}
    save_importance(path, scores, model=model, data=data, split=split, task=task, **facts)
    unfinished.unlink(missing_ok=True)
    return scores


def _read(path: Path, identity: str) -> tuple[int, Tensor | None]:
    """Batches that are done and their totals; nothing of another model, other data or a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("identity") == identity:
                return int(facts["done"]), file.get_tensor("totals").to(torch.float64)
    except (SafetensorError, OSError, KeyError, ValueError):
        pass
    return 0, None
