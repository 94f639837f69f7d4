import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from sparse_expansion.algorithms import neurons
from sparse_expansion.types import CompressionError


def slow_distance(values):
    """The integral of the distance between the quantile functions, by quadrature."""
    x = np.sort((values - values.mean()) / values.std())
    total = 0.0
    for i, value in enumerate(x):
        crossing = scipy.stats.norm.cdf(value)
        inside = [crossing] if i / len(x) < crossing < (i + 1) / len(x) else None
        total += scipy.integrate.quad(
            lambda u, value=value: abs(value - scipy.stats.norm.ppf(u)),
            i / len(x),
            (i + 1) / len(x),
            points=inside,
            limit=200,
        )[0]
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 17])
@pytest.mark.parametrize("shape", ["normal", "exponential", "two values"])
def test_distance_to_the_normal_against_quadrature(shape, count):
    chance = np.random.default_rng(count)
    values = {
        "normal": chance.normal(3, 2, count),
        "exponential": chance.exponential(size=count),
        "two values": np.arange(count) % 2 * 5.0,
    }[shape]
    if values.std() == 0:
        # A constant at 0: the mean of |z|.
        expected = np.sqrt(2 / np.pi)
    else:
        expected = slow_distance(values)
    found = neurons.wasserstein_to_normal(torch.tensor(values)[:, None])
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_distance_by_hand_for_two_signs():
    """Half at -1, half at 1: the integral of |1 - z| over z > 0, twice."""
    found = float(neurons.wasserstein_to_normal(torch.tensor([[-1.0], [1.0]])))
    z = scipy.stats.norm
    one = 2 * z.cdf(1) - 1.5 + 2 * z.pdf(1) - z.pdf(0)
    assert found == pytest.approx(2 * one, rel=1e-9)


def test_distances_tell_normal_neurons_from_others():
    chance = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, 1, generator=chance)
    skewed = normal.exp()
    near, far = neurons.wasserstein_to_normal(torch.cat([normal, skewed], dim=1))
    assert near < 0.05 < 0.3 < far


def test_distance_between_two_samples():
    A = torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    B = torch.tensor([[5.0, 5.0], [1.0, 5.0], [3.0, 5.0]])
    assert neurons.wasserstein_between(A, B).tolist() == [1.0, 0.0]
    chance = np.random.default_rng(0)
    one, other = chance.normal(size=50), chance.exponential(size=50)
    found = neurons.wasserstein_between(torch.tensor(one)[:, None], torch.tensor(other)[:, None])
    assert float(found) == pytest.approx(scipy.stats.wasserstein_distance(one, other))
    with pytest.raises(ValueError, match="differ in shape"):
        neurons.wasserstein_between(A, B[:2])


def slow_difficulty(X, Y, pairs):
    dx = np.array([np.linalg.norm(X[i] - X[j]) for i, j in pairs])
    dy = np.array([[abs(y[i] - y[j]) for i, j in pairs] for y in Y.T])
    return [
        np.mean((each / np.median(each)) / (dx / dx.max())) if np.median(each) else 0.0
        for each in dy
    ]


@pytest.mark.parametrize("count", [8, 9, 31])
def test_mapping_difficulty_against_a_loop(count):
    X, Y = torch.randn(count, 5), torch.randn(count, 3)
    Y[:, 2] = 7.0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(4)).tolist()
    pairs = list(zip(order[0 : count // 2 * 2 : 2], order[1::2], strict=False))
    expected = slow_difficulty(X.double().numpy(), Y.double().numpy(), pairs)
    found = neurons.mapping_difficulty(X, Y, seed=4)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[2] == 0


def test_a_linear_neuron_along_the_inputs_is_easy():
    """Outputs as far apart as inputs: the ratio is max |dx| / median |dx| for every pair."""
    X = torch.rand(100, 1)
    found = float(neurons.mapping_difficulty(X, 3 * X, seed=0))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).reshape(-1, 2)
    dx = (X[order[:, 0]] - X[order[:, 1]]).abs().double()
    assert found == pytest.approx(float(dx.max() / np.median(dx)), rel=1e-6)


def test_moments_against_scipy():
    Y = torch.randn(200, 2).exp()
    Y[:, 1] = 4
    found = neurons.moments(Y)
    values = Y[:, 0].double().numpy()
    assert float(found["mean"][0]) == pytest.approx(values.mean())
    assert float(found["variance"][0]) == pytest.approx(values.var())
    expected = scipy.stats.kurtosis(values, fisher=False)
    assert float(found["kurtosis"][0]) == pytest.approx(expected)
    assert [float(found[name][1]) for name in ("mean", "variance", "kurtosis")] == [4, 0, 0]


def test_no_tokens_and_no_differences():
    with pytest.raises(CompressionError, match="no tokens"):
        neurons.wasserstein_to_normal(torch.empty(0, 3))
    with pytest.raises(CompressionError, match="no two inputs differ"):
        neurons.mapping_difficulty(torch.ones(6, 2), torch.randn(6, 1), seed=0)
