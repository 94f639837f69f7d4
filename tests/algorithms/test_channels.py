"""Channel permutations: what groups of N:M keep."""

import itertools

import pytest
import torch

from sparse_expansion.algorithms import channels
from sparse_expansion.algorithms.channels import channel_permutation
from sparse_expansion.algorithms.hessian import hessian_sum, permuted
from sparse_expansion.config import SparsityPattern
from sparse_expansion.types import in_columns

PATTERN = SparsityPattern.parse("2:4")


def kept_share(weights, energy_D, columns, pattern=PATTERN):
    """Of every row's energy, on average over rows, what N:M keeps: by sorting, in float64."""
    shares = []
    for row in torch.cat(weights).double():
        worth = (row.square() * energy_D.double())[columns.long()]
        kept = 0.0
        for first in range(0, len(worth) // pattern.group * pattern.group, pattern.group):
            group = sorted(worth[first : first + pattern.group].tolist())
            kept += sum(group[pattern.pruned :])
        shares.append(kept / float(worth.sum()))
    return sum(shares) / len(shares)


def test_columns_that_matter_are_dealt_out():
    """Three of four neighbours are worth a hundred: two groups of four have room for all."""
    weight = torch.tensor([[10.0, 10, 10, 1, 1, 1, 1, 1], [10, -10, 10, 1, 1, -1, 1, 1]])
    columns = channel_permutation([weight], torch.ones(8), PATTERN)
    assert sorted(columns.tolist()) == list(range(8))
    places = {column: place // 4 for place, column in enumerate(columns.tolist())}
    assert {places[0], places[1], places[2]} == {0, 1}
    assert kept_share([weight], torch.ones(8), columns) == pytest.approx(301 / 305)


def test_what_an_input_has_of_energy_counts():
    weight = torch.ones(3, 8)
    energy = torch.tensor([9.0, 9, 9, 9, 1, 1, 1, 1])
    columns = channel_permutation([weight], energy, PATTERN)
    assert kept_share([weight], energy, columns) == pytest.approx(36 / 40)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8"])
def test_more_is_kept_the_more_it_is_exchanged(pattern, monkeypatch):
    pattern = SparsityPattern.parse(pattern)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 64, generator=generator) for rows in (24, 40)]
    energy = torch.rand(64, generator=generator).square() * 10
    kept = [kept_share(weights, energy, torch.arange(64), pattern)]
    for rounds in (0, 1, 2):
        monkeypatch.setattr(channels, "ROUNDS", rounds)
        columns = channel_permutation(weights, energy, pattern)
        assert sorted(columns.tolist()) == list(range(64))
        kept.append(kept_share(weights, energy, columns, pattern))
    assert kept[0] < kept[2] <= kept[3] and kept[1] < kept[2]


def test_it_is_near_the_best_of_all():
    """Two groups of four: 35 ways to share out eight columns."""
    generator = torch.Generator().manual_seed(1)
    ratios, before = [], []
    for _ in range(20):
        weight, energy = torch.randn(6, 8, generator=generator), torch.ones(8)
        found = kept_share([weight], energy, channel_permutation([weight], energy, PATTERN))
        every = []
        for three in itertools.combinations(range(1, 8), 3):
            first = [0, *three]
            rest = [column for column in range(8) if column not in first]
            every.append(kept_share([weight], energy, torch.tensor(first + rest)))
        assert found <= max(every) + 1e-6
        ratios.append(found / max(every))
        before.append(kept_share([weight], energy, torch.arange(8)) / max(every))
    assert sum(ratios) / 20 > 0.98 > sum(before) / 20


def test_a_group_that_is_not_whole_stays_at_the_end():
    columns = channel_permutation([torch.randn(4, 11)], torch.ones(11), PATTERN)
    assert columns.tolist()[8:] == [8, 9, 10]
    assert sorted(columns.tolist()) == list(range(11))
    assert channel_permutation([torch.randn(4, 3)], torch.ones(3), PATTERN).tolist() == [0, 1, 2]


def test_many_groups_and_rows_are_taken_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(100, 80, generator=generator)]
    energy = torch.rand(80, generator=generator)
    whole = kept_share(weights, energy, channel_permutation(weights, energy, PATTERN))
    monkeypatch.setattr(channels, "MAX_GROUPS", 8)
    monkeypatch.setattr(channels, "MAX_ROWS", 50)
    columns = channel_permutation(weights, energy, PATTERN)
    assert sorted(columns.tolist()) == list(range(80))
    natural = kept_share(weights, energy, torch.arange(80))
    assert natural < kept_share(weights, energy, columns) <= whole


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_rows_at_once_change_nothing(room, monkeypatch):
    weights = [torch.randn(50, 32, generator=torch.Generator().manual_seed(0))]
    wanted = channel_permutation(weights, torch.ones(32), PATTERN)
    monkeypatch.setattr(channels, "GAIN_BYTES", {"cpu": room, "cuda": room})
    assert torch.equal(channel_permutation(weights, torch.ones(32), PATTERN), wanted)


@pytest.mark.parametrize("energy", [torch.zeros(8), torch.full((8,), 1e-38)])
def test_inputs_that_are_never_used_have_some_order(energy):
    columns = channel_permutation([torch.zeros(2, 8), torch.ones(2, 8)], energy, PATTERN)
    assert sorted(columns.tolist()) == list(range(8))


def test_sums_are_those_of_permuted_inputs():
    X, r = torch.randn(30, 6), torch.randn(30, 4)
    columns = torch.tensor([3, 1, 5, 0, 2, 4], dtype=torch.int32)
    wanted = hessian_sum(in_columns(X, columns), r)
    found = permuted(hessian_sum(X, r), columns)
    assert found.num_tokens == 30
    torch.testing.assert_close(found.residual_energy, wanted.residual_energy)
    for name in ("sum_DD", "sum_D", "cross_OD", "residual_O"):
        one, other = getattr(found, name).float(), getattr(wanted, name).float()
        torch.testing.assert_close(one, other)
    assert permuted(wanted, None) is wanted
