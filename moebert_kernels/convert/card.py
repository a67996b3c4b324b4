"""The model card: the README.md of a saved model, with the code that loads it and the known numbers."""

from __future__ import annotations

import functools
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from moebert_kernels.layers import MoEConfig, moe_config, moe_layers
from moebert_kernels.nn.context import derived_class

NAME = "README.md"
_MARK = re.compile(r"\n<!-- written by moebert_kernels ([0-9a-f]{8}) -->\n\Z")
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTextEncoding",
    "AutoModelForTokenClassification",
    "AutoModel",
)


@functools.cache
def carded_class(base: Any) -> type:
    """The class of a converted model whose `save_pretrained` writes its card too; a prepared one writes its own."""

    @functools.wraps(base.save_pretrained)
    def save_pretrained(self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        saved = base.save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process and moe_config(self.config) is not None:
            write_card(self, save_directory)
        return saved

    return derived_class(carded_class, base, (base,), {"save_pretrained": save_pretrained})


def save_with_card(model: Any, folder: str | os.PathLike[str], *card: Any, **options: Any) -> None:
    """`save_pretrained`, then `write_card` with the other arguments."""
    model.save_pretrained(folder)
    write_card(model, folder, *card, **options)


def write_card(
    model: Any,
    folder: str | os.PathLike[str],
    scores: Mapping[str, float] | None = None,
    previous: str | os.PathLike[str] | None = None,
) -> None:
    """Write the card of a transformers model, dense, converted or prepared, unless the folder has one of a person's.

    Args:
        folder: where the model is saved.
        scores: of the model on validation data, by the names of the metrics.
        previous: the folder that `folder` will replace: a card that a person wrote there is taken over.
    """
    own, kept = Path(folder) / NAME, None if previous is None else _persons(Path(previous) / NAME)
    if _persons(own) is not None:
        return
    if kept is not None:
        own.write_text(kept, encoding="utf-8")
        return
    text = card(model, scores)
    own.write_text(f"{text}\n<!-- written by moebert_kernels {_digest(text)} -->\n", encoding="utf-8")


def card(model: Any, scores: Mapping[str, float] | None = None) -> str:
    """The text of the card; see `write_card`."""
    config, prepared = moe_config(model.config), getattr(model, "prepared", None)
    auto, kind = _loaded_by(model), type(model).__name__.removeprefix("FSDP")
    package = "convert" if prepared is None else "serve"
    is_ours = config is not None or prepared is not None
    loads = [f"import moebert_kernels.{package}  # makes the Auto classes know it"] if is_ours else []
    loads += [f'model = {auto}.from_pretrained("path/to/this/folder")']
    rows = {"class": kind, **({} if config is None else _moe_rows(model, config))}
    rows |= _parameter_rows(model) if prepared is None else _prepared_rows(prepared)
    rows |= {f"{name} on validation data": f"{value:.4f}" for name, value in (scores or {}).items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    what = "A Transformer"
    if config is not None:
        what += f" whose feed-forward layers are mixtures of {config.num_experts} experts"
    if prepared is not None:
        what += f"{'' if config is None else ','} in {prepared.dtype}, for inference on a CPU"
    what += ", made with `moebert_kernels`" + (
        ", which has to be installed and imported to load it: without the import its layers get random weights."
        if is_ours
        else "."
    )
    return (
        "---\nlibrary_name: transformers\ntags:\n- moebert_kernels\n---\n\n"
        f"# {kind}\n\n{what}\n\n"
        f"```python\nfrom transformers import {auto}\n" + "\n".join(loads) + "\n```\n\n"
        f"| what | value |\n|---|---|\n{table}\n"
    )


def parameter_counts(model: Any) -> dict[str, int]:
    """Count all parameters of a model, and those that one token uses: all but the experts that it does not go to."""
    total = sum(parameter.numel() for parameter in model.parameters())
    config = moe_config(model.config)
    E, top_k = (1, 1) if config is None else (config.num_experts, config.experts_per_token)
    # what all experts have together, one norm or bias or a central tensor, is met by each token
    own = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.ndim > 1 and not name.endswith(".central")
    )
    return {"total_parameters": total, "active_parameters": total - own * (E - top_k) // E}


def _moe_rows(model: Any, config: MoEConfig) -> dict[str, Any]:
    layers = moe_layers(model)
    w2: Any = getattr(layers[0].experts, "w2", None)  # none where it is packed
    rows = {
        "layers with experts": len(layers),
        "experts of a layer": f"{config.num_experts}, of which a token meets {config.experts_per_token}",
        **({} if w2 is None else {"neurons of an expert": w2.shape[-1]}),
        "router": config.router,
    }
    if config.tasks:
        rows["tasks"] = ", ".join(config.tasks)
    return rows


def _parameter_rows(model: nn.Module) -> dict[str, str]:
    total, active = parameter_counts(model).values()
    rows = {"parameters": f"{total:,}"}
    return rows if active == total else rows | {"parameters that a token meets": f"{active:,}"}


def _prepared_rows(prepared: Any) -> dict[str, str]:
    scales = prepared.token_scales
    calibrated = "no" if scales is None else f"yes; a scale for each token in {len(scales)} products"
    return {"form": prepared.dtype} | ({"calibrated": calibrated} if prepared.dtype == "int8" else {})


def _loaded_by(model: Any) -> str:
    """The Auto class that loads a model of this class."""
    for name in _AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(model.config) in mapping:
            classes = mapping[type(model.config)]
            if isinstance(model, classes):
                return name
    return type(model).__name__


def _persons(file: Path) -> str | None:
    """What a person wrote, or changed, in a card; None where there is none, or one of ours as it was."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "" if file.exists() else None
    found = _MARK.search(text)
    return None if found and found[1] == _digest(text[: found.start()]) else text


def _digest(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
