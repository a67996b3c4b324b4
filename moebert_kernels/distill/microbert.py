"""The objective of MicroBERT-style students: features, sentence vectors and predictions of a teacher, adversarially.

MicroBERT is Zheng et al., Applied Sciences 2024, 14(14), 6171, of which we know the abstract, the contributions and the
first sentences of section 3.1, and no equation. [paper] Hidden states are distilled through sentence vectors (FAL)
after a feature mapping, the teacher's soft targets are used, and a discriminator compares outputs. [reading] Every
formula below. What makes it "guided by a mixture of experts" is the teacher; the objective does not ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn

from moebert_kernels.convert.sample_loss import at_least_float32
from moebert_kernels.data.split import Batch
from moebert_kernels.distill.alignment import VIEWS, Distance, FeatureMaps, View, pool, vector_distance
from moebert_kernels.distill.discriminator import TERM as ADVERSARIAL
from moebert_kernels.distill.discriminator import Adversary, AdversaryConfig
from moebert_kernels.distill.objectives import (
    Kind,
    Objective,
    check_classes,
    check_sizes,
    check_states,
    checked_pairs,
    hidden_mse,
    named_output,
    sequence_weights,
    soft_targets,
)
from moebert_kernels.distill.relations import Recorder, relation_heads, relation_kl
from moebert_kernels.distill.teacher import TeacherInfo
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config

TERMS = ("embedding", "hidden", "alignment", "relation", "soft", ADVERSARIAL)
_BY_TOKEN = ("embedding", "hidden")  # which pooled teacher outputs cannot give


class MicroBertObjective(Objective):
    """The chosen ones of these terms, each a mean over sequences, padding without influence:

    - "embedding", "hidden": MSE of the states after the maps, over each sequence's valid tokens; "hidden" is the mean
      over the mapped layers from 1 on.
    - "alignment": FAL, the mean over these layers and `views` of the distance of sentence vectors.
    - "relation": KL of the last mapped layer's query, key and value relations.
    - "soft": T^2 KL(teacher || student) of the predictions at temperature T; for regression their MSE.
    - "adversarial": -log D of the student's outputs; see `Adversary`.

    Args:
        kind: "classification" or "regression".
        terms: which of them.
        layer_map: student state -> teacher state. None: g(j) = round(j N / M).
        project: True: learned maps, also where hidden sizes agree. False: none, for models of one hidden size.
        views: of the sentence vectors.
        distance: "mse" or "cosine" (1 - cosine, which does not feel the scale).
        pool_first: pool before mapping, so that a map sees B vectors rather than B T; max pooling then compares in the
            student's space, taken to the teacher's.
        temperature: T.
        relation_heads, relation_layer: heads of the relations, and the teacher's layer, from 1. None: see
            `relation_heads`; that of the layer map.
        adversary: settings of the discriminator.

    Attributes:
        first_maps: (student state, teacher state) -> the weight that their map starts from; others start as
            `FeatureMaps` says.

    Raises:
        UserError: an unknown name, no terms, or a number out of its range.
    """

    def __init__(
        self,
        kind: Kind,
        terms: Sequence[str] = ("embedding", "hidden", "alignment", "soft", ADVERSARIAL),
        *,
        layer_map: Mapping[int, int] | None = None,
        project: bool = True,
        views: Sequence[View] = VIEWS,
        distance: Distance = "mse",
        pool_first: bool = False,
        temperature: float = 2.0,
        relation_heads: int | None = None,
        relation_layer: int | None = None,
        adversary: AdversaryConfig | None = None,
    ):
        for name, values, choices in (
            ("kind", (kind,), ("classification", "regression")),
            ("terms", terms, TERMS),
            ("views", views, VIEWS),
            ("distance", (distance,), get_args(Distance)),
        ):
            wrong = [value for value in values if value not in choices]
            if wrong or not values or len(set(values)) < len(values):
                got = repr(wrong[0]) if wrong else ", ".join(values) or "none"
                raise UserError(f"{name}: expected some of {', '.join(choices)}, each once, got {got}")
        if layer_map is not None and not layer_map:
            raise UserError("layer_map: expected at least one pair of layers, got none")
        if not 0.0 < temperature < float("inf"):
            raise UserError(f"temperature: expected a number above 0, got {temperature!r}")
        self.kind, self.terms, self.views, self.distance = kind, tuple(terms), tuple(views), distance
        self.layer_map, self.pooled = layer_map, not {*_BY_TOKEN, "relation"} & set(terms)
        self.project, self.pool_first, self.temperature = project, pool_first, temperature
        self.adversary_config = adversary or AdversaryConfig()
        self._wanted_heads, self._wanted_layer = relation_heads, relation_layer
        self._sees = self.adversary_config.input_for(kind) if ADVERSARIAL in terms else ""
        self.first_maps: dict[tuple[int, int], Tensor] = {}
        self._recorder: Recorder | None = None
        self._heads = 0

    def identity(self) -> dict[str, object]:
        settings: dict[str, object] = {
            "kind": self.kind, "terms": self.terms, "layer_map": self.sorted_map, "project": self.project,
            "views": self.views, "distance": self.distance, "pool_first": self.pool_first,
            "temperature": self.temperature, "relation_heads": self._wanted_heads, "relation_layer": self._wanted_layer,
        }  # fmt: skip
        return settings | (self.adversary_config.identity() if ADVERSARIAL in self.terms else {})

    def pairs(self, student_layers: int, teacher_layers: int) -> dict[int, int]:
        """The layer map for a student and a teacher of so many layers, as far as the terms use it.

        Raises:
            UserError: it names a state that one of the two does not have, or lacks one that a term needs.
        """
        pairs = checked_pairs(self.layer_map, student_layers, teacher_layers)
        last = f"the student's last layer, {student_layers}"
        for term, needed, found in (
            ("embedding", "the embeddings' output, 0", 0 in pairs),
            ("hidden", "a layer of the student", any(pairs)),
            ("alignment", "a layer of the student", any(pairs)),
            ("relation", last, student_layers in pairs),
            (ADVERSARIAL, last, self._sees == "logits" or student_layers in pairs),
        ):
            if term in self.terms and not found:
                raise UserError(f"layer_map: expected {needed}, for the term {term!r}, got {sorted(pairs)}")
        used = set()
        if "embedding" in self.terms:
            used.add(0)
        if {"hidden", "alignment"} & set(self.terms):
            used |= set(pairs) - {0}
        if self._sees in ("pooled", "both"):
            used.add(student_layers)
        return {layer: pairs[layer] for layer in sorted(used)}

    def check(self, student: nn.Module, teacher: TeacherInfo) -> None:
        outer: Any = student.config
        config = outer.get_text_config()
        needed = set(self.pairs(config.num_hidden_layers, teacher.num_layers).values())
        check_sizes(outer, teacher, "vocab_size", "num_labels")
        if self.kind == "classification":
            check_classes(outer, teacher)
        if needed and not self.project and config.hidden_size != teacher.hidden_size:
            raise UserError(
                f"project: expected True for a student of hidden_size {config.hidden_size} and a teacher of"
                f" {teacher.hidden_size}, got False"
            )
        check_states(needed, student, teacher)
        by_token = [term for term in _BY_TOKEN if term in self.terms]
        if teacher.pooled and by_token:
            raise UserError(f"teacher: expected states by token for the term {by_token[0]!r}, got pooled ones")
        if teacher.stored_as is not None and "relation" in self.terms:
            raise UserError("teacher: expected a model for the term 'relation', got cached outputs, which lack queries")
        if getattr(moe_config(outer), "route_padding", False):
            raise UserError("model: expected a student that skips padding, got a model that routes it")

    def build(self, student: nn.Module, teacher: TeacherInfo, seed: int, device: torch.device | None = None) -> None:
        outer: Any = student.config
        config = outer.get_text_config()
        device = next(student.parameters()).device if device is None else device
        self._pairs = self.pairs(config.num_hidden_layers, teacher.num_layers)
        self._last = config.num_hidden_layers
        self.maps = None
        if self.project and self._pairs:
            first = {j: self.first_maps[j, g] for j, g in self._pairs.items() if (j, g) in self.first_maps}
            self.maps = FeatureMaps(self._pairs, config.hidden_size, teacher.hidden_size, seed, first).to(device)
        self.adversary = None
        if self._sees:
            size = (self._sees != "pooled") * teacher.num_labels + (self._sees != "logits") * teacher.hidden_size
            self.adversary = Adversary(self.adversary_config, size, seed, device)
        if "relation" in self.terms:
            pairs = checked_pairs(self.layer_map, config.num_hidden_layers, teacher.num_layers)
            self.relation_layer = pairs[self._last] if self._wanted_layer is None else self._wanted_layer
            self._recorder = Recorder(student, self._last)
            heads = teacher.num_attention_heads
            self._heads = relation_heads(config, heads, teacher.hidden_size, self._wanted_heads)

    def named_maps(self, state: Mapping[str, Tensor]) -> dict[tuple[int, int], Tensor]:
        """The weights in a state dict of `maps` by (student state, teacher state), for another's `first_maps`."""
        return {(j, g): state[f"layers.{j}.weight"] for j, g in self._pairs.items()}

    def recording(self) -> AbstractContextManager[Any]:
        return self._recorder if self._recorder is not None else nullcontext()

    def __call__(self, student_outputs: Any, teacher_outputs: Any, batch: Batch) -> dict[str, Tensor]:
        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        weights = sequence_weights(mask)
        terms: dict[str, Tensor] = {}
        states = named_output(student_outputs, "hidden_states")
        mapped: dict[int, Tensor] = {}

        def by_token(layer: int) -> Tensor:
            if layer not in mapped:
                mapped[layer] = self._map(layer, states[layer])
            return mapped[layer]

        layers = [layer for layer in self._pairs if layer]
        if "embedding" in self.terms:
            terms["embedding"] = hidden_mse(by_token(0), self._teacher_state(teacher_outputs, 0), weights)
        if "hidden" in self.terms:
            distances = [hidden_mse(by_token(j), self._teacher_state(teacher_outputs, j), weights) for j in layers]
            terms["hidden"] = torch.stack(distances).mean()
        if "alignment" in self.terms:
            distances = []
            for layer in layers:
                if self.pool_first:
                    ours = self._map(layer, pool(states[layer], mask, self.views))
                else:
                    ours = pool(by_token(layer), mask, self.views)
                theirs = self._teacher_vectors(teacher_outputs, layer, mask, self.views)
                distances.append(vector_distance(ours, theirs, self.distance))
            terms["alignment"] = torch.stack(distances).mean()
        if self._recorder is not None:
            theirs = teacher_outputs.relation
            terms["relation"] = relation_kl(self._recorder.take(), theirs, mask, self._heads)
        logits, teacher_logits = (named_output(outputs, "logits") for outputs in (student_outputs, teacher_outputs))
        if "soft" in self.terms:
            terms["soft"] = soft_targets(logits, teacher_logits, self.temperature, self.kind)
        if self.adversary is not None:
            mean = self._map(self._last, pool(states[self._last], mask, ("mean",))[:, 0]) if self._pairs else None
            ours = self._seen(logits, mean)
            pooled = self._sees != "logits"
            vectors = self._teacher_vectors(teacher_outputs, self._last, mask, ("mean",))[:, 0] if pooled else None
            terms[ADVERSARIAL] = self.adversary(ours, self._seen(teacher_logits, vectors))
        return terms

    def _map(self, layer: int, features: Tensor) -> Tensor:
        return features if self.maps is None else self.maps(layer, features)

    def _teacher_state(self, outputs: Any, layer: int) -> Tensor:
        state = named_output(outputs, "hidden_states")[self._pairs[layer]]
        if state is None:
            raise UserError(f"hidden_states: expected the teacher's state {self._pairs[layer]}, got none")
        return state

    def _teacher_vectors(self, outputs: Any, layer: int, mask: Tensor, views: Sequence[View]) -> Tensor:
        pooled = getattr(outputs, "pooled", None)
        if pooled is None:
            return pool(self._teacher_state(outputs, layer), mask, views)
        return pooled[self._pairs[layer]][:, [VIEWS.index(view) for view in views]]

    def _seen(self, logits: Tensor, vectors: Tensor | None) -> Tensor:
        """(B, n) what the discriminator sees of an output."""
        probabilities = at_least_float32(logits).softmax(-1)
        if self._sees == "logits" or vectors is None:
            return probabilities
        return vectors if self._sees == "pooled" else torch.cat([probabilities, vectors], -1)
