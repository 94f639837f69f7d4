"""Sparsities and numbers of experts by block: by hand, in bounds, and against every choice."""

import itertools
import math

import pytest
import torch

from sparse_expansion.algorithms.allocation import (
    LARGEST_CHANGE,
    STEEPNESS,
    clusters_by_error,
    shares_by_gap,
)


def test_experts_are_shared_out_as_well_as_can_be():
    """Against every choice there is."""
    generator = torch.Generator().manual_seed(3)
    tried = [2, 4, 8, 16]
    for mean in (2, 4, 5, 16):
        gaps = torch.rand(4, generator=generator).tolist()
        draws = torch.rand(4, 4, generator=generator).sort(dim=1, descending=True).values
        errors = [dict(zip(tried, row.tolist(), strict=True)) for row in draws]

        def total(choice, gaps=gaps, errors=errors):
            return sum(g * e[k] for g, e, k in zip(gaps, errors, choice, strict=True))

        found = clusters_by_error(gaps, errors, mean)
        allowed = [c for c in itertools.product(tried, repeat=4) if sum(c) <= 4 * mean]
        assert sum(found) <= 4 * mean
        assert total(found) == pytest.approx(min(map(total, allowed)))
    with pytest.raises(ValueError, match="above --mean-clusters 1"):
        clusters_by_error([1.0], [{2: 0.5}], 1)


def test_shares_by_hand():
    # The second block loses e times as much: it gets 1 / STEEPNESS fewer zeros.
    first, second = shares_by_gap([0.1, 0.1 * math.e], 0.6)
    assert first - second == pytest.approx(1 / STEEPNESS, abs=1e-6)
    assert first + second == pytest.approx(1.2, abs=1e-6)
    assert shares_by_gap([0.3, 0.3, 0.3], 0.5) == [0.5, 0.5, 0.5]


def test_shares_have_bounds_and_keep_their_mean():
    shares = shares_by_gap([1.0, 0.01, 0.02, 0.0, -0.5], 0.7)
    assert sum(shares) / 5 == pytest.approx(0.7, abs=1e-5)
    assert min(shares) == shares[0] == pytest.approx(0.7 - LARGEST_CHANGE)
    assert shares[3] == shares[4] <= 0.7 + LARGEST_CHANGE + 1e-6
    assert max(shares_by_gap([1.0, 0.1, 0.1, 0.1], 0.95)) == pytest.approx(0.95)
    assert min(shares_by_gap([1.0, 0.1], 0.05)) >= 0
