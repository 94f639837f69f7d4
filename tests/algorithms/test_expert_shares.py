"""Shares of zeros by expert: hand values, the mean over tokens, and experts made by them."""

import numpy as np
import pytest
import torch

from sparse_expansion.algorithms.centring import InputMeans
from sparse_expansion.algorithms.compress import compress_linears
from sparse_expansion.algorithms.expert_shares import (
    cluster_means,
    compress_by_share,
    expert_shares,
    shares_below,
)
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.config import CompressionConfig, SparsityPattern


def test_shares_by_hand():
    """Of two experts' weights, all worth something else, the threshold takes the least."""
    worth = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 20.0, 30.0, 40.0, 50.0]])
    # All of the first are below any of the second.
    assert shares_below(worth, np.array([1.0, 1.0]), 0.5, (0, 1)) == pytest.approx([1, 0])
    # Two thirds of the tokens are the first's; then a quarter of the second's goes.
    assert shares_below(worth, np.array([2.0, 1.0]), 0.75, (0, 1)) == pytest.approx([1, 0.25])
    assert shares_below(worth, np.array([1.0, 1.0]), 0.5, (0.3, 0.7)) == pytest.approx([0.7, 0.3])
    # Where none has tokens they count alike.
    assert shares_below(worth, np.zeros(2), 0.5, (0, 1)) == pytest.approx([1, 0])


def test_weights_that_are_worth_the_same_are_shared_evenly():
    worth = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert shares_below(worth, np.array([3.0, 1.0]), 0.6, (0.1, 0.9)) == pytest.approx([0.6, 0.6])


def test_one_threshold_for_all_experts():
    """Against the sorted worth of every weight, counted by tokens, in float64."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 30, generator=generator) for rows in (15, 25)]
    variance = torch.rand(3, 30, generator=generator) + 0.1
    tokens = torch.tensor([30000.0, 10000.0, 20000.0])
    effects = [torch.rand(3, rows, generator=generator) + 0.5 for rows in (15, 25)]
    found = expert_shares(weights, variance, tokens, 0.5, sensitivities=effects)
    # What 64 tokens of the whole group's change is within the tolerance.
    squares = torch.cat(weights).double().square()
    worth = squares * variance.double()[:, None] * torch.cat(effects, 1).double()[:, :, None]
    ordered, order = worth.flatten().sort()
    counted = tokens.double()[:, None].expand(3, 1200).flatten()[order].cumsum(0)
    threshold = ordered[torch.searchsorted(counted, counted[-1] / 2)]
    expected = (worth < threshold).double().mean(dim=(1, 2))
    assert found == pytest.approx(expected.tolist(), abs=3e-3)
    assert sum(n * s for n, s in zip(tokens.tolist(), found, strict=True)) == pytest.approx(
        0.5 * 60000, rel=1e-3
    )
    assert max(found) - min(found) > 0.05


def test_an_output_that_the_block_does_not_need_loses_most():
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    variance, tokens = torch.ones(2, 8), torch.tensor([1e5, 1e5])
    assert expert_shares([weight], variance, tokens, 0.5) == [0.5, 0.5]
    # The same to both, but for outputs of the second expert.
    effects = torch.tensor([[1.0], [0.01]]).expand(2, 20)
    found = expert_shares([weight], variance, tokens, 0.5, sensitivities=[effects])
    assert found == pytest.approx([0.2, 0.8], abs=1e-3)


def test_a_cluster_of_few_tokens_is_not_taken_at_its_word():
    """A single token does not vary at all."""
    variance = torch.ones(2, 8)
    variance[1] = 0
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    few = expert_shares([weight], variance, torch.tensor([1000.0, 1.0]), 0.5)
    many = expert_shares([weight], variance, torch.tensor([1000.0, 500.0]), 0.5)
    assert 0.5 <= few[1] < 0.52 and many[1] > 0.6


@pytest.mark.parametrize("tokens", [[0.0, 0.0], [10.0, 0.0]])
def test_clusters_without_tokens(tokens):
    shares = expert_shares([torch.ones(4, 8)], torch.zeros(2, 8), torch.tensor(tokens), 0.7)
    assert shares == [0.7, 0.7]


def test_means_of_few_tokens_are_mixed_with_all():
    sums = torch.tensor([[640.0, 0.0], [0.0, 128.0], [0.0, 0.0]], dtype=torch.float64)
    tokens = torch.tensor([64.0, 64.0, 0.0], dtype=torch.float64)
    # All 128 tokens have the means 5 and 1, and every cluster gets 64 of such.
    assert cluster_means(sums, tokens).tolist() == [[7.5, 0.5], [2.5, 1.5], [5.0, 1.0]]


def test_shares_are_bounded():
    variance = torch.tensor([[1e-6], [1.0]]).expand(2, 8)
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    low, high = sorted(expert_shares([weight], variance, torch.tensor([1e5, 1e5]), 0.1))
    assert low == pytest.approx(0, abs=0.01) and high == pytest.approx(0.2, abs=0.01)
    low, high = sorted(expert_shares([weight], variance, torch.tensor([1e5, 1e5]), 0.9))
    assert high == pytest.approx(0.95) and low == pytest.approx(0.85)


@pytest.mark.parametrize("pruner", ["admm", "sparsegpt", "magnitude"])
def test_experts_are_those_that_are_made_alone(pruner):
    generator = torch.Generator().manual_seed(0)
    sums = [hessian_sum(torch.randn(60, 16, generator=generator)) for _ in range(3)]
    H = torch.stack([one.sum_DD for one in sums])
    means = InputMeans.joined([InputMeans.of(one) for one in sums])
    weights = {name: torch.randn(8, 16, generator=generator) for name in ("gate", "up")}
    scale = torch.rand(3, 8, generator=generator) + 0.5
    config = CompressionConfig(sparsity=SparsityPattern(fraction=0.5), pruner=pruner, block_size=16)
    grids = dict.fromkeys(weights)
    shares = (0.25, 0.5, 0.75)
    made = compress_by_share(
        shares,
        weights,
        H,
        config,
        grids,
        cross_KOD=None,
        means=means,
        output_weights={"gate": scale},
        products="auto",
    )
    for k, share in enumerate(shares):
        own = CompressionConfig(
            sparsity=SparsityPattern(fraction=share), pruner=pruner, block_size=16
        )
        alone = compress_linears(
            weights,
            H[k : k + 1],
            own,
            grids,
            means=means.of_expert(k),
            output_weights={"gate": scale[k : k + 1]},
        )
        for name, expected in alone.items():
            assert int((~made[name].kept_KOD[k]).sum()) == 128 * share
            assert torch.equal(made[name].weight_KOD[k], expected.weight_KOD[0])
            assert torch.equal(made[name].bias_KO[k], expected.bias_KO[0])
            assert made[name].relative_error_K[k] == expected.relative_error_K[0]
