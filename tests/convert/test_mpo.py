import math
from itertools import permutations, product

import pytest
import torch

from moebert_kernels import reference
from moebert_kernels.convert import FactorPlan, check_caps, mpo_decompose, plan_factors
from moebert_kernels.convert.mpo_plan import PUBLISHED, chain_flops_per_token
from moebert_kernels.errors import UserError
from moebert_kernels.nn.mpo_weight import mpo_bonds
from tests.golden_arrays import assert_golden, golden

ROWS, COLUMNS = (2, 2, 4, 3, 2), (3, 2, 2, 2, 2)  # of lowrank, rank1 ...
T5_ROWS, T5_COLUMNS = (4, 4, 8, 6, 4), (3, 4, 4, 4, 4)


def case(name):
    """Arrays of one golden case, its matrix and its factors."""
    arrays = golden("g_mpo", f"{name}/")
    rows, columns = (
        arrays[f"{which}_factors"].tolist() if f"{which}_factors" in arrays else list(default)
        for which, default in (("row", ROWS), ("col", COLUMNS))
    )
    return arrays, arrays["W"], rows, columns


def reconstructed(sites):
    """The matrix (prod i_k, prod j_k) that site tensors make: the only expert of a chain whose center is 1."""
    one, aux = sites[0].new_ones(1, 1, 1, 1), [site[None] for site in sites]
    return reference.mpo_expert_weights(one, aux, central_site=0)[0]


def relative_error(decomposition, weight):
    return float((reconstructed(decomposition.sites) - weight).norm() / weight.norm())


@pytest.mark.parametrize("name", ["wi", "wo"])
def test_golden_tensors_and_spectra(name):
    arrays, weight, rows, columns = case(name)
    got = mpo_decompose(weight, rows, columns)
    for k, site in enumerate(got.sites):
        assert_golden(site.abs(), arrays[f"cap30000/T{k}"].abs(), name=f"T{k}")
    for k, spectrum in enumerate(got.spectra):
        assert_golden(spectrum, arrays[f"bond{k + 1}"], name=f"bond {k + 1}")
    assert_golden(reconstructed(got.sites), weight)


def lost(got):
    """The root of the sum of the squares that the bonds lost, which bounds the error (MPOP, theorem 1)."""
    cut = (spectrum[bond:] for spectrum, bond in zip(got.spectra, got.bonds[1:-1], strict=True))
    return math.sqrt(sum(float(values.square().sum()) for values in cut))


@pytest.mark.parametrize("cap", [16, 8, 4])
@pytest.mark.parametrize("name", ["wi", "wo"])
def test_golden_truncations(name, cap):
    arrays, weight, rows, columns = case(name)
    got = mpo_decompose(weight, rows, columns, cap)
    assert list(got.bonds) == arrays[f"cap{cap}/bonds"].tolist()
    error = relative_error(got, weight)
    assert error == pytest.approx(float(arrays[f"cap{cap}/rel_err"]), rel=1e-5)
    assert error * float(weight.norm()) <= lost(got)
    if cap > 4:
        assert_golden(reconstructed(got.sites), arrays[f"cap{cap}/rec"])


@pytest.mark.parametrize("cap", [30000, 16, 12, 8])
def test_golden_low_rank_with_noise(cap):
    arrays, weight, rows, columns = case("lowrank")
    got = mpo_decompose(weight, rows, columns, cap)
    assert list(got.bonds) == arrays[f"cap{cap}/bonds"].tolist()
    assert relative_error(got, weight) == pytest.approx(float(arrays[f"cap{cap}/rel_err"]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["n3", "n2", "unit", "rank1", "kron", "zero", "const"])
def test_golden_edge_cases_are_finite_and_exact(name):
    arrays, weight, rows, columns = case(name)
    got = mpo_decompose(weight, rows, columns)
    assert list(got.bonds) == arrays["bonds"].tolist()
    assert all(torch.isfinite(site).all() for site in got.sites)
    assert_golden(reconstructed(got.sites), weight, tolerance=1e-6)
    for k, spectrum in enumerate(got.spectra):
        largest = arrays[f"bond{k + 1}"].max().clamp(min=1.0)
        assert float((spectrum - arrays[f"bond{k + 1}"]).abs().max() / largest) < 1e-6, name


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_low_rank_at_any_scale(rank, scale):
    weight = scale * (torch.randn(96, rank) @ torch.randn(rank, 48))
    got = mpo_decompose(weight, ROWS, COLUMNS)
    assert all(torch.isfinite(site).all() for site in got.sites)
    torch.testing.assert_close(reconstructed(got.sites), weight, rtol=1e-5, atol=scale * 1e-5)


@pytest.mark.parametrize(
    "rows, columns", [((6,), (4,)), ((6, 1), (1, 4)), ((5, 7), (3, 2)), ((2, 3, 2, 2, 1, 3, 2), (1, 2, 2, 3, 2, 1, 2))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_sites(rows, columns, dtype):
    weight = torch.randn(math.prod(rows), math.prod(columns)).to(dtype)
    got = mpo_decompose(weight, rows, columns)
    assert [tuple(site.shape[1:3]) for site in got.sites] == list(zip(rows, columns, strict=True))
    assert got.sites[0].dtype == dtype and got.bonds == mpo_bonds(rows, columns)
    exact = reconstructed([site.double() for site in got.sites])
    torch.testing.assert_close(exact, weight.double(), rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_the_roots_of_the_singular_values_are_on_both_sides():
    """Gauge: the left and right parts at each bond have orthogonal columns and rows of squared norm lambda."""
    _, weight, rows, columns = case("wi")
    got = mpo_decompose(weight.double(), rows, columns)
    left = torch.ones(1, 1, dtype=torch.float64)
    for k, spectrum in enumerate(got.spectra):
        left = (left @ got.sites[k].flatten(1)).view(-1, got.bonds[k + 1])
        torch.testing.assert_close(left.mT @ left, spectrum.diag())
    right = torch.ones(1, 1, dtype=torch.float64)
    for k in range(len(rows) - 1, 0, -1):
        right = (got.sites[k].flatten(0, 2) @ right).view(got.bonds[k], -1)
        torch.testing.assert_close(right @ right.mT, got.spectra[k - 1].diag())


def test_caps_per_bond_cut_the_smallest_singular_values():
    _, weight, rows, columns = case("wi")
    full, cut = mpo_decompose(weight, rows, columns), mpo_decompose(weight, rows, columns, [6, 9, 17, 3])
    assert cut.bonds == (1, 6, 9, 17, 3, 1)
    assert torch.equal(cut.sites[2].abs(), full.sites[2][:9, :, :, :17].abs())
    assert all(torch.equal(one, other) for one, other in zip(cut.spectra, full.spectra, strict=True))
    assert float((reconstructed(cut.sites) - weight).norm()) <= lost(cut)


def test_against_tensorly():
    """At the ranks that a matrix has, truncation loses nothing; both decompositions find them."""
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train_matrix
    from tensorly.tt_matrix import tt_matrix_to_matrix

    tensorly.set_backend("pytorch")
    bonds = (1, 4, 7, 3, 1)
    rows, columns = (2, 3, 2, 3), (3, 2, 3, 2)
    made = [torch.randn(bonds[k], rows[k], columns[k], bonds[k + 1], dtype=torch.float64) for k in range(4)]
    weight = reconstructed(made)
    torch.testing.assert_close(weight, tt_matrix_to_matrix(made))
    theirs = tensor_train_matrix(weight.view(*rows, *columns), rank=list(bonds))
    ours = mpo_decompose(weight, rows, columns, list(bonds[1:-1]))
    assert [site.shape for site in ours.sites] == [site.shape for site in theirs]
    torch.testing.assert_close(reconstructed(ours.sites), tt_matrix_to_matrix(theirs))
    torch.testing.assert_close(reconstructed(ours.sites), weight)


def test_a_t5_matrix_has_the_published_sizes():
    plan = plan_factors(3072, 768)
    assert (plan.row_factors, plan.col_factors) == (T5_ROWS, T5_COLUMNS)
    assert plan.bonds == (1, 12, 192, 384, 16, 1)
    assert plan.parameters == (144, 36864, 2359296, 147456, 256)
    assert plan.aux_parameters == 184720 and plan.central_site == 2


@pytest.mark.parametrize(
    "rows, columns, sites", [(3072, 768, 5), (2304, 640, 5), (512, 2048, 3), (13, 7, 4), (1, 1, 2)]
)
def test_plans_multiply_to_the_shape_in_the_best_order(rows, columns, sites):
    plan = plan_factors(rows, columns, sites)
    assert math.prod(plan.row_factors) == rows and math.prod(plan.col_factors) == columns
    assert len(plan.row_factors) == len(plan.col_factors) == sites
    orders = product(permutations(plan.row_factors), permutations(plan.col_factors))
    least = min(FactorPlan(i, j, mpo_bonds(i, j)).aux_parameters for i, j in set(orders))
    assert plan.aux_parameters == least or (rows, columns) in PUBLISHED
    weight = torch.randn(rows, columns)
    if weight.numel() < 10_000:
        assert mpo_decompose(weight, plan.row_factors, plan.col_factors).bonds == plan.bonds


def test_our_rule_is_as_good_as_the_published_factors(monkeypatch):
    published = plan_factors(3072, 768)
    monkeypatch.delitem(PUBLISHED, (3072, 768))
    ours = plan_factors(3072, 768)
    assert ours.central_parameters == published.central_parameters
    assert ours.aux_parameters < published.aux_parameters


def test_chain_contraction_wins_below_caps_of_ten():
    """FLOPs per token of the spec's table, in units of the dense GEMM."""
    dense = 2 * 3072 * 768
    for cap, times in {4: 0.177, 8: 0.667, 16: 2.318, 32: 6.568, 384: 292.1}.items():
        assert chain_flops_per_token(T5_ROWS, T5_COLUMNS, cap) / dense == pytest.approx(times, abs=0.05)
    check_caps(T5_ROWS, T5_COLUMNS, 10)
    with pytest.raises(UserError, match=r"max_bond: .* got bonds 1,9,9,9,9,1: 3,953,664 FLOPs .*0\.84 times"):
        check_caps(T5_ROWS, T5_COLUMNS, 9)


def test_refusals():
    weight = torch.randn(6, 4)
    for message, arguments in {
        r"weight: expected a matrix of floats, got torch.float32 of shape \(2, 3, 4\)":
            (torch.randn(2, 3, 4), (2, 3), (2, 2)),
        r"weight: expected a matrix of floats, got torch.int64 of shape \(6, 4\)": (weight.long(), (2, 3), (2, 2)),
        r"weight: expected a matrix of floats, got list": ([[1.0]], (1, 1), (1, 1)),
        r"weight: expected finite values": (weight / 0, (2, 3), (2, 2)),
        r"row_factors: expected a product of 6, got 2 x 2 = 4": (weight, (2, 2), (2, 2)),
        r"col_factors: expected a product of 4, got 2 x 3 = 6": (weight, (2, 3), (2, 3)),
        r"col_factors: expected 2 of them \(as row_factors\), got 1": (weight, (2, 3), (4,)),
        r"row_factors: expected integers >= 1, got \[-2, -3\]": (weight, (-2, -3), (2, 2)),
        r"row_factors: expected integers >= 1, got \[\]": (weight, (), ()),
        r"max_bond: expected integers >= 1, got 0": (weight, (2, 3), (2, 2), 0),
        r"max_bond: expected integers >= 1, got \[0\]": (weight, (2, 3), (2, 2), [0]),
        r"max_bond: expected 1 caps for 2 sites, got 2": (weight, (2, 3), (2, 2), [3, 3]),
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            mpo_decompose(*arguments)
    for message, arguments in {
        r"sites: expected 2 to 6, got 7": (6, 4, 7),
        r"rows: expected at least 1, got 0": (0, 4),
        r"max_bond: expected integers >= 1, got -1": (6, 4, 2, -1),
    }.items():
        with pytest.raises(UserError, match=message):
            plan_factors(*arguments)
    assert plan_factors(6, 4, 2, 2).bonds == (1, 2, 1)
