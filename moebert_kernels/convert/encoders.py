"""What the converters need to know of a dense encoder: where its feed-forward layers are and which family it is.

A BERT-style layer is `intermediate.dense` (D, H), an activation, `output.dense` (H, D) and `output.LayerNorm`. The same
names hold for every model family listed in `STYLES`.
"""

from typing import Any, NamedTuple

from torch import nn

from moebert_kernels.errors import UserError

# model_type -> the position ids and heads that the converted model takes over
STYLES = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta"}


class DenseFFN(NamedTuple):
    """The two linear layers of one dense feed-forward layer: w1 (D, H) and w2 (H, D)."""

    first: nn.Linear
    second: nn.Linear


def dense_ffns(model: nn.Module) -> list[DenseFFN]:
    """Return the dense feed-forward layers of a BERT-style encoder, first layer first.

    Raises:
        UserError: `model` is a MoE already, or has no BERT-style layers.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "moebert":
        raise UserError(f"model: expected a dense encoder, got {type(model).__name__}, which is a MoE already")
    base: Any = getattr(model, "base_model", model)
    layers: Any = getattr(getattr(base, "encoder", None), "layer", None)
    try:
        ffns = [DenseFFN(layer.intermediate.dense, layer.output.dense) for layer in layers]
    except (TypeError, AttributeError):
        ffns = []
    if not ffns:
        raise UserError(f"model: expected a BERT-style encoder ({', '.join(STYLES)}), got {type(model).__name__}")
    return ffns


def encoder_style(model: nn.Module) -> str:
    """Return "bert" or "roberta"; raise UserError for a family that has no MoE model here."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in STYLES:
        raise UserError(f"model: expected one of the families {', '.join(STYLES)}, got {model_type!r}")
    return STYLES[model_type]
