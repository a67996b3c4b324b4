"""A teacher's outputs for every training example, computed once and read by any number of students and epochs.

On disk: `cache.json` (which teacher, layers, dtype; of each shard its size and CRC-32) and shards `00000.safetensors`,
..., each written whole, so that an interrupted build goes on where it was. A shard is verified when it is opened, and
one that is damaged or missing is computed anew by `TeacherCache.build`. It holds its examples' valid tokens one after
the other, without padding, and is memory-mapped: a batch reads one contiguous run of rows per example.

    example_id (n,), input_hash (n,), offsets (n + 1,) int64: example i's tokens are rows offsets[i]:offsets[i + 1]
    hidden (N, K, H): the K hidden states that are kept, or pooled (n, K, 3, H): their [CLS], maximum and mean;
    logits (n, C), or start_logits and end_logits (N,)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from moebert_kernels.data.split import Batch
from moebert_kernels.distill.alignment import pool
from moebert_kernels.distill.files import size_and_crc32, write_tensors, write_text
from moebert_kernels.distill.identity import changed, described
from moebert_kernels.distill.objectives import at_least_float32
from moebert_kernels.distill.teacher import LiveTeacher, TeacherInfo, TeacherOutputs, teacher_info
from moebert_kernels.errors import UserError

FORMAT_VERSION = 3
_PER_TOKEN = ("start_logits", "end_logits")
_WORDS = {"fingerprint": "teacher weights", "stored_as": "cache_dtype"}  # for a person
_DTYPES = ("float32", "float16", "bfloat16")


class TeacherCache:
    """The cached outputs in a folder, given for a batch as a live teacher gives them; zeros at padded positions.

    `TeacherCache.build` makes or completes one; the constructor opens a complete one.

    Args:
        folder: where it lies.
        verified: names of shards that need not be verified again.

    Raises:
        UserError: there is no complete cache in `folder`, or it is damaged.
    """

    def __init__(self, folder: str | Path, verified: Collection[str] = ()):
        self.folder = Path(folder)
        description = _read_description(self.folder)
        if description is None or not description["complete"]:
            state = "none" if description is None else "an unfinished one"
            raise UserError(f"teacher cache: expected a complete one in {self.folder}, got {state}")
        facts = {entry.name: description[entry.name] for entry in fields(TeacherInfo)}
        facts |= {name: tuple(facts[name]) for name in ("layers", "label_names")}
        self.info = TeacherInfo(**facts)
        for name, facts in description["shards"].items():
            damage = None if name in verified else _damage(self.folder / name, facts)
            if damage is not None:
                raise UserError(
                    f"teacher cache: expected a whole one in {self.folder}, got {damage} (TeacherCache.build, with the"
                    " teacher, mends it)"
                )
        self._shards = _open_shards(self.folder, description["shards"])
        self._places = _places(self._shards)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._places)

    @classmethod
    def build(
        cls,
        teacher: nn.Module,
        batches: Any,
        folder: str | Path,
        *,
        layers: Sequence[int] | None = None,
        pooled: bool = False,
        dtype: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        shard_mib: int = 128,
        device: torch.device | str | None = None,
    ) -> TeacherCache:
        """Run `teacher` on the examples of `batches` that `folder` does not hold yet, and open the result.

        Of several processes only the main one runs it, and the others wait.

        Args:
            teacher: a transformers model; run in eval mode without gradients.
            batches: of the training data, each example once: what can be iterated and has a length.
            folder: one cache of one teacher; made if missing.
            layers: the hidden states to keep, 0 = the embeddings' output; None: all.
            pooled: keep sentence vectors of these states instead of all tokens: [CLS], maximum and mean.
            dtype: "float32", "float16" or "bfloat16" to store in; None: as the teacher computes.
            inputs: JSON-able facts of how texts became token ids (tokenizer, maximum length, file), to be compared.
            shard_mib: size of a shard, which is what an interrupted build loses at most.
            device: where the teacher runs; None: where it is.

        Raises:
            UserError: `folder` holds a cache of another teacher, other layers, another dtype or other inputs (it says
                which), or its cache.json is damaged; or a value does not fit into `dtype`.
        """
        folder = Path(folder)
        if dtype is not None and dtype not in _DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        where = torch.device(device) if device is not None else next(teacher.parameters()).device
        stored_as = dtype or str(next(teacher.parameters()).dtype).removeprefix("torch.")
        info = replace(teacher_info(teacher, layers), stored_as=stored_as, pooled=pooled)
        run, process = LiveTeacher(teacher, where), Accelerator()
        with process.main_process_first():  # the others then find all that they check
            builder = _Builder(folder, info, dict(inputs or {}), shard_mib)
            quiet = not process.is_main_process
            for batch in tqdm(batches, total=len(batches), desc="teacher outputs", disable=quiet):
                missing = builder.missing(batch)
                if missing is not None:
                    rows = {name: tensor[missing].to(where) for name, tensor in batch.items()}
                    builder.add(rows, run(rows))
            builder.finish()
        return cls(folder, verified=builder.shards)

    def __call__(self, batch: Batch) -> TeacherOutputs:
        """The outputs for a batch, on its device and in float32 (or the teacher's own wider dtype).

        Raises:
            UserError: an example is not in the cache, or is there with other token ids.
        """
        ids, device = batch["example_id"].tolist(), batch["input_ids"].device
        unknown = [i for i in ids if i not in self._places]
        if unknown:
            raise UserError(
                f"teacher cache: expected example_id {unknown[0]} among the {len(self)} examples in {self.folder},"
                " got none"
            )
        places = [self._places[i] for i in ids]
        _check_inputs(ids, [place.input_hash for place in places], _input_hash(batch).tolist(), self.folder)

        def rows(name: str) -> Tensor:  # of all valid tokens of the batch
            return torch.cat([self._shards[p.shard][name][p.start : p.end] for p in places])

        mask = _mask(batch)
        where = mask.flatten().nonzero().squeeze(1)

        def padded(values: Tensor) -> Tensor:  # (valid tokens, ...) -> (B, T, ...)
            values = at_least_float32(values.to(device))
            out = values.new_zeros(mask.numel(), *values.shape[1:])
            return out.index_copy_(0, where, values).unflatten(0, mask.shape)

        def per_example(name: str) -> Tensor:
            return at_least_float32(
                torch.stack([self._shards[place.shard][name][place.row] for place in places]).to(device)
            )

        available = self._shards[places[0].shard]
        outputs: dict[str, Any] = {name: padded(rows(name)) for name in _PER_TOKEN if name in available}
        if "logits" in available:
            outputs["logits"] = per_example("logits")
        kept: dict[int, Tensor] = {}
        if self.info.pooled:
            outputs["pooled"] = dict(zip(self.info.layers, per_example("pooled").unbind(1), strict=True))
        else:
            kept = dict(zip(self.info.layers, padded(rows("hidden")).unbind(2), strict=True))
        return TeacherOutputs(tuple(kept.get(layer) for layer in range(self.info.num_layers + 1)), **outputs)


class _Builder:
    """Appends shards to a cache folder, in place of damaged ones too.

    Attributes:
        shards: the name of each that is whole -> its size and CRC-32.
    """

    def __init__(self, folder: Path, info: TeacherInfo, inputs: dict[str, Any], shard_mib: int):
        self._folder, self._info, self._limit = folder, info, shard_mib * 2**20
        facts = {"format_version": FORMAT_VERSION, **asdict(info), **inputs}
        wanted = json.loads(json.dumps(facts))
        found = _read_description(folder)
        compared = {name: value for name, value in (found or {}).items() if name not in ("complete", "shards")}
        if found is not None:
            pair = ({_WORDS.get(name, name): value for name, value in facts.items()} for facts in (compared, wanted))
            changes = changed(*pair)
            if changes:
                raise UserError(
                    f"teacher cache: expected an empty folder or one with the same outputs, got {folder} with those of"
                    f" other {described(changes)} (use another folder)"
                )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"teacher cache: expected a folder to write, got {folder} ({error.strerror})") from None
        self._description = wanted
        self.shards: dict[str, list[int]] = {}
        for name, facts in (found or {"shards": {}})["shards"].items():
            damage = _damage(folder / name, facts)
            if damage is None:
                self.shards[name] = facts
            else:
                warnings.warn(f"teacher cache: {folder}: {damage}: its examples are computed anew", stacklevel=3)
        places = _places(_open_shards(folder, self.shards))
        self._hashes = {i: place.input_hash for i, place in places.items()}
        self._bytes = 0
        self._pending: dict[str, list[Tensor]] = {}
        if found is None or self.shards != found["shards"]:
            self._describe(complete=False)
        self._is_complete = found is not None and found["complete"] and self.shards == found["shards"]

    def missing(self, batch: Batch) -> Tensor | None:
        """The batch's rows that are not stored yet, or None; checks the inputs of the others."""
        ids, hashes = batch["example_id"].tolist(), _input_hash(batch).tolist()
        new = []
        for row, (example_id, input_hash) in enumerate(zip(ids, hashes, strict=True)):
            if example_id in self._hashes:
                _check_inputs([example_id], [self._hashes[example_id]], [input_hash], self._folder)
            else:
                self._hashes[example_id] = input_hash
                new.append(row)
        return torch.tensor(new, device=batch["example_id"].device) if new else None

    def add(self, batch: Batch, outputs: TeacherOutputs) -> None:
        mask = _mask(batch)
        states = [outputs.hidden_states[layer] for layer in self._info.layers]
        entry = {"example_id": batch["example_id"], "input_hash": _input_hash(batch), "lengths": mask.sum(1)}
        if self._info.pooled:
            entry["pooled"] = self._narrow(torch.stack([pool(state, mask) for state in states], 1))
        else:
            entry["hidden"] = self._narrow(torch.stack([state[mask] for state in states], 1))
        for name in ("logits", *_PER_TOKEN):
            values = getattr(outputs, name)
            if values is not None:
                entry[name] = self._narrow(values[mask] if name in _PER_TOKEN else values)
        for name, tensor in entry.items():
            self._pending.setdefault(name, []).append(tensor.cpu())
            self._bytes += tensor.nbytes
        if self._bytes >= self._limit:
            self._write()

    def finish(self) -> None:
        if self._pending:
            self._write()
        if not self._is_complete:
            self._describe(complete=True)

    def _narrow(self, values: Tensor) -> Tensor:
        stored = values.to(getattr(torch, self._info.stored_as))
        if not torch.isfinite(stored).all():
            raise UserError(
                f"dtype: expected one that holds the teacher's outputs, got {self._info.stored_as} (try bfloat16)"
            )
        return stored

    def _write(self) -> None:
        shard = {name: torch.cat(tensors) for name, tensors in self._pending.items()}
        shard["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), shard.pop("lengths").cumsum(0)])
        number = next(number for number in count() if _shard_name(number) not in self.shards)
        path = self._folder / _shard_name(number)
        write_tensors(path, shard)
        self.shards[path.name] = size_and_crc32(path)
        self._describe(complete=False)
        self._bytes, self._pending, self._is_complete = 0, {}, False

    def _describe(self, complete: bool) -> None:
        description = {**self._description, "complete": complete, "shards": self.shards}
        write_text(self._folder / "cache.json", json.dumps(description, indent=1))


def _read_description(folder: Path) -> dict | None:
    path = folder / "cache.json"
    if not path.exists():
        return None
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"teacher cache: expected JSON, got a damaged {path}") from None
    found = description.get("format_version")
    if found != FORMAT_VERSION:
        raise UserError(f"teacher cache: expected format_version {FORMAT_VERSION} in {folder}, got {found}; build anew")
    return description


def _shard_name(number: int) -> str:
    return f"{number:05d}.safetensors"


def _damage(shard: Path, size_and_checksum: Sequence[int]) -> str | None:
    """What is wrong with a shard, or None; reads it once."""
    try:
        found = size_and_crc32(shard)
    except OSError as error:
        return f"no readable {shard.name} ({error.strerror})"
    for what, wanted, got in zip(("bytes", "as CRC-32"), size_and_checksum, found, strict=True):
        if wanted != got:
            return f"a damaged {shard.name}: expected {wanted} {what}, got {got}"
    return None


def _open_shards(folder: Path, names: Iterable[str]) -> list[dict[str, Tensor]]:
    """The shards, memory-mapped."""
    return [load_file(folder / name) for name in sorted(names)]


class _Place(NamedTuple):
    """Where an example lies, and the hash of its inputs."""

    shard: int
    row: int
    start: int
    end: int
    input_hash: int


def _places(shards: list[dict[str, Tensor]]) -> dict[int, _Place]:
    """example_id -> place."""
    places = {}
    for number, shard in enumerate(shards):
        ids, offsets, hashes = (shard[name].tolist() for name in ("example_id", "offsets", "input_hash"))
        for row, example_id in enumerate(ids):
            places[example_id] = _Place(number, row, offsets[row], offsets[row + 1], hashes[row])
    return places


def _mask(batch: Batch) -> Tensor:
    """(B, T) bool, True at valid tokens."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask != 0


def _input_hash(batch: Batch) -> Tensor:
    """(B,) int64 that name each example's valid tokens (and their types), whatever the padding."""
    mask = _mask(batch)
    position = mask.cumsum(1)  # 1, 2, ... over the valid tokens
    token = batch["input_ids"] * 2 + batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))
    # a fixed mixing of (token, position) in wrapping int64 arithmetic, then a sum that no order of summation changes
    mixed = (token + 1) * 0x9E3779B97F4A7C1 + position * 0x632BE59BD9B4E01
    mixed = (mixed ^ (mixed >> 31)) * 0x7FB5D329728EA185
    return torch.where(mask, mixed ^ (mixed >> 27), 0).sum(1)


def _check_inputs(ids: Sequence[int], stored: Sequence[int], given: Sequence[int], folder: Path) -> None:
    for example_id, ours, theirs in zip(ids, stored, given, strict=True):
        if ours != theirs:
            raise UserError(
                f"teacher cache: expected in {folder} the token ids of example_id {example_id}, got others"
                " (another tokenizer, maximum length or data set; use another folder)"
            )
