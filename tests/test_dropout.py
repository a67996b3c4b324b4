import torch

from moebert_kernels import dropout

MASK32 = 0xFFFFFFFF


def philox_scalar(counter, key):
    """The generator in Python ints, from the paper's definition, with this package's number of rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(dropout.ROUNDS):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def test_known_answer_of_ten_rounds(monkeypatch):
    monkeypatch.setattr(dropout, "ROUNDS", 10)
    # Random123's known-answer vectors for philox4x32-10
    assert philox_scalar((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = (MASK32,) * 4
    assert philox_scalar(ones, ones[:2]) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def test_mask_is_the_documented_function_of_seed_row_and_column():
    seed, rows, columns, p = 2**63 - 12345, torch.tensor([0, 5, 2**33 + 1]), 19, 0.37
    mask = dropout.keep_mask(torch.tensor(seed), rows, columns, p, dropout.OUTPUT_STREAM)
    for r, row in enumerate(rows.tolist()):
        for c in range(columns):
            words = philox_scalar((c // 8, row & MASK32, row >> 32, 1), (seed & MASK32, seed >> 32))
            bits = words[c % 8 // 2] >> (16 * (c % 2)) & 0xFFFF
            assert mask[r, c].item() == (bits >= dropout.threshold(p))


def test_rate_scale_and_streams():
    rows = torch.arange(2000)
    seed = torch.tensor(1)
    hidden = dropout.keep_mask(seed, rows, 64, 0.1, dropout.HIDDEN_STREAM)
    output = dropout.keep_mask(seed, rows, 64, 0.1, dropout.OUTPUT_STREAM)
    assert abs(hidden.float().mean().item() - 0.9) < 0.003
    assert abs((hidden == output).float().mean().item() - 0.82) < 0.005  # independent: 0.9^2 + 0.1^2
    assert abs(dropout.scale(0.1) * (1 - dropout.threshold(0.1) / 65536) - 1) < 1e-15


def test_rows_may_come_in_any_order():
    rows = torch.randperm(50)
    whole = dropout.keep_mask(torch.tensor(3), torch.arange(50), 33, 0.5, 0)
    assert torch.equal(dropout.keep_mask(torch.tensor(3), rows.int(), 33, 0.5, 0), whole[rows])
