"""Values that pass between the rooms.

Shape suffixes used everywhere: T tokens, D input features, O output features, K clusters
(experts), P router features (PCA components), L window length, N windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that models are read, made and run in."""

SHARE_DIGITS = 4
"""Places of an expert's share of zeros: no more than float32 holds for certain."""


class CompressionError(ValueError):
    """A unit of work cannot be done for a reason of its own; the message names the place."""


@dataclass(frozen=True)
class Router:
    """A group's router: ``argmin_k ||(x - mean) components^T - centroid_k||^2``.

    ``components_PD`` is None when PCA is skipped (then P = D).
    """

    mean_D: torch.Tensor
    components_PD: torch.Tensor | None
    centroids_KP: torch.Tensor
    columns_D: torch.Tensor | None = None
    """The input feature that is the experts' column 0, 1, ... (int32), None where that is its own
    place. Routers themselves take features in their places."""

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.centroids_KP.shape[0]

    @property
    def is_folded(self) -> bool:
        """Whether centroids are taken back to the inputs' space: fewer products where K <= P."""
        return self.components_PD is None or self.num_clusters <= self.components_PD.shape[0]

    @cached_property
    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``A`` and ``b`` with ``||z - c_k||^2 = ||z||^2 + b_k - 2 (A v)_k`` (float32).

        ``v`` is the input itself where the router is folded, else ``z``, the projected input.
        """
        centroids = self.centroids_KP.double()
        offset_K = centroids.square().sum(dim=1)
        if self.is_folded:
            mean = self.mean_D.double()
            if self.components_PD is not None:
                centroids = centroids @ self.components_PD.double()
            offset_K += 2 * (centroids @ mean)
        return centroids.float(), offset_K.float()


def in_columns(X: torch.Tensor, columns_D: torch.Tensor | None) -> torch.Tensor:
    """``X [..., D]`` with its features in the order of ``Router.columns_D``, whatever they are.

    Inputs, rows of a weight, rows of a Hessian: itself where the order is None.
    """
    return X if columns_D is None else X.index_select(-1, columns_D)


@dataclass(frozen=True)
class HessianSum:
    """``sum x x^T`` over tokens, with their count; merged by addition, never averaged."""

    sum_DD: torch.Tensor
    num_tokens: int
    sum_D: torch.Tensor | None = None
    """``sum x``, float64; None where nobody needs it."""
    cross_OD: torch.Tensor | None = None
    """``sum r x^T``, where ``r`` is what the dense linear's outputs for ``x`` lack, see
    ``work.passes.captured_inputs``."""
    residual_O: torch.Tensor | None = None
    """``sum r``, float64, where there are residuals."""
    residual_energy: float = 0.0
    """``sum |r|^2``."""


@dataclass(frozen=True)
class NllSum:
    """Summed negative log-likelihood (nats) over scored tokens."""

    total: float
    num_tokens: int

    def __add__(self, other: NllSum) -> NllSum:
        return NllSum(self.total + other.total, self.num_tokens + other.num_tokens)

    @property
    def perplexity(self) -> float:
        """Token-level perplexity, ``exp(total / num_tokens)``."""
        if self.num_tokens == 0:
            raise ValueError("perplexity of no tokens: give at least one evaluation window")
        return math.exp(self.total / self.num_tokens)
