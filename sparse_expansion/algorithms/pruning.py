"""Saliency and masks: which weights the sweep removes.

Shapes: K experts, B columns of a block, O output features. Weights are held transposed
(input columns first) because the sweep walks columns.
"""

from __future__ import annotations

import torch


def saliency(W_KBO: torch.Tensor, diagonal_KB: torch.Tensor) -> torch.Tensor:
    """``w^2 / U_jj^2``: the loss of removing each weight (arXiv 2301.00774, equation 3)."""
    return (W_KBO / diagonal_KB.unsqueeze(-1)).square_()


def unstructured_mask(saliency_KBO: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """True at the ``num_pruned`` smallest saliencies of each expert's block: an exact count.

    Equal saliencies are removed in index order, so that the count holds with ties too.

    Raises:
        ValueError: ``num_pruned`` is negative or above the block's size.
    """
    num_experts = saliency_KBO.shape[0]
    flat = saliency_KBO.reshape(num_experts, -1)
    numel = flat.shape[1]
    if not 0 <= num_pruned <= numel:
        raise ValueError(f"num_pruned {num_pruned} is outside 0 to {numel}")
    if num_pruned == 0:
        return torch.zeros_like(saliency_KBO, dtype=torch.bool)
    if num_pruned == numel:
        return torch.ones_like(saliency_KBO, dtype=torch.bool)
    threshold = torch.kthvalue(flat, num_pruned, dim=1, keepdim=True).values
    mask = flat < threshold
    missing = num_pruned - mask.sum(dim=1)
    ties = flat == threshold
    for k in torch.nonzero(ties.sum(dim=1) != missing).flatten().tolist():
        extra = torch.nonzero(ties[k]).flatten()[int(missing[k]) :]
        ties[k, extra] = False
    return (mask | ties).reshape(saliency_KBO.shape)


def n_m_mask(saliency_KMO: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """True at the ``num_pruned`` smallest of M consecutive columns, for each row and expert.

    Args:
        saliency_KMO: saliencies of one group of M columns (columns in dimension 1).
        num_pruned: N of N:M.
    """
    order = torch.argsort(saliency_KMO, dim=1, stable=True)
    mask = torch.zeros_like(saliency_KMO, dtype=torch.bool)
    return mask.scatter_(1, order[:, :num_pruned], True)
