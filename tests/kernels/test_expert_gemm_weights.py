"""Weight gradients in one order of steps, whatever programs share it, and the sums beside them."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from moebert_kernels import group_tokens
from moebert_kernels.kernels.column_sums import Summand, add_chunks, column_sums
from moebert_kernels.kernels.config import Config
from moebert_kernels.kernels.expert_gemm_weights import Product, expert_gemm_weights, num_programs
from moebert_kernels.kernels.tiles import num_chunks

CONFIG = Config(16, 32, 16, 4, 2)
E = 4
ROUTINGS = {
    "even": torch.arange(90) % E,
    "skewed": torch.where(torch.arange(90) < 70, 2, 0),  # 1 and 3 have no rows
    "skipped": torch.arange(90) % (E + 1) - 1,
    "none": torch.full((5,), -1),
}


@pytest.fixture(params=ROUTINGS)
def grouping(request, device):
    return group_tokens(ROUTINGS[request.param].to(device), E)


def rows_of(grouping):
    """The tokens of each expert."""
    bounds = grouping.offsets.tolist()
    return [grouping.row_to_assignment[first:end].long() for first, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("programs", [1, 2, 7, 1000])
def test_two_products(grouping, programs, device):
    tokens = grouping.num_rows
    x, dy = torch.randn(tokens, 40, device=device), torch.randn(tokens, 20, device=device)
    order = grouping.row_to_assignment.long()
    products = [
        Product(dy[order], x, x.new_empty(E, 20, 40), False, True),
        Product(x, dy[order], x.new_empty(E, 40, 20), True, False),
    ]
    count = num_programs(products, grouping, CONFIG, programs)
    assert count <= programs
    expert_gemm_weights(products, x.new_empty(2 * count, 16, 32), grouping, config=CONFIG)
    for e, mine in enumerate(rows_of(grouping)):
        wanted = dy[mine].double().T @ x[mine].double()
        torch.testing.assert_close(products[0].dw[e].double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(products[1].dw[e].double(), wanted.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("blocks", [1, 3, 5])
@pytest.mark.parametrize("more", [1, 2, 7, 100])
def test_more_programs_than_steps(more, blocks, tiles, device):
    """Their number is from an upper bound: some have nothing to do, also between two that share a tile."""
    experts = torch.zeros(blocks * CONFIG.BLOCK_K, dtype=torch.long, device=device)  # the other experts are empty
    grouping = group_tokens(experts, 2)
    a, b = torch.randn(len(experts), 16, device=device), torch.randn(len(experts), 32 * tiles, device=device)
    product = Product(a, b, a.new_empty(2, 16, 32 * tiles))
    programs = (blocks + 1) * tiles + more
    expert_gemm_weights([product], a.new_empty(2 * programs, 16, 32), grouping, config=CONFIG)
    torch.testing.assert_close(product.dw[0].double(), a.double().T @ b.double(), rtol=1e-5, atol=1e-5)
    assert not product.dw[1].any()


def test_one_product_has_the_same_bits_every_time(grouping, device):
    a, b = torch.randn(grouping.num_rows, 20, device=device), torch.randn(grouping.num_rows, 40, device=device)

    def dw():
        product = Product(a, b, a.new_empty(E, 20, 40))
        count = num_programs([product], grouping, CONFIG, 5)
        expert_gemm_weights([product], a.new_empty(2 * count, 16, 32), grouping, config=CONFIG)
        return product.dw

    assert torch.equal(dw(), dw())


@pytest.mark.parametrize("second", [None, "plain", "weighted"])
@pytest.mark.parametrize("gather", [False, True])
def test_column_sums(grouping, gather, second, device, monkeypatch):
    """Of one summand or two, of which each is gathered, weighted or neither, beside what another kernel left."""
    monkeypatch.setattr("moebert_kernels.kernels.column_sums.SUMS_CHUNK", 16)
    p = torch.rand(grouping.num_rows, 1, device=device)
    summands = [Summand(torch.randn(grouping.num_rows, 200, device=device), p, gather)]
    if second is not None:
        plain = Summand(torch.randn(grouping.num_rows, 130, device=device))
        summands.insert(0 if second == "weighted" else 1, plain)
    widths = [summand.a.shape[1] for summand in summands]
    partials = p.new_zeros(num_chunks(grouping.num_rows, E, 16), 30 + sum(widths))
    column_sums(summands, partials[:, 30:], grouping)
    sums = [p.new_empty(E, width) for width in widths]
    before = p.new_empty(E, 20)
    add_chunks(partials, ((before, 20), (None, 10), *zip(sums, widths, strict=True)), grouping.offsets, 16)
    assert not before.any()
    for e, mine in enumerate(rows_of(grouping)):
        first = int(grouping.offsets[e])
        for (a, weights, gathered), total in zip(summands, sums, strict=True):
            rows = a[mine if gathered else torch.arange(first, first + len(mine), device=device)]
            wanted = (rows if weights is None else p[mine] * rows).sum(0)
            torch.testing.assert_close(total[e], wanted, rtol=1e-5, atol=1e-5)
