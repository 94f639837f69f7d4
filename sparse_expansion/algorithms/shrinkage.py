"""Hessian sums of experts with few tokens, drawn towards what is known of their group.

Shapes: D input features, O output features.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparse_expansion.algorithms.centring import about_mean
from sparse_expansion.algorithms.hessian import energy_of
from sparse_expansion.config import CompressionConfig
from sparse_expansion.types import CompressionError, HessianSum

WHITENING_DAMPING = 0.1
"""Share of every feature's own energy that is added to a group's before it whitens. In directions
with less than that, experts are held by their damping, and what is uncertain there does not
matter."""


class ShrinkTarget:
    """A group's second moment, and the coordinates in which experts' are compared with it."""

    def __init__(self, whole: HessianSum) -> None:
        """Factor it.

        Args:
            whole: sums over tokens of the group.

        Raises:
            CompressionError: they are no sums of finite inputs.
        """
        self.mean_DD = whole.sum_DD / max(whole.num_tokens, 1)
        energy_D = self.mean_DD.diagonal()
        damped_DD = self.mean_DD.clone()
        # A feature that no token uses has a row of zeros: any scale will do.
        damped_DD.diagonal().add_(
            torch.where(energy_D > 0, energy_D * WHITENING_DAMPING, torch.ones_like(energy_D))
        )
        self._factor_DD, info = torch.linalg.cholesky_ex(damped_DD)
        if int(info) != 0:
            raise CompressionError("the Hessian of a group is not positive definite")
        self._whitened_DD = self._whitened(self.mean_DD)

    def _whitened(self, S_DD: torch.Tensor) -> torch.Tensor:
        """A symmetric ``S`` in coordinates where the damped group has unit energy everywhere."""
        half_DD = torch.linalg.solve_triangular(self._factor_DD, S_DD, upper=False)
        return torch.linalg.solve_triangular(self._factor_DD, half_DD.mT, upper=False)

    def weight(self, mean_DD: torch.Tensor, count: int) -> float:
        """The weight of the group for an expert's ``mean_DD`` over ``count`` tokens, 0 to 1."""
        if count <= 1:
            return 1.0
        white_DD = self._whitened(mean_DD)
        trace = float(white_DD.diagonal().sum(dtype=torch.float64))
        noise = (energy_of(white_DD) + trace**2) / count
        distance = energy_of(white_DD.sub_(self._whitened_DD))
        return min(1.0, noise / distance) if distance > 0 else 1.0


def shrink(part: HessianSum, target: ShrinkTarget) -> tuple[HessianSum, float]:
    """An expert's sums drawn towards its whole group's, the more the less its tokens say.

    With ``S`` and ``T`` the mean of ``x x^T`` over the expert's ``n`` tokens and over the group's,
    the weight ``w`` of ``T`` in ``(1 - w) S + w T`` that has the least expected squared error of
    the expert's true second moment is ``E|S - E S|^2 / E|S - T|^2`` (Ledoit and Wolf, A
    well-conditioned estimator for large-dimensional covariance matrices, 2004, section 2, with the
    group's in place of the identity). Errors are measured where ``T``, damped, is the identity: in
    the inputs' own coordinates a few features with most of the energy decide, in which experts
    differ most and which are known best, and ``w`` comes out near 0 however few the tokens are.
    The numerator is that of normal inputs, ``(|S|^2 + tr(S)^2) / n`` (Chen, Wiesel, Eldar and Hero,
    Shrinkage Algorithms for MMSE Covariance Estimation, 2010, section III), the denominator is
    estimated by ``|S - T|^2``, and ``w`` kept within 0 and 1. Tokens count as independent, which
    those of one text are not: it shrinks too little rather than too much.

    The products of what outputs lack with the inputs, ``sum r x^T``, are drawn towards nothing
    by a weight of their own, see ``_residual_weight``: how uncertain they are has little to do with
    how much the expert's inputs are like its group's.

    Args:
        part: the expert's sums.
        target: the group's.

    Returns:
        The sums, for as many tokens as before, and ``w``, which is 1 for one token or none.
    """
    count = part.num_tokens
    mean_DD = part.sum_DD / max(count, 1)
    weight = target.weight(mean_DD, count)
    # Without a token it is the group's mean: of one, a scale that nothing depends on.
    sum_DD = mean_DD.mul_((1 - weight) * max(count, 1))
    sum_DD.add_(target.mean_DD, alpha=weight * max(count, 1))
    cross_OD = part.cross_OD
    if cross_OD is not None:
        cross_OD = cross_OD * (1 - _residual_weight(part))
    return replace(part, sum_DD=sum_DD, cross_OD=cross_OD), weight


def _residual_weight(part: HessianSum) -> float:
    """The weight of nothing in the products of what outputs lack with inputs.

    As ``shrink`` has it, with nothing for ``T``, in the inputs' own coordinates: the numerator is
    that of normal inputs and residuals, ``(tr(S) mean |r|^2 + |C|^2) / n``, where ``C`` is the mean
    of ``r x^T``.
    """
    assert part.cross_OD is not None
    count = part.num_tokens
    energy = energy_of(part.cross_OD) / max(count, 1) ** 2
    if count <= 1 or energy <= 0:
        return 1.0
    trace = float(part.sum_DD.diagonal().sum(dtype=torch.float64)) / count
    noise = (trace * part.residual_energy / count + energy) / count
    return min(1.0, noise / energy)


class Regulariser:
    """Gives every expert of a group the sums that it is made with."""

    def __init__(self, group: HessianSum, compression: CompressionConfig) -> None:
        """Look at nothing yet.

        Args:
            group: sums over (a sample of) the tokens of all experts, where they are added up; about
                their clusters' means where experts have biases, see ``algorithms.centring``.
            compression: the settings, of which ``min_tokens_per_expert``, ``shrink_hessians`` and
                ``expert_biases`` count.
        """
        self._group = group
        self._compression = compression
        self._about_means = compression.expert_biases
        self._target: ShrinkTarget | None = None

    def regularise(self, part: HessianSum) -> tuple[HessianSum, float]:
        """An expert's own sums, drawn towards its group's, or its group's.

        An expert with fewer tokens than ``CompressionConfig.min_tokens`` would be fitted to these
        tokens alone: it takes its whole group's sums and so becomes the plain expert of no cluster.
        Where the group has no token, as an expert of a mixture may, all features count alike: what
        is pruned then are the smallest weights. An expert with a bias has its sums about its mean,
        and its tokens' own mean, or without one its group's.

        Args:
            part: sums over the expert's own tokens.

        Returns:
            The sums, and the share of the group in them (0 to 1).

        Raises:
            CompressionError: see ``ShrinkTarget``.
        """
        group = self._group
        if not group.num_tokens and not part.num_tokens:
            width = part.sum_DD.shape[0]
            return replace(part, sum_DD=torch.eye(width, device=part.sum_DD.device)), 1.0
        if self._about_means:
            part = self._part_about_mean(part)
        if part.num_tokens < self._compression.min_tokens(part.sum_DD.shape[0]):
            return self._in_place_of(part), 1.0
        if not self._compression.shrink_hessians:
            return part, 0.0
        if self._target is None:
            there = replace(group, sum_DD=group.sum_DD.to(part.sum_DD.device))
            self._target = ShrinkTarget(there)
        return shrink(part, self._target)

    def _part_about_mean(self, part: HessianSum) -> HessianSum:
        """An expert's sums about its mean; with its group's mean where it has no token."""
        if part.num_tokens or self._group.sum_D is None:
            return about_mean(part)
        mean_D = self._group.sum_D / max(self._group.num_tokens, 1)
        return replace(part, sum_D=mean_D.to(part.sum_DD.device))

    def _in_place_of(self, part: HessianSum) -> HessianSum:
        """The group's sums, with the mean of an expert's tokens and no residuals."""
        cross_OD = None if part.cross_OD is None else torch.zeros_like(part.cross_OD)
        ratio = max(self._group.num_tokens, 1) / max(part.num_tokens, 1)
        return replace(
            self._group,
            sum_D=None if part.sum_D is None else part.sum_D * ratio,
            cross_OD=cross_OD,
            residual_O=None if part.residual_O is None else part.residual_O * ratio,
        )
