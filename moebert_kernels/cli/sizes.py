"""What `moebert importance` and `moebert convert` know and say of what is there and of what they made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moebert_kernels.errors import UserError


def holds_scores(file: Path) -> bool:
    """Whether `moebert importance` wrote a file."""
    from moebert_kernels.convert import load_importance

    try:
        return "fingerprint" in load_importance(file).metadata
    except UserError:
        return False


def check_same_scores(path: Path, model: Any, facts: dict[str, Any], features: Any) -> None:
    """Raise UserError unless the file holds the scores that were asked for."""
    from moebert_kernels.convert import load_importance, model_fingerprint
    from moebert_kernels.distill.identity import changed, described

    found = load_importance(path).metadata
    saved = json.loads(found.get("call", "{}"))
    saved |= {"model weights": found.get("fingerprint"), "texts and labels": found.get("features")}
    texts = features.fingerprint
    changes = changed(saved, {**facts, "model weights": model_fingerprint(model), "texts and labels": texts})
    if changes:
        raise UserError(
            f"output: expected a new file, got {path} with scores of other {described(changes)} (--force replaces it)"
        )


def say_scores(file: Path) -> None:
    """Say how the importance is spread: what the neurons hold that an expert has by default."""
    from moebert_kernels.convert import default_split, importance_kept, load_importance

    scores, about = load_importance(file)
    (L, D), width = scores.shape, default_split(scores.shape[1])[0]
    print(
        f"{about['samples']} examples of {about['split']}: scores of {L} layers x {D} neurons; the most important"
        f" {width} of a layer hold {importance_kept(scores, 1, width, width)}"
    )


def say_sizes(converted: Any, dense: Any = None) -> None:
    """Say how many neurons and parameters a conversion left."""
    from moebert_kernels.convert import parameter_counts

    config, counts = converted.config, parameter_counts(converted)
    of_dense = "" if dense is None else f" of the dense layer's {dense.config.intermediate_size:,}"
    if hasattr(config, "expert_size"):
        print(
            f"{config.num_experts} experts of {config.expert_size:,} neurons{of_dense}, {config.shared:,} of them in"
            " every expert"
        )
    else:
        print(f"the most important {config.intermediate_size:,} neurons{of_dense}")
    before = "" if dense is None else f"; the dense model has {parameter_counts(dense)['total_parameters']:,}"
    print(f"parameters: {counts['total_parameters']:,}, of which a token meets {counts['active_parameters']:,}{before}")


def say_kept(scores: Any, config: Any) -> None:
    """Say how much of the importance `scores`, None where none were given, a token still meets."""
    from moebert_kernels.convert import importance_kept

    if scores is None:
        print("importance kept: not known, as no --importance was given and neurons were ranked at random")
        return
    if hasattr(config, "expert_size"):
        kept = importance_kept(scores, config.num_experts, config.expert_size, config.shared)
    else:
        kept = importance_kept(scores, 1, config.intermediate_size, config.intermediate_size)
    print(f"importance kept by {'an expert' if hasattr(config, 'expert_size') else 'the model'}: {kept}")
