"""Predictions of a model on a split, and what they are worth."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moebert_kernels.convert.sample_loss import LABEL_KEYS
from moebert_kernels.data.columns import target_text
from moebert_kernels.data.judges import label_losses, perplexity, question_answers
from moebert_kernels.data.metrics import Metrics, compute_metrics
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.distill.teacher import forward_keys

UNREAD_SCORE = 0.0  # of an answer that is no number; their share is reported as "unread"
_SCORE = re.compile(r"[-+]?\d+(\.\d+)?")
_SCORE_TOKENS = 12  # generated at most
_METRICS = {
    "lm": ("perplexity", "loss"), "qa": ("f1", "exact_match", "f1_answerable", "f1_no_answer", "exact_match_answerable",
                                         "exact_match_no_answer"),
}  # fmt: skip


class Evaluator:
    """Judges models on one split; calling it with a model gives the task's metrics, which may be `metric_names`.

    `fingerprint` names the split.

    Text-to-text models answer classes by scoring: the class whose target has the highest probability given the row,
    end-of-sequence token included. That is what exact decoding restricted to valid answers gives. Scores have no list
    of valid answers, so they are generated greedily and read.

    Args:
        split: what is judged on.
        batch_size: sequences at once. None: 64, of running text 16.
        progress: show a bar.
    """

    def __init__(self, split: TokenizedSplit, batch_size: int | None = None, progress: bool = False) -> None:
        self.split, self.task, self.progress = split, split.task, progress
        self.batch_size = batch_size or (16 if split.task.kind == "lm" else 64)
        self.metric_names = _METRICS.get(split.task.kind, split.task.metrics)
        if split.text_to_text and split.task.kind == "regression":
            self.metric_names = (*self.metric_names, "unread")
        rows, self.references = split.rows, []
        contexts: list[str] = []
        if split.task.kind == "qa":
            contexts, self.references = list(rows["context"]), [answers["text"] for answers in rows["answers"]]
        elif split.task.has_label:
            self.references = list(rows["label"])
        facts = (self.task.kind, self.task.metrics, self.task.label_names, split.fingerprint, self.references, contexts)
        self.fingerprint = sha256(repr(facts).encode()).hexdigest()[:32]

    def __call__(self, model: nn.Module) -> Metrics:
        answers = self.predict(model)
        if self.task.kind == "lm":
            return perplexity(answers)
        if None not in answers:
            return compute_metrics(self.task, answers, self.references)
        scores = [UNREAD_SCORE if score is None else score for score in answers]
        unread = answers.count(None) / len(answers)
        return compute_metrics(self.task, scores, self.references) | {"unread": unread}

    @torch.no_grad()
    def predict(self, model: Any) -> list[Any]:
        """An answer for each row of the split; the model's mode is left as it was.

        A class number, a score (of a text-to-text model None where the answer is none) or a text. For running text, of
        each window the losses (labels,) of its labels, in nats.
        """
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        ask = self._asking(model)
        found: list[Any] = [None] * len(self.split)
        groups = self.split.by_length(self.batch_size)
        for indices in tqdm(groups, desc="evaluating", disable=not self.progress, leave=False):
            batch = {name: tensor.to(device) for name, tensor in self.split.collate(indices).items()}
            for index, answer in zip(indices, ask(batch), strict=True):
                found[index] = answer
        model.train(training)
        if self.task.kind != "qa":
            return found
        starts, ends = zip(*found, strict=True)
        return question_answers(self.task, self.split.rows, self.split.columns, starts, ends)

    def _asking(self, model: Any) -> Callable[[dict[str, Tensor]], Sequence[Any]]:
        """What gives an answer for each sequence of a batch, on its device."""
        if self.split.text_to_text:
            answer = self._class_texts if self.task.kind == "classification" else self._score_texts
            return lambda batch: answer(model, batch["input_ids"], batch["attention_mask"])
        keys = [key for key in forward_keys(model) if key not in LABEL_KEYS]

        def ask(batch: dict[str, Tensor]) -> Sequence[Any]:
            outputs = model(**{key: batch[key] for key in keys if key in batch})
            if self.task.kind == "qa":
                starts, ends = (logits.float().cpu().numpy() for logits in (outputs.start_logits, outputs.end_logits))
                return list(zip(starts, ends, strict=True))
            if self.task.kind == "lm":
                losses = label_losses(outputs.logits, batch["labels"]).cpu().numpy()
                return [row[row >= 0] for row in losses]
            logits = outputs.logits.float()
            return logits[:, 0].tolist() if self.task.kind == "regression" else logits.argmax(-1).tolist()

        return ask

    def _class_texts(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Sequence[int]:
        encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        scores = []
        for number in range(len(self.task.label_names)):
            target = self.split.tokenizer(target_text(self.task, number), return_tensors="pt")["input_ids"]
            labels = target.to(input_ids.device).repeat(len(input_ids), 1)
            logits = model(encoder_outputs=encoded, attention_mask=attention_mask, labels=labels).logits
            scores.append(logits.float().log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2)))
        return torch.stack(scores, 1).argmax(1).tolist()

    def _score_texts(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Sequence[float | None]:
        generated = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=_SCORE_TOKENS, do_sample=False,
            num_beams=1,
        )  # fmt: skip
        return [read_score(text) for text in self.split.tokenizer.batch_decode(generated, skip_special_tokens=True)]


def read_score(text: str) -> float | None:
    """The score that an answer says, or None."""
    return float(text) if _SCORE.fullmatch(text := text.strip()) else None
