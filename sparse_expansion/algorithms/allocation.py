"""Sparsities and numbers of experts by block, shared out under a fixed mean.

Both rest on every block's *gap*: the rise of log-perplexity when that block alone is pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

STEEPNESS = 7.0
"""Growth of a block's gap with its sparsity: ``exp(7 * 0.1)`` is twice the gap for a tenth more.
SmolLM2-135M's gap with one cluster grows fourfold from 50 to 70 %."""
LARGEST_CHANGE = 0.2
"""Most by which a block's sparsity may differ from the mean."""
LARGEST_SHARE = 0.95
"""Largest sparsity of a block, unless the mean itself is above it."""
GAP_RANGE = 1000
"""Largest ratio of two blocks' gaps: smaller gaps are noise, and count as the least in range."""


def shares_by_gap(gaps: Sequence[float], sparsity: float) -> list[float]:
    """Sparsities of all blocks, of a given mean, for which the sum of the gaps is least.

    A block's gap is taken to grow as ``g_l exp(STEEPNESS (s_l - s))``: the sum is least where all
    are equal, ``s_l = s - log(g_l) / STEEPNESS + constant``. No share moves by more than
    ``LARGEST_CHANGE``, or above ``LARGEST_SHARE``; gaps are kept within ``GAP_RANGE``.

    Args:
        gaps: ``g_l`` of L blocks, each pruned to the mean sparsity.
        sparsity: the mean ``s``, 0 to 1.

    Returns:
        ``s_l`` of L blocks, to six places.
    """
    floor = _smallest_gap(gaps)
    wanted_L = np.array([-math.log(max(gap, floor)) / STEEPNESS for gap in gaps])
    low, high = share_bounds(sparsity, LARGEST_CHANGE)

    def shares_at(constant: float) -> np.ndarray:
        return np.clip(wanted_L + constant, low, high)

    _, constant = sides_of_mean(shares_at, (low - wanted_L.max(), high - wanted_L.min()), sparsity)
    return [round(float(share), 6) for share in shares_at(constant)]


def share_bounds(sparsity: float, largest_change: float) -> tuple[float, float]:
    """Least and largest share of zeros of what shares out a mean of ``sparsity``."""
    low = max(0.0, sparsity - largest_change)
    return low, max(sparsity, min(sparsity + largest_change, LARGEST_SHARE))


def sides_of_mean(
    shares_at: Callable[[float], np.ndarray],
    within: tuple[float, float],
    mean: float,
    weights: np.ndarray | None = None,
) -> tuple[float, float]:
    """Where shares that rise with a number pass a mean, by bisection: just below, and above it.

    Args:
        shares_at: the shares for a number.
        within: two numbers; the mean lies between those of their shares.
        mean: that is wanted.
        weights: what every share counts for, all the same by default.
    """
    below, above = within
    for _ in range(60):
        middle = (below + above) / 2
        if np.average(shares_at(middle), weights=weights) < mean:
            below = middle
        else:
            above = middle
    return below, above


def clusters_by_error(
    gaps: Sequence[float], errors: Sequence[dict[int, float]], mean: int
) -> list[int]:
    """Numbers of experts of all blocks, with this mean at most, for which the summed gap is least.

    A block's gap is taken to be in proportion to the error of its linears' outputs. Every sum of
    numbers is tried once (dynamic programming over blocks).

    Args:
        gaps: gaps of L blocks, each with one expert.
        errors: for each of L blocks, error by number of experts, as a share of one expert's error.
        mean: experts of a block on average.

    Returns:
        Numbers of experts of L blocks.

    Raises:
        ValueError: every number that was tried is above the mean.
    """
    tried = sorted(errors[0])
    if tried[0] > mean:
        raise ValueError(
            f"--num_clusters {tried[0]} is the least to try, above --mean-clusters {mean}: try "
            "smaller ones too"
        )
    floor = _smallest_gap(gaps)
    budget = mean * len(gaps)
    # best_B[b]: the least summed gap of the blocks so far with b experts at most; choices has, for
    # every block, which of the tried numbers leads there.
    best_B = np.zeros(budget + 1)
    choices = []
    for gap, error in zip(gaps, errors, strict=True):
        options_NB = np.full((len(tried), budget + 1), np.inf)
        for number, count in enumerate(tried):
            if count <= budget:
                rest = best_B[: budget + 1 - count]
                options_NB[number, count:] = rest + max(gap, floor) * error[count]
        choices.append(options_NB.argmin(axis=0))
        best_B = options_NB.min(axis=0)
    found = []
    for choice_B in reversed(choices):
        found.append(tried[int(choice_B[budget])])
        budget -= found[-1]
    return found[::-1]


def _smallest_gap(gaps: Sequence[float]) -> float:
    """What smaller (or negative) gaps count as."""
    return max(max(gaps) / GAP_RANGE, 1e-9)
