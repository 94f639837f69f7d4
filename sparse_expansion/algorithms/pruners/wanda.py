"""Wanda: removes the weights that are small times the norm of their input.

M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv
2306.11695).
"""

from __future__ import annotations

import torch

from sparse_expansion.algorithms.pruners.scores import pruner_by_score


def score(W_OD: torch.Tensor, H_DD: torch.Tensor) -> torch.Tensor:
    """``|w| ||x_j||`` (equation 1)."""
    return W_OD.abs() * H_DD.diagonal().sqrt()


# Rows lose equally many weights (section 3).
PRUNER = pruner_by_score(score, by_row=True)
