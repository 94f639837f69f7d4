"""What pruners have in common that score every weight by itself and leave the kept ones alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparse_expansion.algorithms.masks import score_mask
from sparse_expansion.algorithms.pruners.base import Problem, Pruner, Solution
from sparse_expansion.config import CompressionConfig


def pruner_by_score(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *, by_row: bool
) -> Pruner:
    """A pruner that removes the weights with the smallest scores, in exact numbers.

    Args:
        score: what every weight is worth, ``[O, D]``, from the dense weight ``[O, D]`` (float32)
            and the expert's Hessian sum ``[D, D]``, which holds the squared norms of the inputs on
            its diagonal.
        by_row: whether every row loses equally many weights; else rows may differ.
    """

    def solve(problem: Problem) -> Solution:
        config, weight_OD = problem.config, problem.weight_OD.float()
        kept_KOD = torch.stack(
            [
                ~score_mask(
                    score(weight_OD, H_DD), config.sparsity, config.block_size, by_row=by_row
                )
                for H_DD in problem.H_KDD
            ]
        )
        return Solution(weight_KDO=(weight_OD * kept_KOD).mT, kept_KDO=kept_KOD.mT)

    return Pruner(
        solve=solve, updates_weights=False, needs_factor=_needs_no_factor, flops=_error_flops
    )


def _needs_no_factor(config: CompressionConfig) -> bool:
    return False


def _error_flops(rows: int, width: int, config: CompressionConfig) -> float:
    """Finding what is lost, a product with the Hessian, takes more than all scores and masks."""
    return 2.0 * rows * width**2
