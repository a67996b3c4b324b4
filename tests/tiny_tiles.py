"""Small tiles, chunks and spans for Triton's kernels, so that tensors of a few dozen rows have several of each."""

from moebert_kernels.kernels import (
    column_sums,
    config,
    fused_moe_ffn_add_norm,
    group_tokens,
    launch,
    mpo_expert_weights,
)
from moebert_kernels.triton_backend import add_norm_in_order, expert_gemm

TILE, CHUNK = 16, 16


def use_tiny_tiles(monkeypatch) -> None:
    """Patch what chooses sizes; nothing else changes."""
    rows = config.Config(BLOCK_M=TILE, BLOCK_N=TILE, BLOCK_K=TILE, num_warps=4, num_stages=2)
    weights = config.Config(BLOCK_M=TILE, BLOCK_N=2 * TILE, BLOCK_K=TILE, num_warps=4, num_stages=2)
    for precision in config.CANDIDATES:
        monkeypatch.setitem(config.CANDIDATES, precision, {"rows": (rows,), "weights": (weights,)})
        monkeypatch.setitem(mpo_expert_weights.CONFIGS, precision, mpo_expert_weights.FoldConfig(*[TILE] * 4, 4, 2))
    config.pick.cache_clear()
    launch.forget()
    for module in (expert_gemm, column_sums, add_norm_in_order, fused_moe_ffn_add_norm):
        monkeypatch.setattr(module, "SUMS_CHUNK", CHUNK)
    monkeypatch.setattr(group_tokens, "_SPAN", 32)
    monkeypatch.setattr(group_tokens, "_COMPARISONS", 128)
    monkeypatch.setattr(group_tokens, "_SPANS_AT_ONCE", 2)
