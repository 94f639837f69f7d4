"""Sums over tokens, and what is fitted to them."""

import pytest
import torch

from sparse_expansion.algorithms.centring import VARIANCE_FLOOR
from sparse_expansion.algorithms.clustering import route
from sparse_expansion.config import RoutingConfig
from sparse_expansion.types import CompressionError
from sparse_expansion.work.sums import cluster_moments, fit_router, route_all


@pytest.mark.parametrize("reduction", [None, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_router_of_an_expert_that_few_tokens_reach(count, reduction):
    """Every token its own cluster while there are enough clusters; none for those left over."""
    routing = RoutingConfig(num_clusters=3, pca_reduction_factor=reduction, balance=0.5)
    X_TD = torch.randn(count, 8)
    samples = [X_TD[: count // 2], X_TD[count // 2 :]]
    router, gram, fitted = fit_router(samples, routing, device="cpu", seed=1, is_routed=True)
    assert fitted == gram.num_tokens == count
    torch.testing.assert_close(gram.sum_DD, X_TD.T @ X_TD)
    assert router.centroids_KP.shape == (3, 8 if reduction is None else 4)
    tensors = (router.mean_D, router.centroids_KP, router.components_PD)
    assert all(bool(torch.isfinite(each).all()) for each in tensors if each is not None)
    labels = route(torch.cat([X_TD, torch.randn(4, 8)]), router)
    if count < 3:
        # Two tokens have at most one component, which tells them apart.
        assert labels[:count].tolist() == list(range(count))
        assert int(labels.max()) < max(1, count)
    if 0 < count < 3:
        with pytest.raises(CompressionError, match=f"{count} calibration tokens cannot fill 3"):
            fit_router(samples, routing, device="cpu", seed=1)


@pytest.mark.parametrize("factor", [None, 4])
def test_a_groups_sums_about_its_clusters_means(factor):
    """Of several samples, longer than what is taken at a time, against float64."""
    X = torch.randn(1500, 16) + 5 * torch.randint(0, 3, (1500, 1))
    routing = RoutingConfig(num_clusters=3, pca_reduction_factor=factor, restarts=1)
    samples = [X[:100], X[100:]]
    router, plain, tokens = fit_router(samples, routing, device="cpu", seed=0)
    clusters = cluster_moments(samples, router, "cpu")
    found = clusters.about_means(plain)
    assert tokens == 1500 and found.num_tokens == 1500
    labels = route_all(X, router, "cpu")
    parts = [X[labels == k].double() for k in range(3)]
    wanted = sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in parts)
    wanted += VARIANCE_FLOOR * torch.diag(X.double().square().sum(0))
    torch.testing.assert_close(found.sum_DD.double(), wanted, rtol=1e-4, atol=0.05)
    assert float(found.sum_DD.trace()) < 0.2 * float(plain.sum_DD.trace())
    assert torch.equal(found.sum_D, plain.sum_D)
    variances = torch.stack([part.var(dim=0, correction=0) for part in parts])
    torch.testing.assert_close(clusters.variance_KD, variances)
    assert clusters.counts_K.tolist() == [len(part) for part in parts]
