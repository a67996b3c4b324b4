"""What decides a result, as flat JSON-able facts by name, and what differs between two such sets of facts.

A name of one word is a setting (`learning_rate`, `objective.temperature`), whose values are printed. A name of several
words (`validation rows`) is a digest of something large, which says nothing to a person: only its name is printed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_kernels.data.tasks import SPLIT_WORDS
from moebert_kernels.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moebert_kernels.data.tasks import TaskData

_SHOWN = 4  # differences that a message names
# these differ because something else does, which is named in their place where it is known
_FOLLOWING = ("training data", "validation data")
_MODEL_FILES = (".safetensors", ".bin", ".pt", ".json", ".txt", ".model")


def changed(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The facts that differ, each with what is wanted now and what was saved; None for one that is not there.

    Facts that follow from others are left out where those others differ too.
    """
    identity = json.loads(json.dumps(identity, default=str))
    pairs = {name: (identity.get(name), saved.get(name)) for name in sorted({*saved, *identity})}
    changes = {name: (now, then) for name, (now, then) in pairs.items() if now != then}
    first = {name: pair for name, pair in changes.items() if name not in _FOLLOWING}
    if "seed" in first:
        first.pop("model weights", None)  # a new head is drawn by the seed
    return first or changes


def described(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """What differs: settings with their values, then the names of the others."""
    names = sorted(changes, key=lambda name: " " in name)
    parts = []
    for name in names[:_SHOWN]:
        now, then = map(_value, changes[name])
        parts.append(name if " " in name else f"{name} (it was {then} and is {now} now)")
    more = [f"{len(names) - _SHOWN} more"] * (len(names) > _SHOWN)
    return ", ".join([*parts, *more])


def _value(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_same(saved: Mapping[str, Any], identity: Mapping[str, Any], wanted: str, way_out: str = "") -> None:
    """Raise UserError, which says what was `wanted`, what differs and the `way_out`, unless the facts are the same."""
    if changes := changed(saved, identity):
        raise UserError(f"{wanted} other {described(changes)}{way_out}")


def row_facts(data: TaskData, of: str = "") -> dict[str, str]:
    """ "training rows", "validation rows" and so on: digests of texts and labels, the classes by name.

    `of` stands before each name, for data of several tasks.
    """
    task, facts = data.task, {}
    for split, rows in data.splits.items():
        digest = sha256(repr((task.kind, task.label_names)).encode())
        for part in rows.iter(1000):
            digest.update(repr(sorted(part.items())).encode())
        facts[f"{of} {SPLIT_WORDS.get(split, split)} rows".strip()] = digest.hexdigest()[:16]
    return facts


def check_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless the same ids are the same tokens to student and teacher."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    by_id = [{number: token for token, number in vocabulary.items()} for vocabulary in (theirs, ours)]
    number = min(i for i in {*by_id[0], *by_id[1]} if by_id[0].get(i) != by_id[1].get(i))
    wanted, got = (repr(tokens[number]) if number in tokens else "none" for tokens in by_id)
    raise UserError(
        f"vocabulary: expected the teacher's {len(theirs)} tokens, where {number} is {wanted}, got {len(ours)} tokens,"
        f" where it is {got}"
    )


def files_of(folder: Path) -> dict[str, list[int]]:
    """Sizes and CRC-32 of a folder's files by name."""
    from moebert_kernels.files import size_and_crc32

    return {file.name: size_and_crc32(file) for file in sorted(folder.glob("*")) if file.is_file()}


def model_files(name: str | Path) -> dict[str, list[int]]:
    """Sizes and CRC-32 of the files that a local model is loaded from; none for a name on the Hub.

    Raises:
        UserError: no such model.
    """
    from moebert_kernels.distill.loading import resolve_model
    from moebert_kernels.files import size_and_crc32

    path = Path(name)
    if path.is_file():
        return {path.name: size_and_crc32(path)}
    return {file: digest for file, digest in files_of(Path(resolve_model(name))).items() if file.endswith(_MODEL_FILES)}
