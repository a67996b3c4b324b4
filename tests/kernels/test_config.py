import math

import pytest
import torch

pytest.importorskip("triton")

from moebert_kernels.kernels import config
from moebert_kernels.kernels.config import CANDIDATES, Device, pick_chunk, pick_config, predicted_us

H200 = Device(90, 132)
BERT = (4, 768, 768)  # E, N, K


def pick(rows, kind="rows", dtype=torch.bfloat16, shape=BERT, device=H200):
    return pick_config(kind, rows, *shape, dtype, device)


def test_few_rows_take_small_tiles_and_many_rows_large_ones():
    blocks = [pick(rows).BLOCK_M for rows in (1, 64, 1024, 65536)]
    assert blocks == sorted(blocks) and blocks[0] == 16 and blocks[-1] == 128


@pytest.mark.parametrize("kind", ["rows", "weights"])
@pytest.mark.parametrize("rows", [1, 100, 4096, 10**6])
def test_is_a_candidate_and_pure(rows, kind):
    first = pick(rows, kind)
    assert first in CANDIDATES["half"][kind]
    config._pick.cache_clear()
    assert pick(rows, kind) == first


def test_float32_follows_torchs_own_switch():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert config.precision_of(torch.float32) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert config.precision_of(torch.float32) == "tf32"
        assert config.precision_of(torch.float16) == "half"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("rows", [64, 256, 1024, 4096, 16384])
def test_the_choice_is_good_for_ragged_counts_not_only_for_balanced_ones(rows):
    """No other candidate may have fewer predicted microseconds on the tiles of any of many random routings."""

    def microseconds(candidate, counts):
        tiles = sum(math.ceil(n / candidate.BLOCK_M) for n in counts) * math.ceil(768 / candidate.BLOCK_N)
        slots = H200.multiprocessors * config.programs_per_multiprocessor(candidate, "half")
        fixed, step = config.estimated_us(candidate, "half")
        return math.ceil(tiles / slots) * (fixed + 768 / candidate.BLOCK_K * step)

    routings = [torch.bincount(torch.randint(0, 4, (rows,)), minlength=4).tolist() for _ in range(50)]
    mean = {c: sum(microseconds(c, r) for r in routings) / len(routings) for c in CANDIDATES["half"]["rows"]}
    assert mean[pick(rows)] <= 1.35 * min(mean.values())  # the prediction also guards against the worst routing


def test_a_measured_table_decides(monkeypatch):
    slow = {c.name(): [1000.0, 1000.0] for c in CANDIDATES["half"]["rows"]}
    fast = CANDIDATES["half"]["rows"][2]
    monkeypatch.setattr(config, "_tuned", lambda arch: {"half-rows": slow | {fast.name(): [0.1, 0.1]}})
    assert min(CANDIDATES["half"]["rows"], key=lambda c: predicted_us(c, "rows", "half", 4096, *BERT, H200)) == fast


@pytest.mark.parametrize("rows", [1, 300, 16384, 65536, 2**24])
def test_chunks_are_powers_of_two_for_about_four_waves(rows):
    chunk = pick_chunk(rows, 36, H200)
    assert chunk >= 256 and chunk & (chunk - 1) == 0
    if chunk > 256:
        assert 2 <= rows / chunk * 36 / 132 <= 4.1


def test_narrowing_limits_the_elements_of_a_thread():
    for candidates in CANDIDATES.values():
        for candidate in candidates["rows"]:
            narrow = candidate.narrowed(16)
            assert narrow.BLOCK_N == 16 or 16 * 32 * narrow.num_warps >= narrow.BLOCK_M * narrow.BLOCK_N
            assert narrow.BLOCK_N <= candidate.BLOCK_N
