"""Models and tokenizers by name for a task, and what is wrong with them in one line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

import moebert_kernels.convert  # transformers loads converted models
import moebert_kernels.serve  # noqa: F401  and prepared ones
from moebert_kernels.convert.batches import longest_input
from moebert_kernels.data.tasks import TASKS, Task, label_order
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config, set_task
from moebert_kernels.serve.config import METHOD as PREPARED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NAMED = 20  # classes that a message names
_LENGTHS = "moebert_lengths"  # in tokenizer_config.json: by task


def resolve_model(name: str | Path) -> str:
    """The folder of a model: of a training run's output, its best or else its final model."""
    path = Path(name)
    if not path.exists() and (path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) > 2):
        raise UserError(f"model: expected a folder or a model's name on the Hub, got {name}, which does not exist")
    if path.is_file():
        raise UserError(f"model: expected a folder or a model's name on the Hub, got the file {name}")
    if path.is_dir() and not (path / "config.json").exists():
        inside = [path / folder for folder in ("best", "final") if (path / folder / "config.json").exists()]
        if not inside:
            raise UserError(f"model: expected a folder with a config.json, got {name}, which has none")
        return str(inside[0])
    return str(path) if path.is_dir() else str(name)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars for saving and loading."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _reading(what: str, given: str | Path) -> Iterator[str]:
    """The folder of a model; errors of loading it as a UserError of one line, and none of transformers' reports."""
    name = resolve_model(given)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with quiet_transformers():
            yield name
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300] or repr(error)
        damaged = _damaged_file(Path(name))
        if damaged is not None:
            raise UserError(f"{what}: expected a whole file, got a damaged {damaged} ({reason})") from error
        raise UserError(f"{what}: expected a readable one, got {name} ({reason})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _damaged_file(folder: Path) -> Path | None:
    """The first file of a model's folder that is not what its name says; libraries name the folder at best."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
        except (OSError, ValueError, SafetensorError):
            return file
    return None


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    with _reading("tokenizer", name) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    # transformers makes an empty tokenizer of a folder that has a config but no tokenizer files
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"tokenizer: expected its files beside the model, got none in {folder}")
    return tokenizer


def trained_lengths(tokenizer: PreTrainedTokenizerBase, task: str) -> dict[str, int]:
    """`max_length` and `doc_stride`, as far as known, that the model beside this tokenizer was trained with on a task.

    Of a model that was trained on one other task alone, those of that task.
    """
    kept = tokenizer.init_kwargs.get(_LENGTHS, {})
    return kept.get(task) or (dict(*kept.values()) if len(kept) == 1 else {})


def keep_lengths(tokenizer: PreTrainedTokenizerBase, task: str, max_length: int, doc_stride: int | None = None) -> None:
    """Have the tokenizer say, wherever it is saved, how texts of a task were cut in training."""
    lengths = {"max_length": max_length} | ({} if doc_stride is None else {"doc_stride": doc_stride})
    tokenizer.init_kwargs[_LENGTHS] = {**tokenizer.init_kwargs.get(_LENGTHS, {}), task: lengths}


def load_config(name: str | Path) -> Any:
    """The configuration of a model.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    with _reading("model", name) as folder:
        return AutoConfig.from_pretrained(folder)


def is_moe(config: Any) -> bool:
    """Whether a model of this configuration has experts."""
    return moe_config(config) is not None


def is_prepared(config: Any) -> bool:
    """Whether a model of this configuration was made for inference by `moebert_kernels.serve.prepare`."""
    found = getattr(config, "quantization_config", None)
    return getattr(found, "quant_method", found.get("quant_method") if isinstance(found, dict) else None) == PREPARED


def load_model(name: str | Path, task: Task, *, new_head: bool = False) -> Any:
    """A model with a head for the task.

    Args:
        new_head: for fine-tuning: make the head if the checkpoint has none, and name the classes as the task does.
            False: the checkpoint must hold every weight.

    Raises:
        UserError: no such model, a damaged one, one without the task's head, with a head for several classes of a text
            at once, or with other classes.

    Warns of a model that does not name its classes, of which the order of the task's is then taken.
    """
    name = resolve_model(name)
    config = load_config(name)
    moe = moe_config(config)
    if moe is not None and moe.is_task_routed:
        moe.task_id(task.name)  # which refuses others
        check_labels(task, config)
        model = load_as_saved(name)
        set_task(model, task.name)
        return model
    if task.kind == "lm" or config.is_encoder_decoder:
        return _load_generator(name, task, config, new_head)
    auto = AutoModelForQuestionAnswering if task.kind == "qa" else AutoModelForSequenceClassification
    architectures = config.architectures or [""]
    has_head = architectures[0].endswith(("ForQuestionAnswering", "ForSequenceClassification"))
    if has_head and architectures[0].endswith("ForQuestionAnswering") != (task.kind == "qa"):
        raise UserError(f"model: expected a head for {task.kind}, got {architectures[0]} in {name}")
    options: dict[str, Any] = {}
    problem = getattr(config, "problem_type", None) if task.kind != "qa" else None
    wanted = "regression" if task.kind == "regression" else "single_label_classification"
    if new_head and not has_head and task.kind != "qa":
        options = {"num_labels": task.num_labels, "problem_type": problem and wanted}
    elif has_head:
        if problem not in (None, wanted):
            raise UserError(f"model: expected a head for {task.kind}, got problem_type {problem!r} in {name}")
        check_labels(task, config)
        _say_order_of_classes(task, config)
    model = _loaded(auto, name, f"a checkpoint fine-tuned on {task.name}", new_head, **options)
    if new_head and task.kind == "classification" and is_unnamed(label_names(model.config)):
        _name_classes(model.config, task)
    return model


def _loaded(auto: Any, name: str | Path, wanted: str = "", new_head: bool = False, **options: Any) -> Any:
    """A model whose weights are all in the checkpoint, but for those of a head or a pooler that may be new."""
    with _reading("model", name) as folder:
        model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    missing = [key for key in info["missing_keys"] if not (new_head and _is_new_in_fine_tuning(key, model))]
    if missing:
        wanted = wanted or f"every weight of a {type(model).__name__}"
        raise UserError(f"model: expected {wanted}, got {folder} (no {min(missing)})")
    if any(".pooler." in key for key in info["missing_keys"]):
        warnings.warn(f"no pooler in {folder}: its weights are drawn anew", stacklevel=3)
    return model


def _load_generator(name: str, task: Task, config: Any, new_classes: bool) -> Any:
    """A causal language model for running text, or an encoder-decoder for a task as text to text."""
    if config.is_encoder_decoder and not task.has_label:
        raise UserError(f"model: expected one that is no encoder-decoder for {task.name}, got {name}")
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = _loaded(auto, name)
    if task.kind == "classification" and (new_classes or is_unnamed(label_names(config))):
        _name_classes(model.config, task)
    if task.kind == "lm" and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UserError(f"model: expected a causal language model, got {name}, which sees the tokens it predicts")
    return model


def load_as_saved(name: str | Path) -> Any:
    """A model with the head that its checkpoint holds; without one, and with a warning, if no class is named there.

    Raises:
        UserError: no such model, a damaged one, or one of a class that transformers does not have.
    """
    architectures = load_config(name).architectures
    if not architectures:  # as of old models on the Hub
        warnings.warn(f"the config of {name} does not name the model's class: read without a head", stacklevel=2)
        return _loaded(AutoModel, name)
    model_class = getattr(transformers, architectures[0], None)
    if model_class is None:
        raise UserError(f"model: expected a class of transformers, got {architectures[0]} in {name}")
    return _loaded(model_class, name)


def load_encoder(name: str | Path) -> Any:
    """A model without its head; of T5's family without the decoder, if the checkpoint has none.

    Raises:
        UserError: no such model, or a damaged one.
    """
    if (load_config(name).architectures or [""])[0].endswith("EncoderModel"):
        return load_as_saved(name)
    with _reading("model", name) as folder:
        return AutoModel.from_pretrained(folder)


def load_classifier(name: str | Path, seed: int = 0) -> Any:
    """A model for sequence classification, whose classifier may be new: of any checkpoint of a family that has one.

    What the checkpoint has no weights for is drawn by `seed`, with a warning if it is a pooler.

    Raises:
        UserError: no such model, a damaged one, or one of a family without a classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _loaded(AutoModelForSequenceClassification, name, new_head=True)


def check_reach(name: str, config: Any, tokens: int) -> None:
    """Raise UserError unless a model of this configuration, called `name`, has positions for so many tokens."""
    longest = longest_input(config)
    if longest is not None and tokens > longest:
        raise UserError(f"{name}: expected positions for {tokens} tokens, as texts have at most, got {longest}")


def _name_classes(config: Any, task: Task) -> None:
    config.id2label = dict(enumerate(task.label_names))
    config.label2id = {label: number for number, label in enumerate(task.label_names)}


def _say_order_of_classes(task: Task, config: Any) -> None:
    """Warn of a model that does not name its classes if the names in the data say nothing of their order either."""
    names = task.label_names
    known = task.name in TASKS or names == tuple(map(str, range(len(names))))
    if task.kind == "classification" and is_unnamed(label_names(config)) and not known:
        taken = [f"{number} = {name}" for number, name in enumerate(names)]
        more = f" and {len(taken) - _NAMED} more" * (len(taken) > _NAMED)
        warnings.warn(  # where it always is: once for a model and its teacher
            f"the model does not name its classes: taken as {', '.join(taken[:_NAMED])}{more}, in the order of their"
            " names (id2label in its config.json names them)",
            stacklevel=1,
        )


def _is_new_in_fine_tuning(key: str, model: Any) -> bool:
    return not key.startswith(f"{model.base_model_prefix}.") or ".pooler." in key


def is_unnamed(names: Sequence[str]) -> bool:
    """Whether these are the names that transformers gives where nobody else did."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def named_labels(config: Any) -> tuple[str, ...]:
    """A model's classes by number; none if nobody named them."""
    names = label_names(config)
    return () if is_unnamed(names) else tuple(names)


def check_labels(task: Task, config: Any) -> None:
    """Raise UserError unless a model of this configuration has the task's classes."""
    names = label_names(config, task.name)
    if task.kind == "classification":
        label_order(task, names)
    elif task.kind == "regression" and len(names) != 1 and not config.is_encoder_decoder:
        raise UserError(f"labels: expected a model with 1 output for {task.name}, got {len(names)}")


def label_names(config: Any, task: str | None = None) -> list[str]:
    """A model's classes by number, one for a score; of a model with a head for each task, those of `task`.

    Raises:
        UserError: the model has heads for other tasks.
    """
    moe = moe_config(config)
    if task is not None and moe is not None and moe.task_labels is not None:
        moe.task_id(task)  # which refuses others
        return list(moe.task_labels[task]) or [task]
    return [str(config.id2label[number]) for number in sorted(config.id2label)]
