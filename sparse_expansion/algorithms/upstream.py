"""What the blocks before have changed, and how much of it a block's last linear can make up for.

Behind a block the hidden states of the compressed model lack something of the dense model's, which
has piled up over all blocks before. A part of it shows in the inputs of the block's last linear,
and this part can be put out with the rest.

Experts alone have too few tokens to tell it from chance: it is far less certain than what the
earlier linears of the same block have changed. So it is one regression over all clusters, about
their means, and shrunk.

Shapes: D input features, O output features, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_expansion.algorithms.hessian import energy_of, upper_cholesky_factor
from sparse_expansion.types import HessianSum


@dataclass(frozen=True)
class UpstreamCorrection:
    """What is added to a dense linear ``W x``, so that it makes up for the blocks before."""

    weight_OD: torch.Tensor
    """To be added to the weight: ``G``."""
    mean_KO: torch.Tensor
    """Mean of what is lacking over every cluster's tokens; 0 where it is not taken out."""
    explained: float
    """Share of the energy about these means that the regression explains, before it is shrunk."""
    shrinkage: float
    """Share of the regression that may be chance, and is left out: 0 to 1."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What experts are made with."""
        return [self.weight_OD, self.mean_KO]

    @property
    def facts(self) -> dict[str, float]:
        """What there is to say of it."""
        return {"explained": self.explained, "shrinkage": self.shrinkage}


def upstream_correction(
    gram: HessianSum, cross_OD: torch.Tensor, mean_KO: torch.Tensor, energy: float, damping: float
) -> UpstreamCorrection:
    """Least squares of ``|e - G x|^2`` over a group's tokens, with a pull towards nothing.

    Of ``e`` that has nothing to do with the inputs, a regression on ``f`` free features (a pull
    leaves fewer than D) explains ``f / n`` of the energy with ``n`` tokens. The share of the whole
    that this is of what is explained is left out, as James and Stein's estimator does (Estimation
    with Quadratic Loss, 1961, with a known variance in place of theirs).

    Args:
        gram: sums of ``x x^T``, about clusters' means where ``cross_OD`` and ``energy`` are.
        cross_OD: ``sum e x^T``.
        mean_KO: mean of ``e`` over every cluster's tokens, where it is taken out.
        energy: ``sum |e|^2``.
        damping: share of the Hessian's mean diagonal that pulls.

    Raises:
        CompressionError: the sums are not finite, or cannot be factored.
    """
    factor = upper_cholesky_factor(gram.sum_DD[None], damping_fraction=damping)
    factor_DD = factor.factor_KDD[0]
    half_DO = torch.linalg.solve_triangular(factor_DD, cross_OD.mT, upper=True)
    inverse_DD = torch.linalg.solve_triangular(
        factor_DD, torch.eye(len(factor_DD), device=factor_DD.device), upper=True
    )
    free = len(factor_DD) - float(factor.damping_K[0]) * energy_of(inverse_DD)
    signal = energy_of(half_DO)
    chance = energy * free / max(gram.num_tokens, 1)
    shrinkage = min(1.0, max(0.0, chance) / signal) if signal > 0 else 1.0
    found_DO = torch.linalg.solve_triangular(factor_DD.mT, half_DO, upper=False)
    return UpstreamCorrection(
        weight_OD=found_DO.mT * (1 - shrinkage),
        mean_KO=mean_KO,
        explained=signal / energy if energy > 0 else 0.0,
        shrinkage=shrinkage,
    )
