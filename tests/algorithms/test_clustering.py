import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from sparse_expansion.algorithms.clustering import (
    balance_clusters,
    fit_pca,
    project,
    route,
)
from sparse_expansion.algorithms.hessian import hessian_sum, merge_hessians
from sparse_expansion.algorithms.kmeans import fit_kmeans
from sparse_expansion.types import CompressionError, Router


def test_pca_from_sums_equals_pca_of_the_tokens():
    X = torch.randn(500, 12) @ torch.randn(12, 12) + 3
    moments = merge_hessians([hessian_sum(X[:123]), hessian_sum(X[123:])])
    mean, components = fit_pca(moments, num_components=4)
    reference = PCA(4).fit(X.double().numpy())
    np.testing.assert_allclose(mean.numpy(), reference.mean_, rtol=1e-5, atol=1e-5)
    dots = np.abs((components.numpy() * reference.components_).sum(axis=1))
    np.testing.assert_allclose(dots, 1, atol=1e-4)
    peak = components.abs().argmax(dim=1)
    assert bool((components[torch.arange(4), peak] > 0).all())


def test_pca_by_hand():
    X = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [3.0, 3.0], [1.0, 1.0]])
    mean, components = fit_pca(hessian_sum(X), num_components=1)
    assert mean.tolist() == [1.0, 1.0]
    torch.testing.assert_close(components, torch.full((1, 2), 0.5**0.5))


def test_pca_of_nothing():
    empty = hessian_sum(torch.zeros(0, 2))
    with pytest.raises(CompressionError, match="no calibration tokens"):
        fit_pca(empty, num_components=1)


@pytest.mark.parametrize("clusters", [2, 4, 5, 9])
@pytest.mark.parametrize("components", [4, None])
def test_routing_is_the_nearest_centroid_in_float64(clusters, components):
    """With as many clusters as features or fewer the projection is folded away."""
    X = torch.randn(200, 10) * 5 + 3
    features = components or 10
    matrix = None if components is None else torch.randn(components, 10)
    router = Router(torch.randn(10), matrix, torch.randn(clusters, features))
    assert router.is_folded == (components is None or clusters <= 4)
    Z = X.double() - router.mean_D.double()
    Z = Z if matrix is None else Z @ matrix.double().T
    nearest = torch.cdist(Z, router.centroids_KP.double()).argmin(dim=1)
    assert torch.equal(route(X, router), nearest)


def test_centroids_are_their_own_cluster():
    X = torch.randn(6, 10)
    assert route(X, Router(torch.zeros(10), None, X.clone())).tolist() == [0, 1, 2, 3, 4, 5]


def test_routing_ties_go_to_the_lowest():
    router = Router(torch.zeros(1), None, torch.tensor([[1.0], [1.0], [-1.0]]))
    assert route(torch.tensor([[0.0], [5.0], [-5.0]]), router).tolist() == [0, 0, 2]


def test_bf16_inputs_are_routed_in_float32():
    X = torch.randn(64, 8).bfloat16()
    router = Router(torch.randn(8), torch.randn(3, 8), torch.randn(5, 3))
    assert torch.equal(route(X, router), route(X.float(), router))
    assert project(X, router.mean_D, router.components_PD).dtype == torch.float32


def test_leading_components_capture_what_a_full_decomposition_does():
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(1, -2, 300)
    X = torch.randn(2000, 300, generator=generator) * scales
    X = X @ torch.linalg.qr(torch.randn(300, 300, generator=generator)).Q
    mean, components = fit_pca(hessian_sum(X), num_components=12)
    torch.testing.assert_close(components @ components.T, torch.eye(12), rtol=1e-5, atol=1e-5)
    centred = (X - mean).double()
    captured = float((centred @ components.double().T).square().sum())
    best = float(torch.linalg.svdvals(centred)[:12].square().sum())
    assert (1 - 1e-3) * best < captured <= best * (1 + 1e-6)
    again = fit_pca(hessian_sum(X), num_components=12)[1]
    assert torch.equal(components, again)


def test_balanced_clusters():
    """Two outliers with clusters of their own; the crowd shares one."""
    generator = torch.Generator().manual_seed(0)
    crowd = torch.randn(198, 3, generator=generator)
    far = torch.tensor([[90.0, 0.0, 0.0], [0.0, 90.0, 0.0]])
    Z = torch.cat([crowd, far])
    before = fit_kmeans(Z, num_clusters=3, restarts=4, max_iterations=50, seed=0)
    after = balance_clusters(Z, before, least=0.5)
    sizes = [torch.bincount(torch.cdist(Z, c).argmin(1), minlength=3) for c in (before, after)]
    assert sizes[0].min() == 1 and sizes[1].min() >= 0.5 * 200 / 3
    assert after.shape == before.shape
    assert torch.equal(balance_clusters(Z, before, least=0.0), before)


def test_what_cannot_be_balanced_stays():
    Z = torch.cat([torch.zeros(50, 2), torch.ones(1, 2)])
    centroids = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert torch.equal(balance_clusters(Z, centroids, least=0.9), centroids)
    assert torch.equal(balance_clusters(Z, centroids[:1], least=0.9), centroids[:1])
