"""How a linear makes up for the blocks before: a regression, less what may be chance in it."""

import pytest
import torch

from sparse_expansion.algorithms.centring import InputMeans, about_cluster_means
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.algorithms.upstream import upstream_correction
from sparse_expansion.types import CompressionError, HessianSum, Router
from sparse_expansion.work.sums import cluster_moments, fit_correction


def test_by_hand():
    """Two tokens (2, 0) and (0, 2) of which the first lacks 3 and the second 1, damping 0.25.

    H = 4 I, with the damping 5 I, and C = (6, 2): G = C / 5, the free features are 2 * 4 / 5, and
    |C|^2 / 5 = 8 of |e|^2 = 10 are explained, of which 10 * 1.6 / 2 = 8 may be chance.
    """
    X, e = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [1.0]])
    given = {"mean_KO": torch.zeros(1, 1), "energy": 10.0, "damping": 0.25}
    found = upstream_correction(hessian_sum(X), e.T @ X, **given)
    assert (found.explained, found.shrinkage) == pytest.approx((0.8, 1.0))
    assert found.weight_OD.tolist() == [pytest.approx([0.0, 0.0], abs=1e-6)]
    # Ten times as many tokens of the same kind: a tenth of it may be chance.
    ten = HessianSum(hessian_sum(X).sum_DD * 10, 20)
    found = upstream_correction(ten, 10 * e.T @ X, **(given | {"energy": 100.0}))
    assert (found.explained, found.shrinkage) == pytest.approx((0.8, 0.1))
    assert found.weight_OD.tolist() == [pytest.approx([0.9 * 1.2, 0.9 * 0.4])]


def test_nothing_lacking_adds_nothing():
    found = upstream_correction(
        hessian_sum(torch.randn(9, 3)), torch.zeros(2, 3), torch.zeros(1, 2), 0.0, 0.1
    )
    assert not bool(found.weight_OD.any()) and (found.explained, found.shrinkage) == (0.0, 1.0)


def test_sums_that_are_not_finite_are_refused():
    with pytest.raises(CompressionError, match="finite"):
        upstream_correction(
            HessianSum(torch.full((2, 2), float("nan")), 5),
            torch.ones(1, 2),
            torch.zeros(1, 1),
            1.0,
            0.1,
        )


@pytest.mark.parametrize("tokens", [40, 400, 4000])
def test_on_other_tokens_it_loses_less_than_all_of_it_and_than_none(tokens):
    """In float64, over draws: where features say little, the whole regression is fitted noise."""
    generator = torch.Generator().manual_seed(tokens)
    true_OD = 0.12 * torch.randn(5, 30, generator=generator) / 30**0.5
    lost = torch.zeros(3, dtype=torch.float64)
    for _ in range(20):
        X, other = torch.randn(2, tokens, 30, generator=generator)
        noise = torch.randn(2, tokens, 5, generator=generator)
        e = X @ true_OD.T + 0.5 * noise[0]
        gram, cross = hessian_sum(X), e.T @ X
        energy = float(e.square().sum())
        found = upstream_correction(gram, cross, torch.zeros(1, 5), energy, 1e-6).weight_OD
        whole = torch.linalg.solve(gram.sum_DD.double(), cross.double().T).T
        wanted = (other @ true_OD.T).double()
        for place, guess in enumerate((found.double(), whole, torch.zeros(5, 30).double())):
            lost[place] += (wanted - other.double() @ guess.T).square().sum()
    # How much may be chance is an estimate too.
    assert lost[0] < (1.2 if tokens == 40 else 1.02) * lost[1:].min()


@pytest.mark.parametrize("biases", [False, True])
def test_of_several_clusters_and_shards(biases):
    """About the clusters' means where experts have biases, and against float64."""
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([[0.0] * 6, [9.0] * 6, [-9.0] * 6])
    router = Router(torch.zeros(6), None, places)
    X = torch.randn(900, 6, generator=generator)
    X += places[torch.arange(900) % 2]
    e = 0.2 * X.roll(1, dims=1)[:, :2] + 0.1 * torch.randn(900, 2, generator=generator)
    e[::2] += 5
    shards = [slice(0, 100), slice(100, 900)]
    gram = hessian_sum(X)
    labels = torch.arange(900) % 2
    means, lacks = (
        torch.stack([part[labels == k].double().mean(0) for k in range(2)]) for part in (X, e)
    )
    if biases:
        counts = torch.tensor([450, 450, 0])
        sums = torch.cat([450 * means, torch.zeros(1, 6).double()])
        gram = about_cluster_means(gram, sums, counts)
    samples = [X[part] for part in shards]
    found = fit_correction(
        samples,
        [e[part] for part in shards],
        router,
        gram,
        cluster_moments(samples, router, "cpu") if biases else None,
        damping=0.01,
        device="cpu",
    )
    Xc, ec = X.double(), e.double()
    if biases:
        Xc, ec = Xc - means[labels], ec - lacks[labels]
        torch.testing.assert_close(found.mean_KO[:2].double(), lacks, rtol=1e-4, atol=1e-4)
        # The third has no token.
        assert not bool(found.mean_KO[2].any())
    else:
        assert found.mean_KO.shape == (3, 2) and not bool(found.mean_KO.any())
    H = gram.sum_DD.double()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(6)
    G = torch.linalg.solve(damped, Xc.T @ ec).T
    signal = float((G * (ec.T @ Xc)).sum())
    energy = float(ec.square().sum())
    share = energy * float(torch.linalg.solve(damped, H).trace()) / 900 / signal
    assert 0 < share < 0.1
    assert found.shrinkage == pytest.approx(share, rel=1e-3)
    assert found.explained == pytest.approx(signal / energy, rel=1e-3)
    torch.testing.assert_close(found.weight_OD.double(), (1 - share) * G, rtol=1e-3, atol=1e-4)


def test_the_mean_over_an_experts_tokens_is_its_own():
    """Whatever the added weight puts out: the bias is the best for the weights all the same."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 4, generator=generator) + 2
    lacking, more = torch.randn(2, 50, 3, generator=generator)
    W, added, V = torch.randn(3, 3, 4, generator=generator)
    means = InputMeans.of(hessian_sum(X, lacking)).lacking(more.mean(0)[None], added)
    found = means.biases(W + added, V[None])[0]
    wanted = (X @ W.T + lacking + more - X @ V.T).mean(0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    alone = InputMeans.of(hessian_sum(X)).lacking(more.mean(0)[None], added)
    wanted = (X @ W.T + more - X @ V.T).mean(0)
    torch.testing.assert_close(alone.biases(W + added, V[None])[0], wanted, rtol=1e-4, atol=1e-5)
