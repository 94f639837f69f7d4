"""Hessian sums about the mean: what is left for weights where every expert has a bias.

With inputs of mean ``m`` and a dense residual of mean ``r``, an expert ``V x + b`` of outputs that
are to be ``W (x + d)`` does best with ``b = W (m + r) - V m``, whatever ``V`` is. ``V`` is then
judged by sums about the means, in which the inputs' common part is nothing: the mean of a cluster
is most of the energy of its inputs.

Shapes: D input features, K clusters.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparse_expansion.types import HessianSum

VARIANCE_FLOOR = 1e-4
"""Share of the sum of a feature's squares that is added to that about the mean, so that what a
difference of large float32 sums leaves is never taken for an energy, or below 0."""


def about_mean(part: HessianSum) -> HessianSum:
    """The sums over tokens less their mean, and over their residuals less theirs.

    ``sum_D`` and ``residual_D`` stay: means are known by them.
    """
    assert part.sum_D is not None
    count = max(part.num_tokens, 1)
    sum_D = part.sum_D.to(part.sum_DD)
    sum_DD = torch.addr(part.sum_DD, sum_D, sum_D, alpha=-1 / count)
    _add_floor(sum_DD, part.sum_DD)
    if part.cross_DD is None or part.residual_D is None:
        return replace(part, sum_DD=sum_DD)
    residual_D = part.residual_D.to(sum_D)
    return replace(
        part,
        sum_DD=sum_DD,
        cross_DD=torch.addr(part.cross_DD, residual_D, sum_D, alpha=-1 / count),
        residual_energy=max(
            0.0, part.residual_energy - float(part.residual_D.square().sum()) / count
        ),
    )


def about_cluster_means(
    group: HessianSum, sums_KD: torch.Tensor, counts_K: torch.Tensor
) -> HessianSum:
    """A group's sums over tokens less their cluster's mean: what is alike in its experts' sums.

    Args:
        group: sums over all tokens.
        sums_KD: ``sum x`` over every cluster's tokens, float64.
        counts_K: tokens of every cluster.
    """
    means_KD = sums_KD / counts_K.clamp(min=1)[:, None]
    between_DD = (means_KD.T @ sums_KD).to(group.sum_DD)
    sum_DD = group.sum_DD - between_DD
    _add_floor(sum_DD, group.sum_DD)
    return replace(group, sum_DD=sum_DD)


def _add_floor(about_DD: torch.Tensor, sum_DD: torch.Tensor) -> None:
    about_DD.diagonal().add_(sum_DD.diagonal(), alpha=VARIANCE_FLOOR)
