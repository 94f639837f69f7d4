"""Experts' sums drawn towards their group's: by hand, against float64, and nearer the truth."""

import pytest
import torch

from sparse_expansion.algorithms.hessian import hessian_sum, merge_hessians
from sparse_expansion.algorithms.shrinkage import (
    WHITENING_DAMPING,
    Regulariser,
    ShrinkTarget,
    shrink,
)
from sparse_expansion.config import CompressionConfig
from sparse_expansion.types import CompressionError, HessianSum


def shrunk(part, whole):
    return shrink(part, ShrinkTarget(whole))


def test_shrinking_by_hand():
    """A mean of 2 I against a group's of I, whose damping is a tenth."""
    whole = HessianSum(torch.eye(2) * 10, 10)
    # Whitened by 1.1: |S|^2 = 8, tr(S)^2 = 16 and |S - T|^2 = 2, each over 1.21.
    found, weight = shrunk(HessianSum(torch.eye(2) * 200, 100), whole)
    assert weight == pytest.approx((8 + 16) / 100 / 2)
    assert torch.allclose(found.sum_DD, torch.eye(2) * 100 * (0.88 * 2 + 0.12))
    assert found.num_tokens == 100
    found, weight = shrunk(HessianSum(torch.eye(2) * 4, 2), whole)
    assert weight == 1.0 and torch.allclose(found.sum_DD, torch.eye(2) * 2)


def oracle_weight(part, whole):
    """The definition in float64, whitened by a symmetric root in place of a Cholesky factor."""
    S, T = (total.sum_DD.double() / total.num_tokens for total in (part, whole))
    damped = T + WHITENING_DAMPING * T.diagonal().diag()
    values, vectors = torch.linalg.eigh(damped)
    root = vectors @ values.rsqrt().diag() @ vectors.T
    A, B = root @ S @ root, root @ T @ root
    noise = (A.square().sum() + A.trace() ** 2) / part.num_tokens
    return min(1.0, float(noise / (A - B).square().sum()))


@pytest.mark.parametrize("count", [3, 40, 400])
def test_against_float64(count):
    generator = torch.Generator().manual_seed(count)
    mixing = torch.randn(24, 24, generator=generator)
    X = torch.randn(1000, 24, generator=generator) @ mixing
    X[:count, :12] *= 3
    part, whole = hessian_sum(X[:count]), hessian_sum(X)
    _, weight = shrunk(part, whole)
    assert weight == pytest.approx(oracle_weight(part, whole), rel=1e-4)
    assert (weight < 1) is (count > 3)


def test_units_of_features_do_not_matter():
    """An outlier feature, of which language models have some, is not all that counts."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(500, 16, generator=generator)
    X[:60, :4] *= 2
    units = torch.ones(16)
    units[3] = 300.0
    plain = shrunk(hessian_sum(X[:60]), hessian_sum(X))[1]
    scaled = shrunk(hessian_sum(X[:60] * units), hessian_sum(X * units))[1]
    assert 0.05 < plain < 0.95 and scaled == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("count", [0, 1])
def test_too_little_to_know_anything_is_all_the_groups(count):
    part = HessianSum(torch.full((2, 2), 9.0 * count), count, cross_OD=torch.ones(2, 2))
    found, weight = shrunk(part, HessianSum(torch.eye(2) * 6, 3))
    assert weight == 1.0 and torch.equal(found.sum_DD, 2 * torch.eye(2))
    assert torch.equal(found.cross_OD, torch.zeros(2, 2))


def test_features_that_no_token_uses_stay_unused():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(100, 6, generator=generator)
    X[:, 2] = 0
    X[:20, 4] = 0
    found, weight = shrunk(hessian_sum(X[:20]), hessian_sum(X))
    assert 0 < weight < 1 and bool(torch.isfinite(found.sum_DD).all())
    assert found.sum_DD[2].abs().sum() == 0 and found.sum_DD[4, 4] > 0


def test_residuals_are_drawn_towards_nothing_by_a_weight_of_their_own():
    """Four tokens (2, 0), (2, 0), (2, 0) and (0, 2) whose residuals are half of them."""
    X = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    part = hessian_sum(X, X / 2)
    # C = diag(3, 1) / 2, |C|^2 = 2.5, tr(S) = 4, mean |r|^2 = 1: (4 + 2.5) / 4 / 2.5 for any group.
    for whole in (HessianSum(torch.eye(2) * 30, 10), part):
        found, _ = shrunk(part, whole)
        assert torch.allclose(found.cross_OD, 0.35 * torch.diag(torch.tensor([6.0, 2.0])))


def test_one_cluster_keeps_what_a_later_linear_makes_up_for():
    """Its expert is its group, whose sums it is all drawn to, but its residuals are well known."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4000, 4, generator=generator)
    part = hessian_sum(X, X * torch.tensor([0.1, 0.2, 0.0, -0.1]))
    found, weight = shrunk(part, part)
    assert weight == 1.0
    torch.testing.assert_close(found.sum_DD, part.sum_DD)
    torch.testing.assert_close(found.cross_OD, part.cross_OD, rtol=0.01, atol=1.0)


@pytest.mark.parametrize("count", [5, 20, 100, 2000])
def test_shrinking_is_nearer_the_truth(count):
    """Of normal inputs with a known second moment, averaged over draws, in float64.

    Errors are relative to the energy of the group's features, as the weight has them.
    """
    generator = torch.Generator().manual_seed(count)
    scale = torch.linspace(0.2, 2.0, 12)
    units = torch.linspace(1, 100, 12)
    truth = torch.diag(scale**2)
    whole = HessianSum(torch.eye(12) * 1.5 * 1000 * units**2, 1000)
    errors, weights = torch.zeros(3, dtype=torch.float64), []
    for _ in range(40):
        X = torch.randn(count, 12, generator=generator) * scale
        part = hessian_sum(X * units)
        found, weight = shrunk(part, whole)
        weights.append(weight)
        guesses = (found.sum_DD / count, part.sum_DD / count, whole.sum_DD / 1000)
        for i, guess in enumerate(guesses):
            errors[i] += ((guess / units / units[:, None]).double() - truth).square().sum()
    assert errors[0] <= 1.1 * errors[1:].min()
    assert errors[0] < 0.98 * errors[1] or count == 2000
    assert sum(weights) / 40 < 0.05 if count == 2000 else sum(weights) > 0


def test_a_group_that_is_no_sum_of_inputs():
    with pytest.raises(CompressionError, match="not positive definite"):
        ShrinkTarget(HessianSum(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 1))


def test_parts_of_residuals_add_up():
    X, d = torch.randn(50, 7), torch.randn(50, 7)
    halves = merge_hessians([hessian_sum(X[:20], d[:20]), hessian_sum(X[20:], d[20:])])
    energy = float(d.double().square().sum())
    assert hessian_sum(X, d).residual_energy == pytest.approx(energy, rel=1e-6)
    assert halves.residual_energy == pytest.approx(energy, rel=1e-6)


def test_few_tokens_take_the_groups_sums():
    part = HessianSum(torch.eye(2) * 40, 20, cross_OD=torch.ones(2, 2), residual_energy=9.0)
    group = HessianSum(torch.eye(2) * 30, 30)
    few = Regulariser(group, CompressionConfig(min_tokens_per_expert=21))
    found, share = few.regularise(part)
    assert share == 1.0 and torch.equal(found.sum_DD, group.sum_DD) and found.num_tokens == 30
    assert torch.equal(found.cross_OD, torch.zeros(2, 2))
    enough = Regulariser(group, CompressionConfig(min_tokens_per_expert=20))
    found, share = enough.regularise(part)
    assert found is part and share == 0.0
    settings = CompressionConfig(min_tokens_per_expert=20, shrink_hessians=True)
    found, share = Regulariser(group, settings).regularise(part)
    expected, weight = shrunk(part, group)
    assert torch.equal(found.sum_DD, expected.sum_DD) and share == weight
    assert 0 < share < 1


@pytest.mark.parametrize("least", [0, 5])
def test_without_a_token_all_features_count_alike(least):
    """As for an expert of a mixture that nothing was routed to."""
    nothing = HessianSum(torch.zeros(3, 3), 0, cross_OD=torch.zeros(2, 3))
    settings = CompressionConfig(min_tokens_per_expert=least, shrink_hessians=True)
    found, share = Regulariser(nothing, settings).regularise(nothing)
    assert torch.equal(found.sum_DD, torch.eye(3)) and share == 1.0
    assert found.num_tokens == 0 and torch.equal(found.cross_OD, torch.zeros(2, 3))
