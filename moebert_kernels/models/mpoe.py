"""T5, GPT-2, BERT and their families with experts in the place of each feed-forward, for transformers' Auto classes.

The classes are transformers' own with another feed-forward: `MPOET5ForConditionalGeneration` is a
`T5ForConditionalGeneration`. With a loss, `outputs.loss` holds the balance loss too; what `outputs.balance_loss` is
says `moebert_kernels.models.outputs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from moebert_kernels.models.checkpoint import SavedModel
from moebert_kernels.models.mpoe_configuration import CONFIGS
from moebert_kernels.models.mpoe_layers import install
from moebert_kernels.models.outputs import with_balance_loss
from moebert_kernels.nn import MPOExperts, SharedFold, shared_fold
from moebert_kernels.nn.context import current, entered
from moebert_kernels.nn.hash_router import resize_tables

_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTextEncoding",
    "AutoModelForTokenClassification",
)


class MPOEMixin(SavedModel):
    """What every MPOE model adds to a model of transformers."""

    config: Any
    _converter = "convert_to_mpoe"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def post_init(self) -> None:
        install(self, self.config)
        super().post_init()  # type: ignore[misc]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the hash tables follow, and new tokens get random experts."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        resize_tables(self, embeddings.num_embeddings)  # type: ignore[arg-type]
        return embeddings

    def shared_fold(self) -> AbstractContextManager[SharedFold]:
        """Fold the experts' weights once for an optimizer step; see `moebert_kernels.nn.shared_fold`."""
        return shared_fold(self)  # type: ignore[arg-type]

    def fold(self, hot_experts: int | None = None) -> None:
        """Fold all experts' weights for inference, or those of `hot_experts` per layer; see `MPOExperts.fold`."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, MPOExperts):
                module.fold(hot_experts)

    def unfold(self) -> None:
        """Drop folded weights."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, MPOExperts):
                module.unfold()


def _with_balance_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward with the balance loss in its output, and in its loss."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        losses: list[Tensor] = []
        with entered(current()._replace(losses=losses)):
            output = forward(self, *args, return_dict=True, **kwargs)
        output = with_balance_loss(output, losses, self.config.load_balance)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    return wrapped


def _define(dense: type[PreTrainedModel], config: Any) -> Any:
    name = f"MPOE{dense.__name__}"
    return type(
        name,
        (MPOEMixin, dense),
        {
            "__doc__": f"{dense.__name__} with experts in the place of each feed-forward.",
            "__module__": __name__,
            "__annotations__": {"config": config},
            "config_class": config,
            "forward": _with_balance_loss(dense.forward),
        },
    )


def _register() -> dict[str, Any]:
    """Define the MPOE form of every head that transformers has for the families, and tell the Auto classes."""
    defined: dict[str, Any] = {}
    for dense_config, config in CONFIGS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in (getattr(transformers, name) for name in _AUTO_CLASSES):
            if dense_config not in auto._model_mapping:
                continue
            dense = auto._model_mapping[dense_config]
            name = f"MPOE{dense.__name__}"
            if name not in defined:
                defined[name] = _define(dense, config)
            auto.register(config, defined[name], exist_ok=True)
    return defined


CLASSES = _register()  # by name
globals().update(CLASSES)  # where pickle looks for them
