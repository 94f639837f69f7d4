"""Hessian sums about the mean: what is left for weights where every expert has a bias.

With inputs of mean ``m``, an expert ``V x + b`` of outputs that are to be ``W x + r`` does best
with the mean of ``r`` and ``W m - V m`` for its ``b``, whatever ``V`` is. ``V`` is then judged by
sums about the means, in which the inputs' common part is nothing: the means of clusters have a good
part of the inputs' energy, see docs/method.md.

Shapes: D input features, O output features, K experts or clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sparse_expansion.types import HessianSum

VARIANCE_FLOOR = 1e-4
"""Share of the sum of a feature's squares that is added to that about the mean, so that what a
difference of large float32 sums leaves is never taken for an energy, or below 0."""
ROUNDED_FLOOR = 4e-3
"""The same where the factors of the sums' products were rounded to TF32, to one part in 2048."""


@dataclass(frozen=True)
class InputMeans:
    """What experts with biases have to know of their tokens, beside sums about the means."""

    input_KD: torch.Tensor
    """Mean of the inputs."""
    residual_KO: torch.Tensor | None
    """Mean of what outputs lack, None where they lack nothing."""
    num_tokens_K: tuple[int, ...]
    """Tokens that the sums are over."""

    @classmethod
    def of(cls, part: HessianSum) -> InputMeans:
        """That of one expert's sums."""
        assert part.sum_D is not None
        count = max(part.num_tokens, 1)
        residual_O = part.residual_O
        return cls(
            (part.sum_D / count).float()[None],
            None if residual_O is None else (residual_O / count).float()[None],
            (part.num_tokens,),
        )

    @classmethod
    def joined(cls, parts: Sequence[InputMeans]) -> InputMeans:
        """Those of several experts, all of which have residuals or none."""
        residuals = [part.residual_KO for part in parts if part.residual_KO is not None]
        return cls(
            torch.cat([part.input_KD for part in parts]),
            torch.cat(residuals) if residuals else None,
            sum((part.num_tokens_K for part in parts), ()),
        )

    def lacking(self, mean_KO: torch.Tensor, added_OD: torch.Tensor) -> InputMeans:
        """The same where outputs lack more, and a weight is added that puts out a part of it.

        Args:
            mean_KO: mean of what is lacking besides.
            added_OD: what is added to the dense weight that biases are for.
        """
        residual_KO = mean_KO - self.input_KD @ added_OD.T
        if self.residual_KO is not None:
            residual_KO += self.residual_KO
        return replace(self, residual_KO=residual_KO)

    def of_rows(self, rows: slice) -> InputMeans:
        """The same for some of the outputs."""
        if self.residual_KO is None:
            return self
        return replace(self, residual_KO=self.residual_KO[:, rows])

    def of_expert(self, expert: int) -> InputMeans:
        """Those of one of the experts."""
        one = slice(expert, expert + 1)
        residual_KO = None if self.residual_KO is None else self.residual_KO[one]
        return InputMeans(self.input_KD[one], residual_KO, self.num_tokens_K[one])

    def energies(self, W_OD: torch.Tensor, chosen: slice) -> list[float]:
        """``n |W m|^2`` of some experts: what sums about means leave out of outputs' energies."""
        means_KO = self.input_KD[chosen] @ W_OD.float().T
        squares = means_KO.square().sum(dim=1).tolist()
        return [n * square for n, square in zip(self.num_tokens_K[chosen], squares, strict=True)]

    def biases(self, W_OD: torch.Tensor, weight_KOD: torch.Tensor) -> torch.Tensor:
        """``W m - V_k m`` and the mean of ``r``, the best bias of every expert, ``[K, O]``.

        Args:
            W_OD: the dense weight.
            weight_KOD: the experts.
        """
        W = W_OD.float()
        found = [torch.mv(W - V, m) for V, m in zip(weight_KOD, self.input_KD, strict=True)]
        biases_KO = torch.stack(found)
        return biases_KO if self.residual_KO is None else biases_KO + self.residual_KO


def about_mean(part: HessianSum) -> HessianSum:
    """The sums over tokens less their mean, and over what their outputs lack less its mean.

    ``sum_D`` and ``residual_O`` stay: means are known by them.
    """
    assert part.sum_D is not None
    count = max(part.num_tokens, 1)
    sum_D = part.sum_D.to(part.sum_DD)
    sum_DD = torch.addr(part.sum_DD, sum_D, sum_D, alpha=-1 / count)
    _add_floor(sum_DD, part.sum_DD)
    if part.cross_OD is None or part.residual_O is None:
        return replace(part, sum_DD=sum_DD)
    residual_O = part.residual_O.to(sum_D)
    return replace(
        part,
        sum_DD=sum_DD,
        cross_OD=torch.addr(part.cross_OD, residual_O, sum_D, alpha=-1 / count),
        residual_energy=max(
            0.0, part.residual_energy - float(part.residual_O.square().sum()) / count
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
    rounded = sum_DD.is_cuda and torch.backends.cuda.matmul.allow_tf32
    floor = ROUNDED_FLOOR if rounded else VARIANCE_FLOOR
    about_DD.diagonal().add_(sum_DD.diagonal(), alpha=floor)
