import copy
import weakref

import pytest
import torch
from torch.nn import functional as F

from moebert_kernels.errors import UserError
from moebert_kernels.nn import DenseExperts
from moebert_kernels.ops.group_tokens import group_tokens
from tests.nn.mpo import E, H, I, counted_folds, small_experts

ACTIVATIONS = ["relu", "gelu_tanh", "geglu", "geglu_tanh"]


def dense_copy(experts):
    """Dense experts with the folded weights."""
    bias = "none" if experts.b1 is None else "shared" if experts.b1.ndim == 1 else "expert"
    dense = DenseExperts(H, I, E, activation=experts.activation, bias=bias, hidden_dropout=experts.hidden_dropout)
    w1, w2 = experts.weights()
    state = {"w1": w1, "w2": w2, **{n: p for n, p in experts.named_parameters() if n in ("b1", "b2")}}
    dense.load_state_dict(state)
    return dense


def by_definition(experts, x, ids, p):
    """One token and one expert at a time."""
    (w1, w2), (b1, b2) = experts.weights(), experts.biases()
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = ids[t, j]
            if e < 0:
                continue
            h = w1[e] @ x[t] + (0 if b1 is None else b1[e])
            if experts.activation.startswith("geglu"):
                gate, up = h.chunk(2)
                h = F.gelu(gate, approximate="tanh" if experts.activation == "geglu_tanh" else "none") * up
            else:
                h = F.relu(h) if experts.activation == "relu" else F.gelu(h, approximate="tanh")
            y[t] += p[t, j] * (w2[e] @ h + (0 if b2 is None else b2[e]))
    return y


@pytest.mark.parametrize("bias", ["none", "expert", "shared"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_computes_the_definition(activation, bias):
    experts = small_experts(activation=activation, bias=bias).double()
    for b in (experts.b1, experts.b2):
        if b is not None:
            torch.nn.init.normal_(b)
    x = torch.randn(9, H, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(-1, E, (9, 2))
    p = torch.rand(9, 2, dtype=torch.float64)
    y, wanted = experts(x, ids, p), by_definition(experts, x, ids, p)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    parameters = [x, *experts.parameters()]
    for got, want in zip(
        torch.autograd.grad(y, parameters, dy), torch.autograd.grad(wanted, parameters, dy), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_same_as_dense_experts_with_the_folded_weights():
    experts = small_experts(bias="expert")
    x, grouping = torch.randn(3, 5, H), group_tokens(torch.randint(0, E, (15,)), E)
    torch.testing.assert_close(experts(x, grouping), dense_copy(experts)(x, grouping))
    assert sum(p.numel() for p in DenseExperts(H, I, E).parameters()) == 2 * E * H * I


@pytest.mark.parametrize("activation", ["relu", "geglu_tanh"])
def test_dropout_between_the_matrices_in_training_only(activation):
    experts = small_experts(activation=activation, hidden_dropout=0.5)
    x, ids = torch.randn(6, H), torch.arange(6) % E
    torch.manual_seed(1)
    first = experts(x, ids)
    torch.manual_seed(1)
    assert torch.equal(experts(x, ids), first)
    assert not torch.allclose(experts(x, ids), first)
    experts.eval()
    assert torch.equal(experts(x, ids), experts(x, ids))


def test_experts_without_tokens_get_zero_gradients():
    experts = small_experts()
    experts(torch.randn(4, H), torch.tensor([1, 1, 2, 1])).sum().backward()
    assert not experts.w1.aux[0].grad[0].any() and not experts.w2.aux[1].grad[3].any()
    assert experts.w1.aux[0].grad[1].any()


@torch.inference_mode()
def test_few_hot_experts_compute_the_same_and_are_rebuilt_when_they_cooled_down():
    experts = small_experts(bias="expert").eval()
    torch.nn.init.normal_(experts.b1)
    x, ids = torch.randn(2, 7, H), torch.randint(-1, E, (2, 7, 2))
    p = torch.rand(2, 7, 2)
    wanted = experts(x, ids, p)
    for size in (1, 2, 3, E, 2 * E):
        experts.fold(hot_experts=size)
        torch.testing.assert_close(experts(x, ids, p), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert experts(x, ids, p).dtype == torch.bfloat16
    experts.fold(hot_experts=2)

    def folds(*tokens):
        with counted_folds() as folds:
            experts(torch.randn(len(tokens), H), torch.tensor(tokens))
        return folds.call_count // 2

    assert [folds(0), folds(0), folds(1), folds(0, 1), folds(2), folds(0), folds(2, 0)] == [1, 0, 1, 0, 1, 1, 0]
    assert folds(2, 3) == 1 and folds(2) == 0 and folds(3) == 0 and folds(0) == 1
    experts.w1.central.data = experts.w1.central.data * 2
    assert folds(0) == 1


def test_kept_folds_of_a_layer_hold_until_something_changes():
    experts = small_experts().eval()
    x, ids = torch.randn(3, H), torch.tensor([0, 1, 0])

    def folds():
        with torch.no_grad(), counted_folds() as folds:
            y = experts(x, ids)
        torch.testing.assert_close(y, copy.deepcopy(experts)(x, ids).detach())
        return folds.call_count

    assert [folds(), folds()] == [2, 0]
    changes = [
        (lambda: experts.w2.aux[0].detach().mul_(2), 1),
        (lambda: setattr(experts.w1, "central", torch.nn.Parameter(experts.w1.central.detach() * 2)), 1),
        (lambda: experts.w1.unfold(), 1),
        (lambda: experts.train().eval(), 2),
        (lambda: experts.load_state_dict(copy.deepcopy(experts.state_dict())), 2),
    ]
    for change, count in changes:
        change()
        assert [folds(), folds()] == [count, 0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert experts(x, ids).dtype == torch.bfloat16
    assert [folds(), folds()] == [2, 0]
    kept = weakref.ref(experts.w1._folded[1])
    experts.train()
    assert kept() is None  # training needs that memory


def test_hot_experts_see_changes_of_parameters():
    experts = small_experts().eval()
    experts.fold(hot_experts=2)
    x, ids = torch.randn(3, H), torch.tensor([0, 1, 0])
    with torch.inference_mode():
        experts(x, ids)
    with torch.no_grad():
        before = experts(x, ids)
        experts.w2.aux[0].mul_(3)
        after = experts(x, ids)
    torch.testing.assert_close(after, 3 * before)
    optimizer = torch.optim.AdamW(experts.train().parameters(), lr=0.1, fused=True)  # leaves version counters alone
    experts(x, ids).sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(experts.eval()(x, ids), copy.deepcopy(experts)(x, ids))
        assert not torch.equal(experts(x, ids), after)
    assert experts(x, ids).requires_grad  # a wanted gradient folds as in training


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: small_experts(activation="tanh"), "activation: expected one of .*geglu_tanh, .*got 'tanh'"),
        (lambda: small_experts(bias="both"), "bias: expected one of none, expert, shared, got 'both'"),
        (lambda: small_experts().fold(hot_experts=0), "hot_experts: expected at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
