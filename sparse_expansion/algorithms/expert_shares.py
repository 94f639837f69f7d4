"""How zeros are shared out over the experts of a linear group.

Clusters differ in how hard their tokens are: whatever the pruner, what an expert loses of a token's
outputs differs tenfold. A token costs as many operations as its expert keeps weights, so that it is
the mean over tokens that is held, and not the mean over experts.

Shapes: O rows of all linears of the group, D input features, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from sparse_expansion.algorithms.allocation import shares_by_gap
from sparse_expansion.algorithms.centring import InputMeans
from sparse_expansion.algorithms.channels import squares_of_rows
from sparse_expansion.algorithms.compress import ExpertWeights, compress_linears
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.config import CompressionConfig, SparsityPattern
from sparse_expansion.types import SHARE_DIGITS

MAX_ROWS = 512
"""Rows that an expert's loss is estimated by where there are more, evenly spaced."""
PRIOR_TOKENS = 64.0
"""Tokens of the whole group's variance that every cluster's is mixed with: a cluster of a few
tokens hardly varies, and what it is given is not for them alone."""


def expert_shares(
    weights: Sequence[torch.Tensor],
    variance_KD: torch.Tensor,
    tokens_K: torch.Tensor,
    sparsity: float,
) -> list[float]:
    """Share of zeros of every expert, of a given mean over tokens.

    An expert's loss on a token is estimated by what the weights that are worth the least are worth,
    ``w^2`` times the variance of their input in the cluster; what is in common in its tokens is a
    bias's to keep. It is taken to grow with the share of zeros like a block's gap does, see
    ``shares_by_gap``.

    Args:
        weights: dense weights ``[O, D]`` that share the inputs.
        variance_KD: of every cluster's inputs about the cluster's mean.
        tokens_K: of every cluster.
        sparsity: the mean, between 0 and 1.
    """
    counts_K = tokens_K.double()
    variance_KD = variance_KD.double()
    mean_D = counts_K @ variance_KD / counts_K.sum().clamp_min(1)
    mixed_KD = counts_K[:, None] * variance_KD + PRIOR_TOKENS * mean_D
    mixed_KD /= counts_K[:, None] + PRIOR_TOKENS
    squares_OD = squares_of_rows(weights, MAX_ROWS)
    lost_K = [lost_energy(squares_OD, each_D.float(), sparsity) for each_D in mixed_KD]
    return shares_by_gap(lost_K, sparsity, weights=counts_K.tolist(), digits=SHARE_DIGITS)


def lost_energy(squares_OD: torch.Tensor, variance_D: torch.Tensor, sparsity: float) -> float:
    """What the least of ``w^2`` times a variance add up to, so many that ``sparsity`` is gone."""
    worth = (squares_OD * variance_D).flatten().sort().values
    return float(worth[: round(sparsity * len(worth))].sum(dtype=torch.float64))


def compress_by_share(
    shares: Sequence[float],
    weights: dict[str, torch.Tensor],
    H_KDD: torch.Tensor,
    config: CompressionConfig,
    grids: dict[str, AffineGrid | None],
    *,
    cross_KDD: torch.Tensor | None,
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
            cross_KDD=cross_KDD,
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
            cross_KDD=None if cross_KDD is None else cross_KDD[k : k + 1],
            means=None if means is None else means.of_expert(k),
            output_weights={name: found[k : k + 1] for name, found in output_weights.items()},
            products=products,
        )
        for k, share in enumerate(shares)
    ]
    return {name: ExpertWeights.joined([made[name] for made in each]) for name in weights}
