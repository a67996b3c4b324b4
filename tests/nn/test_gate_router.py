import pytest
import torch

from moebert_kernels.errors import UserError
from moebert_kernels.nn import BalanceWindow, GateRouter, balance_loss
from moebert_kernels.nn.balance import Balance

B, T, H, E = 3, 7, 8, 4


def inputs():
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, 4:] = 0
    mask[2, 1:] = 0
    return torch.randn(B, T, H), mask


def test_balance_loss_is_1_when_even_and_e_when_not():
    assert balance_loss(torch.full((8, E), 1 / E), torch.arange(8) % E) == pytest.approx(1.0)
    sure = torch.zeros(8, E)
    sure[:, 2] = 1
    assert balance_loss(sure, torch.full((8,), 2)) == pytest.approx(E)


def test_balance_loss_leaves_out_what_is_not_counted():
    probabilities = torch.rand(10, E).softmax(-1)
    expert_ids = probabilities.argmax(-1)
    counted = torch.tensor([True] * 6 + [False] * 4)
    wanted = balance_loss(probabilities[:6], expert_ids[:6])
    assert balance_loss(probabilities, expert_ids, counted) == pytest.approx(wanted.item())
    assert balance_loss(probabilities, expert_ids, torch.zeros(10, dtype=torch.bool)) == 0


@pytest.mark.parametrize("per", ["token", "sentence"])
def test_padding_changes_nothing(per):
    x, mask = inputs()
    router = GateRouter(H, E, per)
    expert_ids, weights, loss = router(x, mask)
    noisy = torch.where(mask.bool()[..., None], x, 100 * torch.randn_like(x))
    noisy_ids, noisy_weights, noisy_loss = router(noisy, mask)

    assert torch.equal(expert_ids, noisy_ids)
    assert torch.equal(expert_ids == -1, mask == 0)
    assert torch.equal(weights[mask.bool()], noisy_weights[mask.bool()])
    assert torch.equal(loss, noisy_loss)


@pytest.mark.parametrize("per", ["token", "sentence"])
def test_no_mask_is_a_mask_of_ones(per):
    x, mask = inputs()
    router = GateRouter(H, E, per)
    for got, wanted in zip(router(x), router(x, torch.ones_like(mask)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_routed_padding_is_counted():
    x, mask = inputs()
    router = GateRouter(H, E, "token", route_padding=True)
    for got, wanted in zip(router(x, mask), router(x), strict=True):
        assert torch.equal(got, wanted)


def test_a_sentence_goes_to_one_expert_whatever_its_batch():
    x, mask = inputs()
    router = GateRouter(H, E, "sentence")
    expert_ids, weights, _ = router(x, mask)
    for i in range(B):
        alone_ids, alone_weights, _ = router(x[i : i + 1], mask[i : i + 1])
        length = int(mask[i].sum())
        assert len(set(expert_ids[i, :length].tolist())) == 1
        assert torch.equal(alone_ids[0], expert_ids[i])
        torch.testing.assert_close(alone_weights[0], weights[i])


def test_original_batch1_leaves_the_probability_out():
    x, mask = inputs()
    router = GateRouter(H, E, "sentence", original_batch1=True)
    expert_ids, weights, loss = router(x[:1], mask[:1])
    assert weights is None and loss == 0
    assert torch.equal(expert_ids[0], router(x, mask)[0][0])
    assert router(x, mask)[1] is not None


def test_a_sentence_of_padding_alone_is_finite():
    x, mask = inputs()
    mask[1] = 0
    expert_ids, weights, loss = GateRouter(H, E, "sentence")(x, mask)
    assert expert_ids[1].tolist() == [-1] * T
    assert weights.isfinite().all() and loss.isfinite()


@pytest.mark.parametrize("per", ["token", "sentence"])
def test_dtypes(per):
    x, mask = inputs()
    router = GateRouter(H, E, per)
    exact_ids, _, exact_loss = router(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        expert_ids, weights, loss = router(x, mask)
    assert torch.equal(expert_ids, exact_ids) and torch.equal(loss, exact_loss)
    assert weights.dtype == torch.float32
    _, weights, loss = router.bfloat16()(x.bfloat16(), mask)
    assert weights.dtype == torch.bfloat16 and loss.dtype == torch.float32


def test_gradcheck():
    x, mask = inputs()
    for per in ("token", "sentence"):
        router = GateRouter(H, E, per).double()
        torch.autograd.gradcheck(lambda x, router=router: router(x, mask)[1:], x.double().requires_grad_())


def test_rejects_an_unknown_kind():
    with pytest.raises(UserError, match="per: expected 'token' or 'sentence', got 'word'"):
        GateRouter(H, E, "word")


def test_parts_of_a_window_make_up_its_balance_loss():
    """Value and gradient, of gates and of sequences, also where a part holds nothing that counts."""
    torch.manual_seed(0)
    logits, ids = torch.randn(6, 5, E, dtype=torch.float64, requires_grad=True), torch.randint(0, E, (6, 5))
    counted = torch.rand(6, 5) < 0.7
    counted[:, 0], counted[4] = True, False  # a part that is all padding
    for per_sequence in (False, True):
        balance = Balance(E, per_sequence)
        whole = balance(logits.softmax(-1), ids, counted)
        window, parts = BalanceWindow(balance), [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6)]
        assert window.needs_pass != per_sequence
        with torch.no_grad(), window.counting(torch.device("cpu"), len(logits)):
            for part in parts if window.needs_pass else ():
                balance(logits[part].softmax(-1), ids[part], counted[part])
        total = 0.0
        for part, share in zip(parts, (0.3, 0.2, 0.1, 0.4), strict=True):
            with window.part(share):
                total = total + share * balance(logits[part].softmax(-1), ids[part], counted[part])
        torch.testing.assert_close(total, whole)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (total, whole)))
