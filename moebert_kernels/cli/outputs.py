"""What --output may be: a command replaces what it wrote itself, and never anything else.

A note in each folder says which command wrote it. Of a model it also says with which options and which files, of a
training run nothing more: its own files say the rest.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from moebert_kernels.errors import UserError

NOTE = "moebert.json"
_MODELS = ("convert", "merge", "student", "quantize", "export")  # these replace a folder whole
_READ = ("model", "init", "from_original", "importance", "hash_tables")  # options that name what they make it of


def check_output(folder: Path, command: str, *models: str | Path | None) -> dict[str, Any] | None:
    """The note of the call that wrote `folder`, or None where there is no such folder, or nothing in it.

    Args:
        command: which is to write it; one that trains goes on with its own runs alone.
        models: which the command reads.

    Raises:
        UserError: a file, a folder that cannot be written, that of one of the models, or one with other things.
    """
    from moebert_kernels.files import check_writable

    if folder.is_file():
        raise UserError(f"output: expected a folder, got the file {folder}")
    for model in models:
        if model is not None and _holds(folder.resolve(), Path(model)):
            raise UserError(f"output: expected another folder than that of a model which is read, got {folder}")
    place = folder.resolve()
    if command in _MODELS:
        for kind, wrong in (("the current folder", place == Path.cwd()), ("a mount point", os.path.ismount(place))):
            if wrong:
                raise UserError(f"output: expected a folder that can be replaced whole, got {folder}, which is {kind}")
    check_writable("output", place if place.exists() and command not in _MODELS else place.parent)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    note = read_note(folder)
    if note is None:
        some = min(path.name for path in folder.iterdir())
        raise UserError(
            f"output: expected a new or empty folder, got {folder}, which holds things that moebert did not write"
            f" ({some})"
        )
    if note["command"] != command and not {note["command"], command} <= {*_MODELS}:
        raise UserError(f"output: expected a new or empty folder, got {folder}, which moebert {note['command']} wrote")
    return note


def _holds(folder: Path, model: Path) -> bool:
    """Whether writing into `folder`, an absolute path, would touch a local model."""
    if not model.exists():  # a name on the Hub
        return False
    model = model.resolve()
    return folder in (model, *model.parents, model / "best", model / "final")


def read_note(folder: Path) -> dict[str, Any] | None:
    """What a command noted in a folder that it wrote, or None."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and isinstance(note.get("command"), str) else None


def call_of(ctx: Any, **facts: Any) -> dict[str, Any]:
    """What decides what a command makes, JSON-able: its options, the files that they name, and further facts.

    Where local files lie does not matter.
    """
    from moebert_kernels.distill.identity import model_files

    given = {
        name: None if value in ((), []) else value
        for name, value in ctx.params.items() if name not in ("output", "force", "data")
    }  # fmt: skip
    for name in _READ:
        if given.get(name) is not None and (path := Path(given[name])).exists():
            del given[name]
            found = model_files(path)
            facts[f"files of {name}"] = [*found.values()] if path.is_file() else found
    return json.loads(json.dumps({"command": ctx.command.name, **given, **facts}, default=str))


def data_files(data: Sequence[str] | None) -> list[Any]:
    """Of each local place that --data names its split, where it says one, sizes and CRC-32; other words as they are."""
    from moebert_kernels.distill.identity import files_of
    from moebert_kernels.files import size_and_crc32

    found: list[Any] = []
    for word in data or ():
        split, _, place = ("", "", word) if Path(word).exists() else word.partition("=")
        if place and (path := Path(place)).exists():
            found.append([split, size_and_crc32(path) if path.is_file() else files_of(path)])
        else:
            found.append(word)
    return found


def check_model_output(folder: Path, identity: Mapping[str, Any], force: bool, *models: str | Path | None) -> bool:
    """Whether an earlier call of the same `identity`, as far as that is known, wrote the model in `folder`.

    Raises:
        UserError: as `check_output`; the folder holds another model. `force` allows to replace that, and never files
            that were put beside it.
    """
    from moebert_kernels.distill.identity import check_same

    note = check_output(folder, identity["command"], *models)
    if note is None:
        return False
    files = note.pop("files", [])
    if not force:
        if note["command"] != identity["command"]:
            raise UserError(
                f"output: expected a new or empty folder, got {folder}, which moebert {note['command']} wrote"
                " (--force replaces it)"
            )
        check_same(
            {name: note.get(name) for name in identity}, identity,
            f"output: expected a new or empty folder, got {folder} with a model of", " (--force replaces it)",
        )  # fmt: skip
        return True
    others = sorted({path.name for path in folder.iterdir()} - {NOTE, *files})
    if others:
        raise UserError(
            f"output: expected a folder with a model alone, got {folder}, which holds {others[0]} beside it"
        )
    return False


def already_written(folder: Path, identity: Mapping[str, Any], force: bool, *models: str | Path | None) -> bool:
    """As `check_model_output`, for all of the identity; says so."""
    is_there = check_model_output(folder, identity, force, *models)
    if is_there:
        print(f"{folder} is there already")
    return is_there


def tokenizer_of(model: str | Path) -> Any:
    """The tokenizer of a model, which is saved with what it becomes; None, with a warning, where there is none."""
    from moebert_kernels.distill.loading import load_tokenizer

    try:
        return load_tokenizer(model)
    except UserError as error:
        warnings.warn(f"the model is saved without a tokenizer ({error})", stacklevel=2)
        return None


def write_model(
    folder: Path, model: Any, tokenizer: Any, identity: Mapping[str, Any], reports: Sequence[Any] = ()
) -> None:
    """Write a model with its card, its tokenizer if there is one, and the call that made them, whole or not at all.

    `reports` of chosen experts, dataclasses, are in choice.json.
    """
    from moebert_kernels.convert.card import save_with_card
    from moebert_kernels.files import write_json

    def save(at: Path) -> None:
        save_with_card(model, at, previous=folder)
        if reports:
            write_json(at / "choice.json", [asdict(report) for report in reports])

    write_files(folder, save, identity, tokenizer)
    print(f"saved in {folder}")


def write_files(output: Path, save: Callable[[Path], Any], identity: Mapping[str, Any], *parts: Any) -> None:
    """Write what `save` and the parts' `save_pretrained` write, and the call that made them, whole or not at all.

    Args:
        parts: a tokenizer, a configuration; None: there is none.
    """
    from moebert_kernels.distill.loading import quiet_transformers
    from moebert_kernels.files import write_folder

    def write(folder: Path) -> None:
        with quiet_transformers():
            save(folder)
        for part in parts:
            if part is not None:
                part.save_pretrained(folder)
        files = sorted(path.name for path in folder.iterdir())
        (folder / NOTE).write_text(json.dumps({**identity, "files": files}), encoding="utf-8")

    write_folder(output, write)


def parts_of(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Where an interrupted call of this identity leaves what it made so far: beside the folder that it is to write."""
    digest = sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.parts-{digest}")


def drop_parts(folder: Path) -> None:
    """Remove what calls left beside a folder that is written now."""
    folder = folder.resolve()
    for parts in folder.parent.glob(f".{glob.escape(folder.name)}.parts-????????"):
        shutil.rmtree(parts, ignore_errors=True)


def claim(folder: Path, command: str) -> None:
    """Note in the folder of a training run, which `check_output` has allowed, which command writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), (folder / NOTE).open("x", encoding="utf-8") as file:
        json.dump({"command": command}, file)


def is_finished(folder: Path) -> bool:
    """Whether a training run in `folder` has come to its end."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))["result"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_output_file(file: Path, is_ours: Callable[[Path], bool], example: str, option: str = "output") -> None:
    """Raise UserError unless a command may write `file`: there is none, or `is_ours` knows it as an earlier result."""
    if file.is_dir():
        raise UserError(f"{option}: expected a file, such as {example}, got the folder {file}")
    from moebert_kernels.files import check_writable

    check_writable(option, file.absolute().parent)
    if file.exists() and not is_ours(file):
        raise UserError(f"{option}: expected a new file, got {file}, which moebert did not write")


def is_result(key: str) -> Callable[[Path], bool]:
    """What tells a JSON file with a result, which has `key`, from any other file."""

    def check(file: Path) -> bool:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and key in content

    return check
