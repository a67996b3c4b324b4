"""Lengths of real texts and the experts' shares among their tokens: counts only, no text (`real_text.json`).

    python -m benchmarks.real_text SST2_DEV_TSV MNLI_DEV_TSV BERT_VOCAB_TXT

writes the file again. The first table is GLUE's SST-2 dev.tsv (sentence, label), the second 1,000 pairs of MNLI's
matched dev set without a header (label, premise, hypothesis, split at punctuation); either may be packed with gzip.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).parent / "real_text.json"
NUM_EXPERTS, NUM_TABLES = 4, 12
TASKS = ("sst2", "mnli")


@cache
def _contents() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def lengths(task: str, count: int | None = None) -> list[int]:
    """Tokens of each text of a task ("sst2": sentences, "mnli": pairs), [CLS] and [SEP] included; the first `count`.

    Raises:
        ValueError: an unknown task, or fewer texts than that.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    known: list[int] = _contents()["lengths"][task]
    if count is not None and count > len(known):
        raise ValueError(f"count: expected at most {len(known)} texts of {task}, got {count}")
    return known[:count]


def typical_batch(task: str, batch_size: int) -> list[int]:
    """The lengths of the batch whose share of padding is the median of all batches of neighbours."""
    texts = lengths(task)
    batches = [texts[i : i + batch_size] for i in range(0, len(texts) - batch_size + 1, batch_size)]
    return sorted(batches, key=lambda batch: sum(batch) / (len(batch) * max(batch)))[len(batches) // 2]


def expert_shares(table: int = 0, router: str = "hash-random") -> list[float]:
    """What share of the tokens each of 4 experts gets by that table; "hash-balance" has one table, made for SST-2."""
    return _contents()["expert_shares"][router][table]


def token_ids(of_lengths: list[int], vocab_size: int, pad_token_id: int, generator: torch.Generator) -> Tensor:
    """(B, longest) random ids with padding on the right: text's lengths with nobody's words."""
    ids = torch.randint(0, vocab_size - 1, (len(of_lengths), max(of_lengths)), generator=generator)
    ids += ids >= pad_token_id  # never the padding's own id
    for row, length in zip(ids, of_lengths, strict=True):
        row[length:] = pad_token_id
    return ids


def main(sst2: str, mnli: str, vocab: str) -> None:
    """Write `real_text.json`."""
    from transformers import BertTokenizer

    from moebert_kernels.convert.tables import balanced_hash_table, random_hash_table

    tokenizer = BertTokenizer(vocab=vocab)
    sentences = [tokenizer(line[0])["input_ids"] for line in _rows(sst2, header=True)]
    pairs = [tokenizer(line[1], line[2])["input_ids"] for line in _rows(mnli, header=False)]
    V = len(tokenizer)
    of_sentences, of_pairs = (
        torch.bincount(torch.tensor(list(chain.from_iterable(texts))), minlength=V) for texts in (sentences, pairs)
    )
    generator = torch.Generator().manual_seed(0)
    tables = [random_hash_table(V, NUM_EXPERTS, generator) for _ in range(NUM_TABLES)]
    balanced = balanced_hash_table(of_sentences, NUM_EXPERTS)

    def shares(table: Tensor) -> list[float]:
        loads = torch.zeros(NUM_EXPERTS, dtype=torch.float64).index_add_(0, table, of_pairs.double())
        return [round(load, 4) for load in (loads / loads.sum()).tolist()]

    what = (
        "BERT's uncased tokens, [CLS] and [SEP] included, no padding, nothing cut: the lengths of the sentences of"
        f" SST-2's dev set and of {len(pairs)} pairs of MNLI's matched dev set, in their order, and what share of the"
        f" pairs' tokens each of {NUM_EXPERTS} experts gets by {NUM_TABLES} random hash tables (seed 0) and by one"
        " balanced for SST-2's tokens."
        " Made by: python -m benchmarks.real_text SST2_DEV_TSV MNLI_DEV_TSV BERT_VOCAB_TXT"
    )
    contents = {
        "what": what,
        "lengths": {"sst2": [len(text) for text in sentences], "mnli": [len(text) for text in pairs]},
        "expert_shares": {"hash-random": [shares(table) for table in tables], "hash-balance": [shares(balanced)]},
    }
    FILE.write_text(json.dumps(contents) + "\n")


def _rows(path: str, header: bool) -> Iterator[list[str]]:
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        if header:
            next(file)
        for line in file:
            yield line.rstrip("\n").split("\t")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_text", description=__doc__)
    for name in ("sst2", "mnli", "vocab"):
        parser.add_argument(name)
    main(**vars(parser.parse_args()))
