"""A teacher's outputs for every training example, computed once and read by any number of students and epochs.

On disk: shards `00000-CRC32.safetensors`, ..., each written whole and with the facts of its teacher, so that an
interrupted build goes on where it was. A shard whose content is not what its name says is computed anew by
`TeacherCache.build`. It holds its examples' valid tokens one after the other, without padding, and is memory-mapped: a
batch reads one contiguous run of rows per example.

    example_id (n,), input_hash (n,), offsets (n + 1,) int64: example i's tokens are rows offsets[i]:offsets[i + 1]
    hidden (N, K, H): the K hidden states that are kept, or pooled (n, K, 3, H): their [CLS], maximum and mean;
    logits (n, C), or start_logits and end_logits (N,)
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from moebert_kernels.convert.sample_loss import at_least_float32
from moebert_kernels.data.split import Batch
from moebert_kernels.distill.alignment import pool
from moebert_kernels.distill.identity import check_same
from moebert_kernels.distill.teacher import LiveTeacher, TeacherInfo, TeacherOutputs, teacher_info
from moebert_kernels.errors import UserError
from moebert_kernels.files import size_and_crc32, write_tensors

_PER_TOKEN = ("start_logits", "end_logits")
_WORDS = {"fingerprint": "teacher weights", "stored_as": "cache_dtype"}  # for a person
_DTYPES = ("float32", "float16", "bfloat16")
_SHARDS = f"[0-9]*-{'[0-9a-f]' * 8}.safetensors"


class _Place(NamedTuple):
    """Where an example lies, and the hash of its inputs."""

    shard: dict[str, Tensor]
    row: int
    start: int
    end: int
    input_hash: int


class TeacherCache:
    """The cached outputs in a folder, given for a batch as a live teacher gives them; zeros at padded positions.

    `TeacherCache.build` makes or completes one; the constructor opens one.

    Args:
        folder: where it lies.

    Raises:
        UserError: there is no cache in `folder`, or it is damaged.
    """

    info: TeacherInfo
    _places: dict[int, _Place]

    def __init__(self, folder: str | Path):
        self.folder, self._places = Path(folder), {}
        shards = sorted(self.folder.glob(_SHARDS))
        if not shards:
            raise UserError(f"teacher cache: expected one in {self.folder}, got none")
        for shard in shards:
            damage = self._open(shard)
            if damage is not None:
                raise UserError(
                    f"teacher cache: expected whole files in {self.folder}, got a damaged {shard.name} ({damage};"
                    " TeacherCache.build, with the teacher, computes it anew)"
                )

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
            shard_mib: size of a shard, which is what an interrupted build loses at most.
            device: where the teacher runs; None: where it is.

        Raises:
            UserError: `folder` holds a cache of another teacher, other layers, another dtype (it says which) or other
                texts; or a value does not fit into `dtype`.
        """
        if dtype is not None and dtype not in _DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        where = torch.device(device) if device is not None else next(teacher.parameters()).device
        stored_as = dtype or str(next(teacher.parameters()).dtype).removeprefix("torch.")
        info = replace(teacher_info(teacher, layers), stored_as=stored_as, pooled=pooled)
        run, process, cache = LiveTeacher(teacher, where), Accelerator(), cls.__new__(cls)
        cache.folder, cache.info, cache._places = Path(folder), info, {}
        with process.main_process_first():  # the others then find all that they check
            cache._begin()
            quiet, pending = not process.is_main_process, _Shard(info)
            for batch in tqdm(batches, total=len(batches), desc="teacher outputs", disable=quiet):
                missing = cache._missing(batch)
                if missing:
                    rows = {name: tensor[missing].to(where) for name, tensor in batch.items()}
                    pending.add(rows, run(rows))
                if pending.bytes > shard_mib * 2**20:
                    cache._write(pending)
                    pending = _Shard(info)
            if pending.bytes:
                cache._write(pending)
        return cache

    def __call__(self, batch: Batch) -> TeacherOutputs:
        """The outputs for a batch, on its device and in float32 (or the teacher's own wider dtype).

        Raises:
            UserError: the batch does not name its examples, or one is not in the cache or there with other token ids.
        """
        ids, device = _ids(batch), batch["input_ids"].device
        self._check(ids)
        self._missing(batch)
        places, mask = [self._places[i] for i in ids], _mask(batch)
        where = mask.flatten().nonzero().squeeze(1)

        def padded(name: str) -> Tensor:  # (valid tokens, ...) -> (B, T, ...)
            values = torch.cat([place.shard[name][place.start : place.end] for place in places])
            values = at_least_float32(values.to(device))
            out = values.new_zeros(mask.numel(), *values.shape[1:])
            return out.index_copy_(0, where, values).unflatten(0, mask.shape)

        def per_example(name: str) -> Tensor:
            return at_least_float32(torch.stack([place.shard[name][place.row] for place in places]).to(device))

        available = places[0].shard
        outputs: dict[str, Any] = {name: padded(name) for name in _PER_TOKEN if name in available}
        if "logits" in available:
            outputs["logits"] = per_example("logits")
        kept: dict[int, Tensor] = {}
        if self.info.pooled:
            outputs["pooled"] = dict(zip(self.info.layers, per_example("pooled").unbind(1), strict=True))
        else:
            kept = dict(zip(self.info.layers, padded("hidden").unbind(2), strict=True))
        return TeacherOutputs(tuple(kept.get(layer) for layer in range(self.info.num_layers + 1)), **outputs)

    def check_rows(self, data: Any) -> None:
        """Raise UserError unless all rows of a data set that names its examples are there."""
        if "example_id" in (getattr(data, "column_names", None) or ()):
            self._check(data["example_id"][:])

    def _check(self, ids: Iterable[int]) -> None:
        unknown = next((example_id for example_id in ids if example_id not in self._places), None)
        if unknown is not None:
            raise UserError(
                f"teacher cache: expected example_id {unknown} among the {len(self)} examples in {self.folder}, got"
                " none"
            )

    def _begin(self) -> None:
        """Open what is whole, and drop the rest: its examples are missing then."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
            raise UserError(f"teacher cache: expected a folder to write, got {self.folder} ({reason})") from None
        wanted = self.info
        for shard in sorted(self.folder.glob(_SHARDS)):
            damage = self._open(shard)
            if damage is not None:
                warnings.warn(f"teacher cache: {shard} is damaged ({damage}): it is computed anew", stacklevel=3)
                shard.unlink()
                continue
            found, self.info = self.info, wanted
            then, now = ({_WORDS.get(k, k): v for k, v in asdict(info).items()} for info in (found, wanted))
            place = f"an empty folder or one with the same outputs, got {self.folder} with those of"
            check_same(json.loads(json.dumps(then)), now, f"teacher cache: expected {place}", " (use another folder)")

    def _open(self, file: Path) -> str | None:
        """Take up a shard, memory-mapped; or what is wrong with it."""
        try:
            crc = f"{size_and_crc32(file)[1]:08x}"
            if not file.stem.endswith(crc):
                return f"its CRC-32 is {crc}"
            with safe_open(file, framework="pt") as opened:
                facts = json.loads(opened.metadata()["facts"])
            shard = load_file(file)
        except (OSError, SafetensorError) as error:
            return str(error)
        self.info = TeacherInfo(**facts | {name: tuple(facts[name]) for name in ("layers", "label_names")})
        ids, offsets, hashes = (shard[part].tolist() for part in ("example_id", "offsets", "input_hash"))
        for row, example_id in enumerate(ids):
            self._places[example_id] = _Place(shard, row, offsets[row], offsets[row + 1], hashes[row])
        return None

    def _missing(self, batch: Batch) -> list[int]:
        """The batch's rows that are not there; checks the inputs of the others."""
        missing = []
        for row, (example_id, given) in enumerate(zip(_ids(batch), _input_hash(batch).tolist(), strict=True)):
            place = self._places.get(example_id)
            if place is None:
                missing.append(row)
            elif place.input_hash != given:
                raise UserError(
                    f"teacher cache: expected in {self.folder} the token ids of example_id {example_id}, got others"
                    " (another tokenizer, maximum length or data set; use another folder)"
                )
        return missing

    def _write(self, shard: _Shard) -> None:
        numbers = [int(file.name.partition("-")[0]) for file in self.folder.glob(_SHARDS)]
        number = min({*range(len(numbers) + 1)} - {*numbers})
        file = self.folder / f"{number:05d}-{os.getpid()}.unfinished"  # another run may build the same folder
        write_tensors(file, shard.joined(), {"facts": json.dumps(asdict(self.info))})
        self._open(file.rename(self.folder / f"{number:05d}-{size_and_crc32(file)[1]:08x}.safetensors"))


class _Shard:
    """Outputs that are not written yet."""

    def __init__(self, info: TeacherInfo) -> None:
        self._info, self.bytes = info, 0
        self.tensors: dict[str, list[Tensor]] = {}

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
            self.tensors.setdefault(name, []).append(tensor.cpu())
            self.bytes += tensor.nbytes

    def _narrow(self, values: Tensor) -> Tensor:
        stored = values.to(getattr(torch, self._info.stored_as or ""))
        if not torch.isfinite(stored).all():
            raise UserError(
                f"dtype: expected one that holds the teacher's outputs, got {self._info.stored_as} (try bfloat16)"
            )
        return stored

    def joined(self) -> dict[str, Tensor]:
        joined = {name: torch.cat(tensors) for name, tensors in self.tensors.items()}
        joined["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), joined.pop("lengths").cumsum(0)])
        return joined


def _ids(batch: Batch) -> list[int]:
    """The batch's examples."""
    if "example_id" not in batch:
        raise UserError(
            f"teacher cache: expected a column example_id, the row's number, got batches of {', '.join(batch)} (add it"
            " to the data, and let the collator keep it)"
        )
    return batch["example_id"].tolist()


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
