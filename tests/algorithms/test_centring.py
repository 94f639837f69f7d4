from dataclasses import replace

import pytest
import torch

from sparse_expansion.algorithms.centring import (
    VARIANCE_FLOOR,
    InputMeans,
    about_cluster_means,
    about_mean,
)
from sparse_expansion.algorithms.compress import compress_linears
from sparse_expansion.algorithms.hessian import hessian_sum, merge_hessians
from sparse_expansion.algorithms.shrinkage import Regulariser
from sparse_expansion.config import CompressionConfig, SparsityPattern

SETTINGS = CompressionConfig(expert_biases=True, min_tokens_per_expert=1)


def shifted(tokens=200, width=12):
    """Inputs far from the origin, and residuals that depend on them."""
    X = torch.randn(tokens, width) @ torch.randn(width, width) + 3 * torch.randn(width)
    return X, 0.1 * X + 0.3 * torch.randn(tokens, width) + 0.5


def test_sums_about_the_mean_by_hand():
    X = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    d = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    found = about_mean(hessian_sum(X, d))
    # Less the means (2, 2) and (0.5, 2.5): a feature that is always 2 has the floor alone.
    assert found.sum_DD.tolist() == pytest.approx(
        torch.tensor([[2 + 10 * VARIANCE_FLOOR, 0], [0, 8 * VARIANCE_FLOOR]])
    )
    assert found.cross_OD.tolist() == [[-1, 0], [5, 0]]
    assert found.residual_energy == pytest.approx(26 - 13)
    assert found.sum_D.tolist() == [4, 4] and found.num_tokens == 2


def test_sums_about_the_mean_against_float64():
    X, d = shifted()
    found = about_mean(merge_hessians([hessian_sum(X[:50], d[:50]), hessian_sum(X[50:], d[50:])]))
    Xc, dc = (part.double() - part.double().mean(0) for part in (X, d))
    wanted = Xc.T @ Xc + VARIANCE_FLOOR * torch.diag(X.double().square().sum(0))
    torch.testing.assert_close(found.sum_DD.double(), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.cross_OD.double(), dc.T @ Xc, rtol=1e-4, atol=1e-3)
    assert found.residual_energy == pytest.approx(float(dc.square().sum()), rel=1e-5)


def test_a_feature_that_hardly_varies_has_energy_above_0():
    X = torch.randn(5000, 4)
    X[:, 2] = 1000 + 1e-4 * torch.randn(5000)
    sum_DD = about_mean(hessian_sum(X)).sum_DD
    assert float(torch.linalg.eigvalsh(sum_DD.double()).min()) > 0


def test_sums_about_clusters_means():
    X, _ = shifted()
    labels = torch.randint(0, 3, (200,))
    # The last cluster has no token.
    sums = torch.stack([X[labels == k].double().sum(0) for k in range(4)])
    found = about_cluster_means(hessian_sum(X), sums, torch.bincount(labels, minlength=4))
    parts = [X[labels == k].double() - X[labels == k].double().mean(0) for k in range(3)]
    wanted = sum(part.T @ part for part in parts)
    wanted += VARIANCE_FLOOR * torch.diag(X.double().square().sum(0))
    torch.testing.assert_close(found.sum_DD.double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm", "wanda"])
@pytest.mark.parametrize("residuals", [False, True])
def test_a_bias_is_the_best_for_its_weights_and_worth_having(pruner, residuals):
    X, d = shifted()
    d = d if residuals else torch.zeros_like(d)
    W = torch.randn(8, 12)
    plain = CompressionConfig(pruner=pruner, sparsity=SparsityPattern(fraction=0.5), block_size=4)
    settings = replace(plain, expert_biases=True, min_tokens_per_expert=1)
    part = hessian_sum(X, d @ W.T)

    def made(settings):
        found, _ = Regulariser(part, settings).regularise(part)
        return compress_linears(
            {"": W},
            found.sum_DD[None],
            settings,
            {"": None},
            cross_KOD=found.cross_OD[None],
            means=InputMeans.of(found) if settings.expert_biases else None,
        )[""]

    found = made(settings)
    wanted = (X + d).double() @ W.double().T
    error = wanted - X.double() @ found.weight_KOD[0].double().T
    torch.testing.assert_close(found.bias_KO[0].double(), error.mean(0), rtol=1e-4, atol=1e-4)
    without = made(plain)
    assert without.bias_KO is None
    lost = wanted - X.double() @ without.weight_KOD[0].double().T
    left = float((error - found.bias_KO[0]).square().sum())
    assert left < 0.9 * float(lost.square().sum())
    if not residuals:
        energy = float(wanted.square().sum())
        # The floor counts as data.
        assert found.relative_error_K[0] == pytest.approx(left / energy, rel=0.02)


def test_nothing_lost_leaves_nothing_to_make_up_for():
    X, d = shifted()
    found, _ = Regulariser(hessian_sum(X), SETTINGS).regularise(hessian_sum(X, d[:, :8]))
    settings = replace(SETTINGS, sparsity=SparsityPattern(fraction=0.0))
    made = compress_linears(
        {"": torch.randn(8, 12)},
        found.sum_DD[None],
        settings,
        {"": None},
        cross_KOD=found.cross_OD[None],
        means=InputMeans.of(found),
    )[""]
    assert made.bias_KO.tolist() == [[0] * 8]


def test_an_expert_with_few_tokens_has_the_groups_sums_and_its_own_mean():
    X, d = shifted()
    few = replace(SETTINGS, min_tokens_per_expert=50)
    group = hessian_sum(X)
    found, weight = Regulariser(group, few).regularise(hessian_sum(X[:10] + 1, d[:10]))
    assert weight == 1 and torch.equal(found.sum_DD, group.sum_DD)
    means = InputMeans.of(found)
    torch.testing.assert_close(means.input_KD[0], (X[:10] + 1).mean(0))
    torch.testing.assert_close(means.residual_KO[0], d[:10].mean(0))
    nothing = hessian_sum(X[:0], d[:0])
    means = InputMeans.of(Regulariser(group, few).regularise(nothing)[0])
    torch.testing.assert_close(means.input_KD[0], X.mean(0))
    assert not bool(means.residual_KO.any())


def test_means_of_several_experts():
    X, d = shifted()
    parts = [InputMeans.of(hessian_sum(part, rest)) for part, rest in ((X, d), (2 * X, 3 * d))]
    both = InputMeans.joined(parts)
    torch.testing.assert_close(both.input_KD, torch.stack([X.mean(0), 2 * X.mean(0)]))
    torch.testing.assert_close(both.residual_KO, torch.stack([d.mean(0), 3 * d.mean(0)]))
    assert InputMeans.joined([InputMeans.of(hessian_sum(X))]).residual_KO is None
