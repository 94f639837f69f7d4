"""Shares of zeros by expert: hand values, the mean over tokens, and experts made by them."""

import math

import pytest
import torch

from sparse_expansion.algorithms.allocation import shares_by_gap
from sparse_expansion.algorithms.centring import InputMeans
from sparse_expansion.algorithms.compress import compress_linears
from sparse_expansion.algorithms.expert_shares import (
    compress_by_share,
    expert_shares,
    lost_energy,
)
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.config import CompressionConfig, SparsityPattern


def test_what_is_lost_by_hand():
    squares = torch.tensor([[1.0, 4.0], [9.0, 16.0]])
    # Worth 2, 4, 18 and 16.
    assert lost_energy(squares, torch.tensor([2.0, 1.0]), 0.5) == 6
    assert lost_energy(squares, torch.tensor([2.0, 1.0]), 0.75) == 22


def test_an_expert_whose_tokens_lose_more_keeps_more():
    """By log(e) / 7 for e times the loss, around a mean over tokens."""
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    variance = torch.rand(30, generator=torch.Generator().manual_seed(1)).expand(3, -1)
    tokens = torch.tensor([30000.0, 10000.0, 20000.0])
    factor = torch.tensor([[1.0], [2.0], [4.0]])
    shares = expert_shares([weight[:15], weight[15:]], variance * factor, tokens, 0.5)
    assert sum(n * s for n, s in zip(tokens.tolist(), shares, strict=True)) == pytest.approx(
        0.5 * 60000, rel=1e-3
    )
    assert shares[0] - shares[1] == pytest.approx(math.log(2) / 7, abs=2e-3)
    assert shares[1] - shares[2] == pytest.approx(math.log(2) / 7, abs=2e-3)
    equal = expert_shares([weight], variance, tokens, 0.5)
    assert equal == [0.5, 0.5, 0.5]


def test_a_cluster_of_few_tokens_is_not_taken_at_its_word():
    """A single token does not vary at all."""
    variance = torch.ones(2, 8)
    variance[1] = 0
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    few = expert_shares([weight], variance, torch.tensor([1000.0, 1.0]), 0.5)
    many = expert_shares([weight], variance, torch.tensor([1000.0, 500.0]), 0.5)
    assert 0.5 <= few[1] < 0.51 and many[1] > 0.6


@pytest.mark.parametrize("tokens", [[0.0, 0.0], [10.0, 0.0]])
def test_clusters_without_tokens(tokens):
    shares = expert_shares([torch.ones(4, 8)], torch.zeros(2, 8), torch.tensor(tokens), 0.7)
    assert shares == [0.7, 0.7]


def test_shares_are_bounded():
    variance = torch.tensor([[1e-6], [1.0]]).expand(2, 8)
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    low, high = sorted(expert_shares([weight], variance, torch.tensor([1e5, 1e5]), 0.1))
    assert low == 0 and high == pytest.approx(0.2)
    low, high = sorted(expert_shares([weight], variance, torch.tensor([1e5, 1e5]), 0.9))
    assert high == pytest.approx(0.95) and low == pytest.approx(0.85)


def test_gaps_without_weights_count_alike():
    assert shares_by_gap([1.0, 2.0], 0.5) == shares_by_gap([1.0, 2.0], 0.5, weights=[3.0, 3.0])
    assert shares_by_gap([1.0, 2.0], 0.5, weights=[0.0, 0.0]) == shares_by_gap([1.0, 2.0], 0.5)


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
        cross_KDD=None,
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
