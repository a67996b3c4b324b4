"""Lengths and shares from real text: what the file holds, and that it can be made again."""

import gzip
import json

import pytest
import torch

from benchmarks import real_text


def test_lengths_are_those_of_texts():
    for task, count, mean in (("sst2", 872, 25.2), ("mnli", 1000, 39.8)):
        lengths = real_text.lengths(task)
        assert len(lengths) == count and min(lengths) >= 3 and max(lengths) <= 512
        assert sum(lengths) / count == pytest.approx(mean, abs=0.05)
        assert real_text.lengths(task, 5) == lengths[:5]


def test_shares_are_of_the_whole():
    for router, tables in (("hash-random", 12), ("hash-balance", 1)):
        for table in range(tables):
            shares = real_text.expert_shares(table, router)
            assert len(shares) == 4 and sum(shares) == pytest.approx(1.0, abs=2e-4)


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="task: expected one of sst2, mnli, got 'cola'"):
        real_text.lengths("cola")
    with pytest.raises(ValueError, match="count: expected at most 872 texts of sst2, got 873"):
        real_text.lengths("sst2", 873)


def test_typical_batch_has_the_median_share_of_padding(monkeypatch):
    monkeypatch.setattr(real_text, "_contents", lambda: {"lengths": {"mnli": [4, 4, 1, 5, 2, 4, 9]}})
    assert real_text.typical_batch("mnli", 2) == [2, 4]  # the last text fills no batch


def test_ids_have_the_lengths_and_no_padding_inside():
    ids = real_text.token_ids([3, 7, 1], vocab_size=5, pad_token_id=2, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (3, 7)
    assert (ids != 2).sum(1).tolist() == [3, 7, 1]
    assert bool((ids[0, 3:] == 2).all()) and set(ids.unique().tolist()) <= set(range(5))


def test_file_is_made_from_tables_and_a_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(real_text, "FILE", tmp_path / "real_text.json")
    monkeypatch.setattr(real_text, "_contents", real_text._contents.__wrapped__)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood film\t1\nbad\t0\n")
    with gzip.open(tmp_path / "pairs.tsv.gz", "wt") as file:
        file.write("neutral\tgood film\tbad film\n")
    real_text.main(*(str(tmp_path / name) for name in ("dev.tsv", "pairs.tsv.gz", "vocab.txt")))
    assert real_text.lengths("sst2") == [4, 3]
    assert real_text.lengths("mnli") == [7]  # [CLS] good film [SEP] bad film [SEP]
    assert set(json.loads(real_text.FILE.read_text())) == {"what", "lengths", "expert_shares"}
