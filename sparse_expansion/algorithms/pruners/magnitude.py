"""Magnitude: removes the smallest weights of a linear, whatever its inputs are."""

from __future__ import annotations

import torch

from sparse_expansion.algorithms.pruners.scores import pruner_by_score


def score(W_OD: torch.Tensor, H_DD: torch.Tensor) -> torch.Tensor:
    """``|w|``."""
    return W_OD.abs()


PRUNER = pruner_by_score(score, by_row=False)
