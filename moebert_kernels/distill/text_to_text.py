"""Classification and regression as text to text, for encoder-decoder models such as T5.

A row reads `mrpc sentence1: ... sentence2: ...`; its target is the number of its class ("0", "1", ...) or its score
rounded to 0.2, as T5 (1910.10683) has STS-B. Classes are judged by scoring: the class whose target has the highest
probability given the row, end-of-sequence token included. That is what exact decoding restricted to valid answers
gives: no answer is outside the classes, and none depends on a search. Scores have no list of valid answers, so they are
generated greedily and read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from moebert_kernels.data.metrics import compute_metrics
from moebert_kernels.data.tasks import Task
from moebert_kernels.distill.config import Metrics
from moebert_kernels.distill.features import Features, cut_lengths, ordered_batches
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

UNREAD_SCORE = 0.0  # of an answer that is no number; their share is reported as "unread"
_SCORE = re.compile(r"[-+]?\d+(\.\d+)?")
_SCORE_TOKENS = 12  # generated at most


def target_text(task: Task, label: float) -> str:
    """The answer to a row: its class's number, or its score rounded to 0.2."""
    return f"{round(label * 5) / 5:.1f}" if task.kind == "regression" else str(label)


def read_score(text: str) -> float | None:
    """The score that an answer says, or None."""
    return float(text) if _SCORE.fullmatch(text := text.strip()) else None


def text_to_text_features(
    data: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 128, progress: bool = False
) -> Features:
    """Features of a split: rows as text, and `labels` (N of (target tokens,)); texts are cut at `max_length` tokens.

    Raises:
        UserError: the task is neither classification nor regression, or the tokenizer has no padding token.
    """
    if not task.has_label:
        raise UserError(f"task: expected classification or regression for a text-to-text model, got {task.name}")
    if tokenizer.pad_token_id is None:
        raise UserError("tokenizer: expected one with a padding token, got none")
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    whole: list[int] = []
    for row in tqdm(data, desc="tokenizing", disable=not progress, leave=False):
        source = " ".join([task.name, *(f"{column}: {row[column]}" for column in task.text_columns)])
        tokens = tokenizer(source, truncation=True, max_length=max_length)["input_ids"]
        whole += cut_lengths(tokenizer, [[source]], [tokens], max_length)
        ids.append(np.array(tokens, dtype=np.int32))
        labels.append(np.array(tokenizer(target_text(task, row["label"]))["input_ids"], dtype=np.int32))
    padding, longest = int(tokenizer.pad_token_id), max(whole, default=0)
    return Features(ids, {}, padding, token_targets={"labels": labels}, cut=len(whole), longest=longest)


class TextToTextEvaluator:
    """Judges encoder-decoder models on one split with the task's metrics. `fingerprint` names the split.

    Args:
        task, data, features: the split, its rows and what `text_to_text_features` made of them.
        tokenizer: the model's.
        batch_size: sequences at once.
        progress: show a bar.
    """

    def __init__(
        self,
        task: Task,
        data: Dataset,
        features: Features,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        progress: bool = False,
    ):
        self.task, self.features, self.tokenizer = task, features, tokenizer
        self.batch_size, self.progress = batch_size, progress
        self.references = list(data["label"])
        facts = (task.kind, task.metrics, task.label_names, features.fingerprint, self.references)
        self.fingerprint = sha256(repr(facts).encode()).hexdigest()[:32]
        texts = [target_text(task, number) for number in range(len(task.label_names))]
        self.targets = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]

    def __call__(self, model: nn.Module) -> Metrics:
        answers = self.predict(model)
        if self.task.kind == "classification":
            return compute_metrics(self.task, answers, self.references)
        scores = [UNREAD_SCORE if score is None else score for score in answers]
        return compute_metrics(self.task, scores, self.references) | {"unread": answers.count(None) / len(answers)}

    @torch.no_grad()
    def predict(self, model: nn.Module) -> list[Any]:
        """A class number for each row of the split, or its score, None where the answer is none."""
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        answers: list[Any] = [None] * len(self.features)
        answer = self._classes if self.task.kind == "classification" else self._scores
        for indices in tqdm(
            ordered_batches(self.features, self.batch_size), desc="evaluating", disable=not self.progress, leave=False
        ):
            batch = self.features.collate(indices)
            found = answer(model, batch["input_ids"].to(device), batch["attention_mask"].to(device))
            for index, value in zip(indices, found, strict=True):
                answers[index] = value
        model.train(training)
        return answers

    def _classes(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Sequence[int]:
        encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        scores = []
        for target in self.targets:
            labels = target.to(input_ids.device).repeat(len(input_ids), 1)
            logits = model(encoder_outputs=encoded, attention_mask=attention_mask, labels=labels).logits
            scores.append(logits.float().log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2)))
        return torch.stack(scores, 1).argmax(1).tolist()

    def _scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Sequence[float | None]:
        generated = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=_SCORE_TOKENS, do_sample=False,
            num_beams=1,
        )  # fmt: skip
        return [read_score(text) for text in self.tokenizer.batch_decode(generated, skip_special_tokens=True)]
