"""Sentence embeddings: a student's pooled vectors follow its teacher's, on text that needs no labels.

A sentence-transformers model is an encoder of transformers, a pooling of its last hidden states and, most often, a
division by the length. What pools is written in files beside the encoder (`modules.json`), and is read and kept here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import cached_file

from moebert_kernels.data.split import Batch
from moebert_kernels.distill.alignment import VIEWS, Distance, View, pool, vector_distance
from moebert_kernels.distill.objectives import (
    Objective,
    check_sizes,
    check_states,
    checked_pairs,
    hidden_mse,
    named_output,
    sequence_weights,
)
from moebert_kernels.distill.teacher import TeacherInfo
from moebert_kernels.errors import UserError

EMBEDDING, HIDDEN = "embedding", "hidden"
_MODULES = "modules.json"
_KEPT = (_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
_NAMES = {f"pooling_mode_{name}": name for name in ("mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")} | {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
}


@dataclass(frozen=True)
class Pooling:
    """What makes one vector of a sentence's hidden states.

    Args:
        view: "mean" or "max" over the tokens that are no padding, or "cls", the first token's.
        normalize: divide by the Euclidean length.

    Raises:
        UserError: an unknown view.
    """

    view: View = "mean"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.view not in VIEWS:
            raise UserError(f"pooling: expected one of {', '.join(VIEWS)}, got {self.view!r}")

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, T, H) hidden states, (B, T) mask with 0 at padding -> (B, H), in at least float32."""
        return self.finish(pool(hidden, mask, (self.view,))[:, 0])

    def finish(self, vectors: Tensor) -> Tensor:
        """(B, H) pooled vectors -> (B, H) embeddings."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


def read_pooling(name: str | Path) -> Pooling | None:
    """The pooling of a sentence-transformers model, a folder or a name on the Hub; None of a model that has none.

    Raises:
        UserError: modules or a pooling that this package does not know, since its embeddings would be others.
    """
    modules = _read_json(name, _MODULES)
    if modules is None:
        return None
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(f"modules.json: expected Transformer, Pooling and Normalize in {name}, got {', '.join(kinds)}")
    config = _read_json(name, f"{modules[1]['path']}/config.json") or {}
    views = config.get("pooling_mode") or [_NAMES[key] for key in _NAMES if config.get(key)] or ["mean"]
    views = [views] if isinstance(views, str) else list(views)
    if len(views) != 1 or views[0] not in VIEWS:
        raise UserError(f"pooling: expected one of {', '.join(VIEWS)} in {name}, got {', '.join(views)}")
    return Pooling(views[0], normalize="Normalize" in kinds)


def keep_pooling(source: str | Path, folder: str | Path) -> None:
    """Copy what makes `source` a sentence-transformers model beside a model that was saved in `folder`.

    `SentenceTransformer(folder)` then loads it, where `moebert_kernels.convert` was imported if it is a converted one.

    Raises:
        UserError: `source`, a folder or a name on the Hub, has no modules.json.
    """
    modules = _read_json(source, _MODULES)
    if modules is None:
        raise UserError(f"modules.json: expected a sentence-transformers model, got {source}, which has none")
    names = [*_KEPT, *(f"{module['path']}/config.json" for module in modules if module["path"])]
    for name in names:
        file = _file(source, name)
        target = Path(folder) / name
        if file is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for module in modules:  # Normalize has no settings, and its folder may be empty
        (Path(folder) / module["path"]).mkdir(parents=True, exist_ok=True)


def _file(name: str | Path, file: str) -> str | None:
    return cached_file(
        str(name), file, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip


def _read_json(name: str | Path, file: str) -> Any:
    found = _file(name, file)
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: expected JSON in {name}, got something else ({error})") from None


class EmbeddingObjective(Objective):
    """The distance of the embeddings ("embedding") and of hidden states ("hidden"), each a mean over sentences.

    Embeddings of both models are made by one pooling. Hidden states are compared by their mean squared difference over
    each sentence's valid tokens, as a mean over the pairs of layers.

    Args:
        pooling: of both models; `read_pooling` gives a sentence-transformers model's. A name is a view.
        distance: "cosine" (1 - cosine), or "mse" of the vectors. Of normalised ones this is the cosine distance times
            2 / H.
        layer_map: student hidden state -> teacher hidden state, 0 the embeddings' output. None: all of the student's,
            evenly spaced over the teacher's. An empty one leaves "hidden" out.

    Raises:
        UserError: an unknown pooling or distance.
    """

    def __init__(
        self,
        pooling: Pooling | str = Pooling(),
        distance: Distance = "cosine",
        layer_map: Mapping[int, int] | None = None,
    ):
        self.pooling = Pooling(cast(View, pooling)) if isinstance(pooling, str) else pooling
        if distance not in get_args(Distance):
            raise UserError(f"distance: expected one of {', '.join(get_args(Distance))}, got {distance!r}")
        self.distance: Distance = distance
        self.layer_map, self.pooled = layer_map, layer_map == {}
        self.terms = (EMBEDDING,) if self.pooled else (EMBEDDING, HIDDEN)

    def identity(self) -> dict[str, object]:
        return {"pooling": self.pooling.view, "normalize": self.pooling.normalize, "distance": self.distance,
                "layer_map": self.sorted_map}  # fmt: skip

    def pairs(self, student_layers: int, teacher_layers: int) -> dict[int, int]:
        return {} if self.layer_map == {} else checked_pairs(self.layer_map, student_layers, teacher_layers)

    def check(self, student: nn.Module, teacher: TeacherInfo) -> None:
        config: Any = student.config
        check_sizes(config, teacher, "vocab_size", "hidden_size")
        followed = self.pairs(config.num_hidden_layers, teacher.num_layers).values()
        check_states({*followed, teacher.num_layers}, student, teacher)
        if teacher.pooled and not self.pooled:
            raise UserError("teacher: expected states by token for the term 'hidden', got pooled ones")

    def build(self, student: nn.Module, teacher: TeacherInfo, seed: int, device: torch.device | None = None) -> None:
        super().build(student, teacher, seed, device)
        config: Any = student.config
        self._pairs = self.pairs(config.num_hidden_layers, teacher.num_layers)

    def embed(self, outputs: Any, batch: Batch) -> Tensor:
        """(B, H) embeddings of a model's outputs, which may be a teacher's kept ones."""
        pooled = getattr(outputs, "pooled", None)
        if pooled is not None:
            return self.pooling.finish(pooled[max(pooled)][:, VIEWS.index(self.pooling.view)])
        states = getattr(outputs, "hidden_states", None)
        last = named_output(outputs, "last_hidden_state") if states is None else states[-1]
        return self.pooling(last, _mask(batch))

    def __call__(self, student_outputs: Any, teacher_outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The terms {"embedding": (), "hidden": ()} of a batch, from `hidden_states` of both models."""
        ours, theirs = self.embed(student_outputs, batch), self.embed(teacher_outputs, batch)
        terms = {EMBEDDING: vector_distance(ours, theirs, self.distance)}
        if self._pairs:
            weights = sequence_weights(_mask(batch))
            states, followed = (
                named_output(outputs, "hidden_states") for outputs in (student_outputs, teacher_outputs)
            )
            distances = [hidden_mse(states[layer], followed[at], weights) for layer, at in self._pairs.items()]
            terms[HIDDEN] = torch.stack(distances).mean()
        return terms


def _mask(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask
