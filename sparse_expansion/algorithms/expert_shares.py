"""How zeros are shared out over the experts of a linear group.

Clusters differ in how hard their tokens are: whatever the pruner, what an expert loses of a token's
outputs differs tenfold. A token costs as many operations as its expert keeps weights, so that it is
the mean over tokens that is held, and not the mean over experts.

Shapes: O rows of all linears of the group, D input features, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from sparse_expansion.algorithms.allocation import share_bounds, sides_of_mean
from sparse_expansion.algorithms.centring import InputMeans
from sparse_expansion.algorithms.channels import evenly_spaced_rows, squares_of_rows
from sparse_expansion.algorithms.compress import ExpertWeights, compress_linears
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.config import CompressionConfig, SparsityPattern
from sparse_expansion.types import SHARE_DIGITS

LARGEST_CHANGE = 0.3
"""Most by which an expert's share of zeros may differ from the mean."""
NUM_QUANTILES = 4097
"""Values that stand for an expert's weights' worth: finer than shares are rounded."""
MAX_ROWS = 512
"""Rows that an expert's weights' worth is estimated by where there are more, evenly spaced."""
PRIOR_TOKENS = 64.0
"""Tokens of the whole group's that every cluster's mean is mixed with: a cluster of a few tokens
hardly varies, and what it is given is not for them alone."""


def expert_shares(
    weights: Sequence[torch.Tensor],
    variance_KD: torch.Tensor,
    tokens_K: torch.Tensor,
    sparsity: float,
    *,
    sensitivities: Sequence[torch.Tensor] = (),
) -> list[float]:
    """Share of zeros of every expert, of a given mean over tokens.

    What a weight is worth to an expert's token is estimated by ``w^2`` times the variance of its
    input in the cluster; what is in common in its tokens is a bias's to keep. Where it is known how
    much the block depends on an output in the cluster, the worth is multiplied with that: what the
    block loses is compared then. The weights that are worth less than a threshold are an expert's
    share, and the threshold is the same for all: nothing that a token keeps is worth less than
    what another loses. No share moves by more than ``LARGEST_CHANGE``, or above
    ``allocation.LARGEST_SHARE``.

    Args:
        weights: dense weights ``[O, D]`` that share the inputs.
        variance_KD: of every cluster's inputs about the cluster's mean.
        tokens_K: of every cluster.
        sparsity: the mean, between 0 and 1.
        sensitivities: of every weight, what squared errors of its outputs are multiplied with in
            every cluster ``[K, O]``, see ``data.sensitivities``; 1 by default.
    """
    counts_K = tokens_K.double()
    mixed_KD = cluster_means(counts_K[:, None] * variance_KD.double(), counts_K)
    squares_OD = squares_of_rows(weights, MAX_ROWS)
    scales_KO = torch.ones(len(counts_K), len(squares_OD), device=squares_OD.device)
    if sensitivities:
        rows = evenly_spaced_rows([part_KO.T for part_KO in sensitivities], MAX_ROWS)
        scales_KO = torch.cat(rows).T.float()
    worth_KQ = [
        quantiles(squares_OD * scale_O[:, None] * each_D.float())
        for scale_O, each_D in zip(scales_KO, mixed_KD, strict=True)
    ]
    bounds = share_bounds(sparsity, LARGEST_CHANGE)
    shares_K = shares_below(np.stack(worth_KQ), counts_K.cpu().numpy(), sparsity, bounds)
    return [round(float(share), SHARE_DIGITS) for share in shares_K]


def cluster_means(sums_KN: torch.Tensor, tokens_K: torch.Tensor) -> torch.Tensor:
    """Means over every cluster's tokens, each mixed with ``PRIOR_TOKENS`` of the whole group's.

    Args:
        sums_KN: over the clusters' tokens, float64.
        tokens_K: how many there are.
    """
    mean_N = sums_KN.sum(dim=0) / tokens_K.sum().clamp_min(1)
    return (sums_KN + PRIOR_TOKENS * mean_N) / (tokens_K[:, None] + PRIOR_TOKENS)


def quantiles(worth_OD: torch.Tensor) -> np.ndarray:
    """So many of all values by rank, the least and the greatest among them, ``[Q]``."""
    ordered = worth_OD.flatten().sort().values
    ranks = np.linspace(0, len(ordered) - 1, NUM_QUANTILES).round().astype(np.int64)
    return ordered[torch.from_numpy(ranks).to(ordered.device)].double().cpu().numpy()


def shares_below(
    worth_KQ: np.ndarray, tokens_K: np.ndarray, mean: float, bounds: tuple[float, float]
) -> np.ndarray:
    """Shares of experts' weights below one threshold, of a given mean over tokens.

    Args:
        worth_KQ: every expert's weights' worth by rank, from 0 to 1 in even steps.
        tokens_K: what experts count for; all the same where there are none.
        mean: that is wanted, within the bounds.
        bounds: of all shares.
    """
    ranks_Q = np.linspace(0, 1, worth_KQ.shape[1])
    counts_K = tokens_K if tokens_K.any() else np.ones(len(tokens_K))

    def shares_at(place: float) -> np.ndarray:
        shares = [np.interp(place, worth_Q, ranks_Q) for worth_Q in logs_KQ]
        return np.clip(shares, *bounds)

    # What is worth nothing goes first; magnitudes are compared by their logarithms.
    floor = worth_KQ[worth_KQ > 0].min(initial=1.0)
    logs_KQ = np.log(np.maximum(worth_KQ, floor / 2))
    within = logs_KQ.min() - 1, logs_KQ.max() + 1
    # Where many weights are worth the same, shares jump: the mean lies between the two sides.
    less_K, more_K = map(shares_at, sides_of_mean(shares_at, within, mean, counts_K))
    sides = [float(np.average(side_K, weights=counts_K)) for side_K in (less_K, more_K)]
    way = (mean - sides[0]) / (sides[1] - sides[0]) if sides[1] > sides[0] else 0.0
    found: np.ndarray = less_K + way * (more_K - less_K)
    return found


def compress_by_share(
    shares: Sequence[float],
    weights: dict[str, torch.Tensor],
    H_KDD: torch.Tensor,
    config: CompressionConfig,
    grids: dict[str, AffineGrid | None],
    *,
    cross_KOD: torch.Tensor | None,
    means: InputMeans | None,
    output_weights: Mapping[str, torch.Tensor],
    products: str,
) -> dict[str, ExpertWeights]:
    """``compress_linears`` of experts that have shares of zeros of their own, one after another.

    Without shares all have the configuration's, and are made at once.
    """
    if not shares:
        return compress_linears(
            weights,
            H_KDD,
            config,
            grids,
            cross_KOD=cross_KOD,
            means=means,
            output_weights=output_weights,
            products=products,
        )
    each = [
        compress_linears(
            weights,
            H_KDD[k : k + 1],
            replace(config, sparsity=SparsityPattern(fraction=share)),
            grids,
            cross_KOD=None if cross_KOD is None else cross_KOD[k : k + 1],
            means=None if means is None else means.of_expert(k),
            output_weights={name: found[k : k + 1] for name, found in output_weights.items()},
            products=products,
        )
        for k, share in enumerate(shares)
    ]
    return {name: ExpertWeights.joined([made[name] for made in each]) for name in weights}
