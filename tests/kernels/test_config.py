import math

import pytest
import torch

pytest.importorskip("triton")

from moebert_kernels.kernels import config
from moebert_kernels.kernels.config import CANDIDATES, Config, Device, candidates, pick_config, predicted_us

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
    config.pick.cache_clear()
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
        programs = config.programs_per_multiprocessor(candidate, "rows", "half", H200)
        at_once = min(programs, math.ceil(tiles / H200.multiprocessors))
        fixed, step = config.estimated_us(candidate, "half", H200, at_once)
        return math.ceil(tiles / (H200.multiprocessors * programs)) * (fixed + 768 / candidate.BLOCK_K * step)

    routings = [torch.bincount(torch.randint(0, 4, (rows,)), minlength=4).tolist() for _ in range(50)]
    mean = {c: sum(microseconds(c, r) for r in routings) / len(routings) for c in CANDIDATES["half"]["rows"]}
    assert mean[pick(rows)] <= 1.35 * min(mean.values())  # the prediction also guards against the worst routing


def test_a_measured_table_decides(monkeypatch):
    slow = {c.name(): [1000.0, 1000.0] for c in CANDIDATES["half"]["rows"]}
    fast = CANDIDATES["half"]["rows"][2]
    monkeypatch.setattr(config, "_tuned", lambda arch: {"half-rows": slow | {fast.name(): [0.1, 0.1]}})
    assert min(CANDIDATES["half"]["rows"], key=lambda c: predicted_us(c, "rows", "half", 4096, *BERT, H200)) == fast


KINDS = ["rows", "residual", "hidden", "backward", "gated", "gated_backward", "weights"]
DESCRIPTORS = ["descriptors", "hidden_descriptors", "backward_descriptors"]


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 1000, 10**5])
def test_what_is_chosen_fits_into_shared_memory(rows, kind, arch):
    device = Device(arch, 100)
    for dtype in (torch.bfloat16, torch.float32):
        chosen, precision = pick(rows, kind, dtype, device=device), config.precision_of(dtype)
        if kind == "weights":
            chosen = chosen.gathering()
        assert config.resources_of(chosen, kind, precision, device)[1] <= device.shared_bytes - 1024
        assert chosen.BLOCK_N < 256 or arch in (90, 100)


def test_every_tile_was_compiled_for_every_kind():
    """No guess stands behind a choice in 16 bits."""
    for arch in (80, 90, 100):
        for kind in KINDS:
            table = config._occupancy()[f"sm_{arch}"][f"half-{kind}"]
            assert all(candidate.name() in table for candidate in candidates(kind, "half", arch))
    for kind in DESCRIPTORS:
        table, found = config._occupancy()["sm_90"][f"half-{kind}"], candidates(kind, "half", 90)
        assert found and all(candidate.name() in table for candidate in found)
        assert (
            not candidates(kind, "half", 80) and not candidates(kind, "half", 100) and not candidates(kind, "tf32", 90)
        )


@pytest.mark.parametrize("kind", ["rows", "residual", "descriptors", "hidden", "backward", "gated", "gated_backward"])
def test_two_tiles_of_128_by_128_share_a_multiprocessor_of_hopper(kind):
    tile = Config(128, 128, 64, 8, 3)
    tile = tile.narrowed(config.GATED_ACCUMULATORS) if kind.startswith("gated") else tile
    assert config.programs_per_multiprocessor(tile, kind, "half", H200) == 2


def test_many_rows_take_the_widest_tiles_on_hopper():
    assert (pick(65536).BLOCK_M, pick(65536).BLOCK_N) == (128, 256)
    assert pick(65536, "weights").BLOCK_N == 256


def test_a_device_without_the_shared_memory_has_no_such_program():
    assert config.programs_per_multiprocessor(Config(128, 256, 64, 8, 3), "rows", "half", Device(86, 84)) == 0


def test_narrowing_limits_the_elements_of_a_thread():
    for tiles in CANDIDATES.values():
        for candidate in tiles["rows"]:
            narrow = candidate.narrowed(16)
            assert narrow.BLOCK_N == 16 or 16 * 32 * narrow.num_warps >= narrow.BLOCK_M * narrow.BLOCK_N
            assert narrow.BLOCK_N <= candidate.BLOCK_N


def test_waves_count_tiles_over_slots():
    tall = {c.BLOCK_N: c for c in CANDIDATES["half"]["rows"] if c.BLOCK_M == 128}
    tile, wide = tall[128], tall[256]
    # 4096 / 128 + 2 = 34 row tiles expected, 31 + 4 = 35 at most, 6 columns of tiles each, over 264 slots
    assert config.mean_waves(tile, "rows", "half", 4096, 4, 768, H200) == 1
    assert config.mean_waves(tile, "residual", "half", 4096, 4, 768, H200) == 1
    # 66 row tiles, 3 columns of wide tiles each, over 132 slots
    assert config.mean_waves(wide, "rows", "half", 8192, 4, 768, H200) == 2
    assert config.mean_waves(tile, "rows", "half", 128, 1, 128, H200) == 1
