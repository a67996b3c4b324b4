"""Running text for causal language models: its windows, and perplexity.

A split is one stream of tokens: every document (a text file, or a row of a table) behind a token that starts it, where
the tokenizer has one. Windows of a fixed length cover it. Neighbours share `overlap` tokens, the last window is as
short as it comes out, and every token but the stream's first is a label exactly once: a shared one in the earlier
window, where it has the longer context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from moebert_kernels.distill.config import Metrics
from moebert_kernels.distill.features import Features, ordered_batches
from moebert_kernels.distill.objectives import IGNORED, next_token_labels
from moebert_kernels.distill.teacher import LABEL_KEYS, forward_keys
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_LINES_AT_ONCE = 2000  # bounds memory


def text_features(
    data: Dataset,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    overlap: int = 1,
    progress: bool = False,
) -> Features:
    """A split of running text as windows, with `labels` as transformers' causal models take them (not shifted).

    Args:
        data: rows with a `column` of text, one document each.
        length: tokens of a window.
        overlap: tokens that neighbouring windows share. With 1 windows predict disjoint tokens and the first prediction
            of each has one token of context; with more, each prediction has at least `overlap`, at the price of
            length / (length - overlap) times the work.

    Raises:
        UserError: `overlap` is not between 1 and `length` - 1, or the text has fewer than two tokens.
    """
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    parts: list[np.ndarray] = []
    for document in tqdm(data[column], desc="tokenizing", disable=not progress, leave=False):
        if start is not None:
            parts.append(np.array([start], dtype=np.int32))
        lines = iter(document.splitlines(keepends=True))
        while some := list(islice(lines, _LINES_AT_ONCE)):
            rows = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            parts += [np.array(row, dtype=np.int32) for row in rows]
    stream = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    ids, labels = _windows(stream, length, overlap)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start or 0  # masked wherever it stands
    return Features(ids, {}, padding, token_targets={"labels": labels})


def _windows(stream: np.ndarray, length: int, overlap: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if not 1 <= overlap < length:
        raise UserError(f"overlap: expected between 1 and {length - 1} tokens in windows of {length}, got {overlap}")
    if len(stream) < 2:
        raise UserError(f"data: expected text of at least two tokens, got {len(stream)}")
    ids, labels = [], []
    for first in range(0, max(len(stream) - overlap, 1), length - overlap):
        window = stream[first : first + length]
        ids.append(window)
        labels.append(window.copy())
        labels[-1][: overlap if first else 0] = IGNORED
    return ids, labels


class PerplexityEvaluator:
    """Judges causal language models on one split: {"perplexity", "loss"}, over all its labels together.

    The loss is the mean over labels in nats, the perplexity its exponential. Sums are float64. `fingerprint` names the
    split.

    Args:
        features: the split as `text_features` gives it.
        batch_size: windows at once.
        progress: show a bar.
    """

    def __init__(self, features: Features, batch_size: int = 16, progress: bool = False):
        self.features, self.batch_size, self.progress = features, batch_size, progress
        self.fingerprint = features.fingerprint

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Metrics:
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        keys = [key for key in forward_keys(model) if key not in LABEL_KEYS]
        total, count = 0.0, 0
        order: Iterable[np.ndarray] = ordered_batches(self.features, self.batch_size)
        for indices in tqdm(order, desc="evaluating", disable=not self.progress, leave=False):
            batch = {name: tensor.to(device) for name, tensor in self.features.collate(indices).items()}
            logits = model(**{key: batch[key] for key in keys if key in batch}).logits
            labels = next_token_labels(batch["labels"])
            losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
            total += float(losses.double().sum())
            count += int((labels != IGNORED).sum())
        model.train(training)
        loss = total / count
        return {"perplexity": math.exp(loss) if loss < 700.0 else math.inf, "loss": loss}
