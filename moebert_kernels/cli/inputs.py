"""From a command's options to a task, its data, a model and tokens."""

from __future__ import annotations

import json
import sys
import textwrap
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import is_finished, read_note
from moebert_kernels.errors import UserError, about

if TYPE_CHECKING:
    import torch

    from moebert_kernels.data.split import TokenizedSplit
    from moebert_kernels.data.tasks import Task, TaskData
    from moebert_kernels.distill.evaluation import Evaluator

SPLITS = ("train", "validation", "validation_mismatched", "test")
_LONG_LINE = 500  # characters, about 128 tokens
_SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("valid", "val", "dev"), "validation")


def check_models(**models: str | None) -> None:
    """Look at the models that a command's options name, before it fetches or reads anything else; local ones first.

    Args:
        models: option -> folder or name on the Hub; None: not given.

    Raises:
        UserError: the first that is none, by its option.
    """
    given = [(option.replace("_", "-"), name) for option, name in models.items() if name is not None]
    for option, name in sorted(given, key=lambda entry: not Path(entry[1]).exists()):
        _check_model(option, name)


def _check_model(option: str, name: str) -> None:
    from moebert_kernels.distill.loading import load_config

    path = Path(name)
    if not name.strip():
        raise UserError(f"{option}: expected a folder or a model's name on the Hub, got an empty one")
    if path.is_dir() and not (path / "config.json").exists() and _is_run(path) and not is_finished(path):
        if not any((path / model / "config.json").exists() for model in ("best", "final")):
            raise UserError(
                f"{option}: expected a finished run, got {name}, whose run is unfinished and has no model yet; its"
                " command goes on with it when it is run again"
            )
        warnings.warn(f"{option}: the run in {name} is unfinished: its best model so far is taken", stacklevel=2)
    try:
        load_config(name)
    except UserError as error:
        reason = str(error).partition(": ")[2]
        if not path.exists() and "which does not exist" not in reason:
            first = reason.partition("(")[2].split(". ")[0].rstrip(".)")
            reason = (
                f"expected a folder or a model's name on the Hub, got {name}: no such folder, and not a Hub name that"
                f" can be read ({first})"
            )
        raise UserError(f"{option}: {reason}") from error


def check_dense(name: str) -> None:
    """Raise UserError for a model with experts, or for a prepared one."""
    from moebert_kernels.distill.loading import is_moe, load_config

    check_trainable(name)
    if is_moe(load_config(name)):
        raise UserError(f"model: expected a dense checkpoint, got {name}, which is a MoE already")


def check_trainable(name: str) -> None:
    """Raise UserError for a prepared model, which is for inference alone."""
    from moebert_kernels.distill.loading import is_prepared, load_config

    if is_prepared(load_config(name)):
        raise UserError(
            f"model: expected one that can be trained, got {name}, which moebert quantize made for inference; take the"
            " model that it was made of"
        )


def _is_run(folder: Path) -> bool:
    note = read_note(folder)
    return (folder / "run.json").exists() or (note is not None and note["command"] in ("finetune", "distill"))


@dataclass(frozen=True)
class Table:
    """Options of commands that read the data of a task."""

    data: o.Data = None
    text_column: o.TextColumns = None
    label_column: o.LabelColumn = "label"
    regression: o.Regression = False
    hold_out: o.HoldOut = None

    def make_task(self, name: str, model: str | None = None) -> Task:
        """The task that the options describe; classes of a custom one are those of `model`, if it names them."""
        from moebert_kernels.data.tasks import custom_task, get_task
        from moebert_kernels.distill.loading import is_unnamed, label_names, load_config

        columns = self.text_column
        if name != "custom":
            for option, given in (("regression", self.regression), ("label-column", self.label_column != "label")):
                if given:
                    raise UserError(f"{option}: expected it with --task custom alone, got it with --task {name}")
            if not columns:
                return get_task(name)
            if name != "lm":
                raise UserError(f"text-column: expected it with --task custom or lm alone, got it with --task {name}")
            if len(columns) > 1:
                raise UserError(f"text-column: expected one for a language model, got {len(columns)}")
            return replace(get_task(name), text_columns=tuple(columns))
        names: list[str] = []
        unnamed = 0
        if model is not None and not self.regression:
            names = label_names(load_config(model), name)
            if is_unnamed(names):
                names, unnamed = [], len(names)
        task = custom_task(columns or ["text"], self.label_column, regression=self.regression, label_names=names)
        return replace(task, unnamed_classes=unnamed)

    def load(self, task: str, split: str = "train", model: str | None = None) -> TaskData:
        """The data of a task; a single file is `split`."""
        return load_data(self.make_task(task, model), self.data, split, self.hold_out)


@dataclass(frozen=True)
class Texts(Table):
    """Options of commands that give a model the texts of a task."""

    max_length: o.MaxLength = None
    doc_stride: o.DocStride = None

    def read(self, loaded: TaskData, config: Any, tokenizer: Any) -> Reader:
        return Reader(loaded, config, tokenizer, self.max_length, self.doc_stride)


def load_data(task: Task, data: list[str] | None, file_split: str, hold_out: str | None = None) -> TaskData:
    """The data that --data names, with a word on it; a single file is `file_split`.

    `hold_out`: the way a validation or test split is made, if one is; a validation split is a part of the training
    rows, which a single file then holds.
    """
    from moebert_kernels.data.held_out import hold_out as held_out
    from moebert_kernels.data.held_out import share_of
    from moebert_kernels.data.summary import summary

    share = None if hold_out is None else share_of(hold_out)
    loaded = _load_data(task, data, file_split if share is None else "train")
    if hold_out is not None:
        loaded = held_out(loaded, hold_out)
    if share is not None:
        say(f"--hold-out {hold_out}: {len(loaded.validation)} of the {len(loaded.train) + len(loaded.validation)}"
            " training rows are the validation split")  # fmt: skip
    for line in summary(loaded):
        say(f"{task.name}: {line}")
    return loaded


def unlabelled(task: Task, data: list[str] | None) -> TaskData:
    """The texts that --data names, of which no label is read, so that there may be none.

    Of a text file each line is one, a long line several; where the task is a language model's it stays one document.
    """
    from datasets import Dataset

    from moebert_kernels.data.tasks import TaskData

    rows = load_data(replace(task, kind="lm"), data, "train").train
    if task.kind != "lm" and is_running_text(data):
        column = task.text_columns[0]
        lines = [line for text in rows[column] for line in text.splitlines()]
        rows = Dataset.from_dict({column: [piece for line in lines for piece in textwrap.wrap(line, _LONG_LINE)]})
        say(f"{task.name}: the lines are {len(rows)} texts")
    return TaskData(task, {"train": rows.add_column("label", [0] * len(rows))})


def is_running_text(data: list[str] | None) -> bool:
    """Whether --data names text files, of which each is one document; as a row of a table its end would be cut."""
    from moebert_kernels.data.files import split_name

    places = [Path(entry.rpartition("=")[2]) for entry in data or ()]
    return any(split_name(file)[1] == ".txt" for place in places for file in (place, *place.glob("train.*")))


def generates(config: Any) -> bool:
    """Whether a model of this configuration continues a text, so that it reads windows of documents."""
    import transformers

    kind = getattr(transformers, (config.architectures or ["none"])[0], None)
    return kind is not None and kind.can_generate() and not config.is_encoder_decoder


def say(text: str) -> None:
    """Tell a person something that is not the command's result."""
    print(text, file=sys.stderr, flush=True)


def _load_data(task: Task, data: list[str] | None, file_split: str) -> TaskData:
    from moebert_kernels.data.tasks import load_task

    if not data:
        return load_task(task)
    if len(data) == 1 and (Path(data[0]).exists() or data[0].partition("=")[0] not in _SPLIT_NAMES):
        if "=" in data[0] and not Path(data[0]).exists():
            raise UserError(_SPLIT_FILE.format(data[0]))
        return load_task(task, data[0], file_split=file_split)
    files: dict[str, str] = {}
    for entry in data:
        name, equals, file = entry.partition("=")
        split = _SPLIT_NAMES.get(name)
        if not equals or split is None or not file:
            raise UserError(_SPLIT_FILE.format(entry))
        if split in files:
            raise UserError(f"data: expected one file for each split, got {files[split]} and {file} for {split}")
        files[split] = file
    return load_task(task, files)


def read_tables(path: Path) -> Any:
    """The hash tables in a file: a list, or the original's object.

    Raises:
        UserError: no such file, or one that is neither.
    """
    from moebert_kernels.convert.plain_pickle import read_plain_pickle

    if not path.is_file():
        raise UserError(f"hash-tables: expected a file, got {path}, which does not exist")
    if path.suffix == ".pkl":
        with about("hash-tables", path.name):
            return read_plain_pickle(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"hash-tables: expected a .pkl or JSON file, got {path} ({error})") from None


_SPLIT_FILE = f"data: expected SPLIT=FILE with SPLIT one of {', '.join(_SPLIT_NAMES)}, got {{}}"


def split_called(name: str) -> str:
    """The split that --split names.

    Raises:
        UserError: there is none of that name.
    """
    if name not in _SPLIT_NAMES:
        raise UserError(f"split: expected one of {', '.join(SPLITS)}, got {name}")
    return _SPLIT_NAMES[name]


class Reader:
    """The data of a task as a model of some configuration reads it.

    Args:
        loaded: its data; classes are numbered anew as the model numbers them.
        config: of the model.
        tokenizer: its tokenizer.
        max_length, doc_stride: the length to cut texts at and the stride of their windows. None: those of the model's
            training, else the preset's length as far as the model reaches. What is given and was not so in training is
            printed.
        labels: False leaves the labels alone, which nothing reads.

    Raises:
        UserError: other classes than the model's, a length that it has no positions for, or a tokenizer with ids or
            types of tokens that it has no embedding for.
    """

    def __init__(
        self, loaded: TaskData, config: Any, tokenizer: Any, max_length: int | None = None,
        doc_stride: int | None = None, labels: bool = True,
    ) -> None:  # fmt: skip
        from moebert_kernels.convert.batches import longest_input
        from moebert_kernels.data.files import quiet_datasets
        from moebert_kernels.distill.loading import check_labels, label_names, trained_lengths

        task = loaded.task
        if labels:
            check_labels(task, config)
            if task.kind == "classification":
                with quiet_datasets():
                    loaded = loaded.with_label_order(label_names(config, task.name))
        self.data, self.config, self.tokenizer = loaded, config, tokenizer
        trained, positions = trained_lengths(tokenizer, task.name), longest_input(config)
        for name, wanted in (("max_length", max_length), ("doc_stride", doc_stride)):
            if wanted is not None and trained.get(name, wanted) != wanted:
                say(f"--{name.replace('_', '-')} {wanted}: the model was trained with {trained[name]}")
        if max_length is not None and positions is not None and max_length > positions:
            raise UserError(f"max-length: expected at most {positions}, the model's positions, got {max_length}")
        longest = max_length or trained.get("max_length") or o.preset_for(task.name)["max_length"]
        self.max_length: int = longest if positions is None else min(longest, positions)
        self.doc_stride = trained.get("doc_stride") if doc_stride is None else doc_stride
        most = config.get_text_config().vocab_size
        if len(tokenizer) > most:
            raise UserError(f"tokenizer: expected at most {most} tokens, as the model has, got {len(tokenizer)}")
        types = getattr(config, "type_vocab_size", 0)  # of DeBERTa 0: it has no embedding of them
        if types and len(task.text_columns) == 2:
            made = max(tokenizer("a", "b").get("token_type_ids") or [0])
            if made >= types:
                raise UserError(
                    f"tokenizer: expected token types below {types}, as the model has, got {made} for a pair"
                )

    def split(self, name: str, rows: Any = None) -> TokenizedSplit:
        """A split, or these `rows` of it; says how many of its texts are cut."""
        from moebert_kernels.data.split import TokenizedSplit
        from moebert_kernels.data.summary import cut_texts
        from moebert_kernels.layers import moe_config

        # the published recipe pads everything to the full length, and routes the padding
        pads = getattr(moe_config(self.config), "route_padding", False)
        texts = TokenizedSplit(
            self.data.split(name) if rows is None else rows, self.data.task, self.tokenizer,
            max_length=self.max_length, doc_stride=self.doc_stride, text_to_text=self.config.is_encoder_decoder,
            pad_to=self.max_length if pads else None,
        )  # fmt: skip
        cut = cut_texts(name, texts)
        if cut is not None:
            say(f"{self.data.task.name}: {cut}")
        return texts

    def evaluator(self, split: str, batch_size: int | None = None) -> Evaluator:
        """What judges a model on a split."""
        from moebert_kernels.distill.evaluation import Evaluator

        return Evaluator(self.split(split), batch_size, progress=True)


def device() -> torch.device:
    """Where models run: the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def splits_named(data: TaskData, split: str) -> list[str]:
    """The splits that an option names: MNLI has two validation splits."""
    data.split(split)
    return [split, *(name for name in data.splits if split == "validation" and name == "validation_mismatched")]
