"""The balanced assignment against the exact solution of the transportation problem, which scipy finds."""

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linprog

from moebert_kernels.convert.assignment import balanced_assignment


def problem(n, E, seed=0):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(n, 1, generator=generator) + 0.3 * torch.rand(n, E, generator=generator)
    errors -= 0.05 * torch.arange(E) / E  # the last expert is the best one for most
    counts = (5000 / torch.arange(5, n + 5)).ceil()
    return errors, counts


def exact(errors, counts, max_load):
    """The least sum of errors where types may be divided: a lower bound."""
    n, E = errors.shape
    shares = np.repeat(counts.double().numpy(), E)
    rows = np.tile(np.arange(E), n), np.arange(n * E)
    loads = sparse.csr_matrix((shares, rows), shape=(E, n * E))
    whole = sparse.csr_matrix((np.ones(n * E), (np.repeat(np.arange(n), E), np.arange(n * E))), shape=(n, n * E))
    room = np.full(E, max(max_load * float(counts.sum()) / E, float(counts.max())))
    costs = errors.double().numpy().ravel() * shares
    return linprog(costs, A_ub=loads, b_ub=room, A_eq=whole, b_eq=np.ones(n)).fun


@pytest.mark.parametrize(("n", "E"), [(40, 2), (300, 4), (300, 8)])
@pytest.mark.parametrize("max_load", [1.02, 1.1, 1.5])
def test_close_to_the_exact_solution_and_balanced(n, E, max_load):
    errors, counts = (t.double() for t in problem(n, E))
    expert, prices = balanced_assignment(errors, counts, max_load)
    loads = torch.zeros(E).double().index_add_(0, expert, counts)
    least = float((errors.min(1).values * counts).sum())
    best, got = exact(errors, counts, max_load), float((errors.gather(1, expert[:, None])[:, 0] * counts).sum())
    random = float((errors.mean(1) * counts).sum())
    assert least <= best <= got * (1 + 1e-6)
    assert got - best <= 0.1 * (random - best)
    assert (prices >= 0).all()
    assert loads.max() <= max_load * counts.sum() / E + 1e-3


def test_without_a_limit_each_type_takes_its_best():
    errors, counts = problem(50, 4)
    expert, prices = balanced_assignment(errors, counts, 4.0)
    assert torch.equal(expert, errors.argmin(1))
    assert not prices.any()


def test_a_type_larger_than_the_room_has_an_expert():
    """Half of all tokens are of one type: no table can be balanced, and the others stay away from its expert."""
    errors, counts = problem(21, 4)
    counts = torch.cat([counts[:20] * 0 + 1, torch.tensor([20.0])])
    expert, _ = balanced_assignment(errors, counts, 1.1)
    loads = torch.zeros(4).index_add_(0, expert, counts)
    assert loads.max() == 20


@pytest.mark.parametrize("E", [1, 3])
def test_one_expert_and_no_types(E):
    assert balanced_assignment(torch.rand(0, E), torch.zeros(0), 1.1).expert.shape == (0,)
    assert balanced_assignment(torch.rand(5, 1), torch.ones(5), 1.1).expert.tolist() == [0] * 5


def test_types_without_tokens_take_the_best_at_the_prices():
    errors, counts = problem(60, 3)
    counts[40:] = 0
    expert, prices = balanced_assignment(errors, counts, 1.0)
    assert torch.equal(expert[40:], (errors[40:].double() + prices).argmin(1))
