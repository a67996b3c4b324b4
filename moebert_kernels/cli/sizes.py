"""What `moebert importance` and `moebert convert` know and say of what is there and of what they made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moebert_kernels.errors import UserError


class Sizes(NamedTuple):
    """Neurons of a dense model's feed-forwards, as text, and all its parameters."""

    width: str
    parameters: int


def sizes(dense: Any) -> Sizes:
    """The sizes of a dense model."""
    from moebert_kernels.convert import parameter_counts
    from moebert_kernels.convert.sites import find_sites

    widths = sorted({site.weights().w2.shape[1] for site in find_sites(dense)})
    return Sizes(" and ".join(f"{width:,}" for width in widths), parameter_counts(dense)["total_parameters"])


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
    from moebert_kernels.distill.identity import check_same

    found = load_importance(path).metadata
    saved = json.loads(found.get("call", "{}"))
    saved |= {"model weights": found.get("fingerprint"), "texts and labels": found.get("features")}
    texts = features.fingerprint
    facts = {**facts, "model weights": model_fingerprint(model), "texts and labels": texts}
    check_same(saved, facts, f"output: expected a new file, got {path} with scores of", " (--force replaces it)")


def say_scores(file: Path) -> None:
    """Say how the importance is spread: what the neurons hold that an expert has by default."""
    from moebert_kernels.convert import default_split, importance_kept, load_importance

    scores, about = load_importance(file)
    (L, D), width = scores.shape, default_split(scores.shape[1])[0]
    print(
        f"{about['samples']} examples of {about['split']}: scores of {L} layers x {D} neurons; the most important"
        f" {width} of a layer hold {importance_kept(scores, 1, width, width)}"
    )


def say_sizes(model: Any, before: Sizes | None = None) -> None:
    """Say how many neurons and parameters a conversion left of those that were there before, if that is known."""
    from moebert_kernels.convert import mpoe_report, parameter_counts
    from moebert_kernels.layers import moe_config
    from moebert_kernels.layers.config import SPLITS

    config, counts = moe_config(model.config), parameter_counts(model)
    of_dense = "" if before is None else f" of the dense layer's {before.width}"
    if config is None:
        print(f"{sizes(model).width} neurons{of_dense}")
    elif config.experts in SPLITS:
        shared = config.num_shared_neurons
        experts = f"{config.num_experts} experts of {config.expert_size:,} neurons{of_dense}"
        print(experts if shared is None else f"{experts}, {shared:,} of them in every expert")
    else:
        print(mpoe_report(model))
    dense = "" if before is None else f"; the dense model has {before.parameters:,}"
    print(f"parameters: {counts['total_parameters']:,}, of which a token meets {counts['active_parameters']:,}{dense}")


def say_kept(scores: Any, model: Any) -> None:
    """Say how much of the importance `scores`, None where none were given, a token still meets."""
    from moebert_kernels.convert import importance_kept
    from moebert_kernels.convert.sites import common_width, find_sites
    from moebert_kernels.layers import moe_config

    config = moe_config(model.config)
    if config is not None and config.experts != "split":  # they hold all neurons
        return
    if scores is None:
        print("importance kept: not known, as no --importance was given and neurons were ranked at random")
    elif config is None:
        width = common_width(find_sites(model))
        print(f"importance kept by the model: {importance_kept(scores, 1, width, width)}")
    else:
        kept = importance_kept(scores, config.num_experts, config.expert_size or 0, config.num_shared_neurons or 0)
        print(f"importance kept by an expert: {kept}")
