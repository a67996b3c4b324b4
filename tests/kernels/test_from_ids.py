"""Few tokens with expert ids: the CUDA forms get the ids, and nobody groups them."""

import pytest
import torch

from moebert_kernels import backend, fused_moe_ffn, fused_moe_ffn_add_norm, group_tokens, reference
from moebert_kernels.cuda_backend import fused_moe_ffn as cuda_ffn
from moebert_kernels.cuda_backend import fused_moe_ffn_add_norm as cuda_add_norm
from moebert_kernels.cuda_backend import tiny_ffn
from moebert_kernels.grouping import Grouping

E, H, I = 4, 16, 24
CUDA = {"fused_moe_ffn": cuda_ffn, "fused_moe_ffn_add_norm": cuda_add_norm}


@pytest.fixture
def seen(monkeypatch):
    """What `tiny_ffn` got as routing; it runs as the reference, and anything else of these two ops fails."""
    found = []

    def add_norm(x, routing, w1, b1, w2, b2, norm_weight, norm_bias, weights, eps, activation):
        found.append(routing)
        if isinstance(routing, Grouping):
            routing = torch.searchsorted(routing.offsets[1:], routing.assignment_to_row, right=True)
        if norm_weight is None:
            return reference.fused_moe_ffn(x, routing, w1, b1, w2, b2, routing_weights=weights, activation=activation)
        return reference.fused_moe_ffn_add_norm(
            x, routing, w1, b1, w2, b2, norm_weight, norm_bias, routing_weights=weights, eps=eps, activation=activation
        )  # fmt: skip

    honest = backend.implementation
    monkeypatch.setattr(tiny_ffn, "add_norm", add_norm)
    monkeypatch.setattr(tiny_ffn, "applies", lambda x, top_k, w1: top_k == 1 and x.shape[0] <= 256)
    monkeypatch.setattr(backend, "implementation", lambda op, x: CUDA[op] if op in CUDA else honest(op, x))
    return found


def call(op, x, routing, p=None, **options):
    torch.manual_seed(1)
    made = [torch.randn(E, I, H), torch.randn(E, I), torch.randn(E, H, I), torch.randn(E, H)]
    norm = [torch.rand(E, H), torch.rand(E, H)] if "add_norm" in op.__name__ else []
    return op(x, routing, *made, *norm, routing_weights=p, **options)


@pytest.mark.parametrize("op", [fused_moe_ffn, fused_moe_ffn_add_norm])
@pytest.mark.parametrize("weighted", [False, True])
def test_ids_reach_the_kernels_as_they_are(op, weighted, seen, monkeypatch):
    monkeypatch.setitem(CUDA, "group_tokens", None)  # would fail
    x, ids = torch.randn(3, 7, H), torch.randint(-1, E + 1, (3, 7))
    p = torch.rand(3, 7) if weighted else None
    naive = getattr(reference, op.__name__)
    for routing, weights in ((ids, p), (ids[..., None], None if p is None else p[..., None])):
        y = call(op, x, routing, weights)
        assert y.shape == x.shape and seen[-1].shape == (21, 1) and torch.equal(seen[-1][:, 0], ids.flatten())
        flat = call(naive, x.view(21, H), ids.flatten(), None if p is None else p.flatten())
        torch.testing.assert_close(y.view(21, H), flat)
    assert len(seen) == 2


@pytest.mark.parametrize("op", [fused_moe_ffn, fused_moe_ffn_add_norm])
def test_a_grouping_reaches_them_too(op, seen):
    x, ids = torch.randn(9, H), torch.randint(-1, E, (9,))
    y = call(op, x, group_tokens(ids, E))
    assert isinstance(seen[0], Grouping)
    torch.testing.assert_close(y, call(getattr(reference, op.__name__), x, ids))


@pytest.mark.parametrize("op", [fused_moe_ffn, fused_moe_ffn_add_norm])
def test_training_dropout_and_many_tokens_go_another_way(op, seen, monkeypatch):
    taken = []
    for module in CUDA.values():
        monkeypatch.setattr(module, "forward", lambda x, *rest: taken.append(rest[0]) or (x, x, x))
    ids = torch.randint(0, E, (600,))
    call(op, torch.randn(600, H), ids)
    call(op, torch.randn(5, H), ids[:5], hidden_dropout_p=0.5)
    call(op, torch.randn(5, H, requires_grad=True), ids[:5])
    assert not seen and len(taken) == 3 and all(isinstance(routing, Grouping) for routing in taken)
