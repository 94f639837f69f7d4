"""What a pruner gets, what it gives, and what the planning has to know of it.

Shapes: K experts, D input features, O output features. Weights are held transposed,
``[K, D, O]``, as the column sweep walks them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparse_expansion.algorithms.hessian import HessianFactor
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.config import AUTO_PRODUCTS, CompressionConfig


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One linear that becomes K experts: all that a pruner may use."""

    weight_OD: torch.Tensor
    """The dense weight, any floating dtype, columns in their original order; not to be modified."""
    target_KDO: torch.Tensor
    """What every expert's weight is to approximate, float32. For a pruner that updates weights:
    zero where no token used a feature, columns in the order of ``columns_KD``, and its own to
    overwrite if the solution gives ``lost_K``. For others: views of the dense weight."""
    H_KDD: torch.Tensor
    """Finite float32 Hessian sums, features in the order of ``columns_KD``; not to be modified."""
    factor: HessianFactor | None
    """Factors of the damped Hessians, where the pruner needs them or the target is compensated."""
    grid: AffineGrid | None
    """The rounding grid of the dense weight, None to prune only."""
    columns_KD: torch.Tensor | None
    """Original index of every column of the target, None when in order."""
    config: CompressionConfig
    """Sparsity, block size, damping, and the settings of single pruners."""
    products: str = AUTO_PRODUCTS
    """How large products are taken, see the module ``products``."""
    compiled: bool | None = None
    """Whether the sweep takes its compiled loops; None lets the device decide."""

    @property
    def num_pruned(self) -> int:
        """Exact number of zeros of an expert's weight."""
        rows, width = self.weight_OD.shape
        return rows * width - self.config.sparsity.num_kept(rows, width, self.config.block_size)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """K experts of one linear, with features in the order of the problem's target."""

    weight_KDO: torch.Tensor
    """float32; exactly zero where not kept."""
    kept_KDO: torch.Tensor
    """bool; True exactly ``rows x width - num_pruned`` times in every expert."""
    codes_KDO: torch.Tensor | None = None
    """uint8 codes of the grid; to be given if there is a grid."""
    lost_K: torch.Tensor | None = None
    """``tr(E H E^T)`` of every expert, where ``E`` is the target less the weight; None lets the
    caller find it by its product."""
    damping_fraction: float | None = None
    """Damping of a factorization that the pruner made by itself; None where it made none."""


def _holds_nothing(width: int, largest_weights: int) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """How a pruner works, and what that costs."""

    solve: Callable[[Problem], Solution]
    """Makes the experts of one linear."""
    updates_weights: bool
    """Whether it changes the weights that it keeps. If not, neither the order of columns nor what
    the inputs differ from the dense block's is of use to it, and it gets the dense weight."""
    needs_factor: Callable[[CompressionConfig], bool]
    """Whether it needs the Cholesky factors of the damped Hessians."""
    flops: Callable[[int, int, CompressionConfig], float]
    """Operations of one expert of one group beyond its Hessian sum, from the outputs of the group's
    linears together, their input width, and the settings."""
    extra_bytes: Callable[[int, int], int] = _holds_nothing
    """Bytes that it holds for every expert beyond Hessians, factors, weights and masks, from the
    input width and the number of weights of the group's largest linear."""
