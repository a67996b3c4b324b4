import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from moebert_kernels import dropout  # noqa: E402
from moebert_kernels.kernels.dropout import keep_tile  # noqa: E402


@triton.jit
def _keep_kernel(Seed, Rows, Keep, first_column, threshold, COLUMNS: tl.constexpr, STREAM: tl.constexpr):
    row = tl.arange(0, 16)
    keep = keep_tile(Seed, tl.load(Rows + row), first_column, threshold, COLUMNS, STREAM)
    tl.store(Keep + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 17, -3])
@pytest.mark.parametrize("stream", [dropout.HIDDEN_STREAM, dropout.OUTPUT_STREAM])
def test_same_bits_as_the_other_backends(seed, stream, device):
    rows = torch.cat([torch.arange(8), 2**32 - 4 + torch.arange(8)]).to(device)
    seed = torch.tensor(seed, device=device)
    got = torch.empty(16, 32, dtype=torch.int8, device=device)
    for first_column in (0, 64):
        _keep_kernel[(1,)](
            seed, rows, got, first_column, dropout.threshold(0.3), COLUMNS=32, STREAM=stream
        )  # fmt: skip
        wanted = dropout.keep_mask(seed, rows, first_column + 32, 0.3, stream)[:, first_column:]
        assert torch.equal(got.bool(), wanted)
