import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from sparse_expansion.algorithms import kmeans
from sparse_expansion.algorithms.kmeans import check_backend, fit_kmeans
from sparse_expansion.types import CompressionError

BACKENDS = ("torch", "sklearn")


def inertia(Z, centroids):
    return float(torch.cdist(Z.double(), centroids.double()).min(dim=1).values.square().sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_clear_clusters_are_found_and_found_again(backend):
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    Z = torch.cat([centre + 0.1 * torch.randn(50, 2) for centre in centres])
    settings = {"num_clusters": 3, "restarts": 3, "max_iterations": 50, "backend": backend}
    first = fit_kmeans(Z, seed=1, **settings)
    assert torch.equal(first, fit_kmeans(Z, seed=1, **settings))
    distances = torch.cdist(first, centres).min(dim=0).values
    assert bool((distances < 0.2).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_restarts_are_never_worse(backend):
    Z = torch.randn(400, 3)

    def found(restarts):
        return fit_kmeans(
            Z, num_clusters=12, restarts=restarts, max_iterations=100, seed=5, backend=backend
        )

    assert inertia(Z, found(8)) <= inertia(Z, found(1)) + 1e-3


def test_pytorch_is_as_good_as_scikit_learn():
    """Over seeds, on data without clear clusters, far from zero."""
    Z = torch.randn(3000, 6) @ torch.randn(6, 6) + 40
    ratios = []
    for seed in range(6):
        settings = {"num_clusters": 16, "restarts": 4, "max_iterations": 100, "seed": seed}
        ours, theirs = (fit_kmeans(Z, backend=name, **settings) for name in BACKENDS)
        ratios.append(inertia(Z, ours) / inertia(Z, theirs))
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)


def run_from(starts, Z, monkeypatch):
    """Ours and scikit-learn's centroids from the same starts."""
    monkeypatch.setattr(kmeans, "_starts", lambda *args: starts[None])
    count = len(starts)
    ours = fit_kmeans(
        Z, num_clusters=count, restarts=1, max_iterations=300, seed=0, backend="torch"
    )
    model = KMeans(count, init=starts.numpy(), n_init=1, max_iter=300, tol=1e-4, algorithm="lloyd")
    return ours, torch.from_numpy(model.fit(Z.numpy()).cluster_centers_)


def test_lloyds_iterations_are_those_of_scikit_learn(monkeypatch):
    Z = torch.randn(500, 4)
    Z -= Z.mean(dim=0)
    ours, theirs = run_from(Z[:6].clone(), Z, monkeypatch)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_cluster_without_tokens_takes_one(monkeypatch):
    Z = torch.randn(500, 4)
    Z -= Z.mean(dim=0)
    starts = torch.cat([Z[:5], torch.full((1, 4), 90.0)])
    ours, theirs = run_from(starts, Z, monkeypatch)
    assert torch.bincount(torch.cdist(Z, ours).argmin(dim=1), minlength=6).min() > 0
    assert inertia(Z, ours) == pytest.approx(inertia(Z, theirs), rel=0.02)


def test_tokens_in_parts_are_the_same_tokens(monkeypatch):
    Z = torch.randn(1000, 5)
    settings = {"num_clusters": 8, "restarts": 2, "max_iterations": 20, "seed": 3}
    whole = fit_kmeans(Z, backend="torch", **settings)
    monkeypatch.setattr(kmeans, "CHUNK_SCORES", 16 * 77)
    torch.testing.assert_close(fit_kmeans(Z, backend="torch", **settings), whole)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_tokens(backend):
    Z = torch.cat([torch.full((20, 3), 2.0), torch.full((20, 3), 5.0)])
    found = fit_kmeans(Z, num_clusters=4, restarts=2, max_iterations=10, seed=0, backend=backend)
    assert found.shape == (4, 3) and bool(torch.isfinite(found).all())
    assert inertia(Z, found) == 0


def test_starts_are_drawn_by_squared_distance():
    """Of weights 0, 1, 3 and 0: the second a quarter of the time, the third three quarters."""
    weights = torch.tensor([[0.0, 1.0, 3.0, 0.0]])
    draws = (torch.arange(1000, dtype=torch.float64)[None] + 0.5) / 1000
    drawn = kmeans._drawn(weights, draws)
    assert torch.bincount(drawn[0], minlength=4).tolist() == [0, 250, 750, 0]
    nothing = kmeans._drawn(torch.zeros(1, 4), draws)
    assert torch.bincount(nothing[0], minlength=4).tolist() == [250] * 4


def test_one_cluster_is_the_mean():
    Z = torch.randn(9, 2)
    centroid = fit_kmeans(Z, num_clusters=1, restarts=1, max_iterations=1, seed=0)
    torch.testing.assert_close(centroid[0], Z.mean(dim=0))


def test_too_few_tokens():
    with pytest.raises(CompressionError, match="3 calibration tokens cannot fill 4 clusters"):
        fit_kmeans(torch.randn(3, 2), num_clusters=4, restarts=1, max_iterations=1, seed=0)


def test_tokens_that_are_not_finite():
    Z = torch.full((4, 2), torch.nan)
    with pytest.raises(CompressionError, match="not finite"):
        fit_kmeans(Z, num_clusters=2, restarts=1, max_iterations=1, seed=0, backend="torch")


def test_cuml_is_asked_behind_its_seam(monkeypatch):
    """A module in its place, with its documented interface."""
    seen = {}

    class Model:
        def __init__(self, **settings):
            seen.update(settings)

        def fit(self, Z):
            self.cluster_centers_ = Z[: seen["n_clusters"]].numpy()

    package, module = ModuleType("cuml"), ModuleType("cuml.cluster")
    package.cluster, module.KMeans = module, Model
    monkeypatch.setitem(sys.modules, "cuml", package)
    monkeypatch.setitem(sys.modules, "cuml.cluster", module)
    Z = torch.randn(10, 3)
    found = fit_kmeans(Z, num_clusters=2, restarts=3, max_iterations=7, seed=9, backend="cuml")
    assert torch.equal(found, Z[:2])
    assert seen == {"n_clusters": 2, "n_init": 3, "max_iter": 7, "random_state": 9}


def test_cuml_that_is_not_there(monkeypatch):
    for backend in ("auto", "torch", "sklearn"):
        check_backend(backend)
    with pytest.raises(ValueError, match=r"cuML is not installed.*--kmeans torch"):
        check_backend("cuml")
    monkeypatch.setattr(kmeans, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        check_backend("cuml")
