"""Masks: which weights are removed, by their saliencies or scores, in exact numbers.

Shapes: K experts, B columns of a block, M columns of a group of N:M, D input and O output features.
The sweep's weights are held transposed (input columns first) because it walks columns; scores of a
whole matrix are ``[O, D]``.
"""

from __future__ import annotations

import numpy as np
import torch

from sparse_expansion.algorithms.kernels import decide, threads
from sparse_expansion.algorithms.selection import smallest_mask
from sparse_expansion.config import SparsityPattern

RANKED_COLUMNS = 8
"""Columns of a group up to which every pair is compared."""


def saliency(W_KBO: torch.Tensor, diagonal_KB: torch.Tensor) -> torch.Tensor:
    """``w^2 / U_jj^2``: the loss of removing each weight (arXiv 2301.00774, equation 3)."""
    return (W_KBO / diagonal_KB.unsqueeze(-1)).square_()


def unstructured_mask(saliency_KBO: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """True at the ``num_pruned`` smallest saliencies of each expert's block: an exact count.

    Equal saliencies are removed in index order, so that the count holds with ties too.

    Raises:
        ValueError: ``num_pruned`` is negative or above the block's size.
    """
    return smallest_mask(saliency_KBO.flatten(1), num_pruned).view(saliency_KBO.shape)


def smallest(V_KDO: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """True at the ``num_pruned`` smallest ``|v|`` of every matrix; ties go by index."""
    if V_KDO.is_cuda or num_pruned == 0:
        return unstructured_mask(V_KDO.abs(), num_pruned)
    mask_KDO = torch.empty_like(V_KDO, dtype=torch.bool)
    smallest_compiled(V_KDO, torch.ones(V_KDO.shape[:2]), num_pruned, mask_KDO)
    return mask_KDO


def smallest_compiled(
    W_KBO: torch.Tensor, diagonal_KB: torch.Tensor, num_pruned: int, mask_KBO: torch.Tensor
) -> None:
    """Fill the mask as ``unstructured_mask`` of the saliencies does, on a CPU."""
    W, diagonal = W_KBO.numpy(), diagonal_KB.contiguous().numpy()
    mask = mask_KBO.numpy().view(np.uint8)

    def work(first: int, last: int) -> None:
        for k in range(first, last):
            decide.prune_block(W[k], diagonal[k], num_pruned, mask[k])

    threads.split(W.shape[0], 1, work, least=1)


def n_m_mask(saliency_KMO: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """True at the ``num_pruned`` smallest of M consecutive columns, for each row and expert.

    Equal saliencies are removed in index order.

    Args:
        saliency_KMO: saliencies of one group of M columns (columns in dimension 1).
        num_pruned: N of N:M.
    """
    # A sort of millions of groups of four takes ten times as long as comparing every pair.
    is_small = saliency_KMO.shape[1] <= RANKED_COLUMNS
    if is_small and saliency_KMO.is_cuda:
        return ranks(saliency_KMO) < num_pruned
    mask = torch.zeros_like(saliency_KMO, dtype=torch.bool)
    if not is_small:
        order = torch.argsort(saliency_KMO, dim=1, stable=True)
        return mask.scatter_(1, order[:, :num_pruned], True)
    saliency, out = saliency_KMO.numpy(), mask.numpy().view(np.uint8)
    threads.split(
        len(saliency),
        1,
        lambda first, last: decide.prune_groups(saliency[first:last], num_pruned, out[first:last]),
        least=max(1, threads.MIN_SLICE // max(1, saliency_KMO[:1].numel())),
    )
    return mask


def ranks(values_KMO: torch.Tensor) -> torch.Tensor:
    """How many of a group of M columns come before each (uint8): smaller, or equal and earlier."""
    found = torch.zeros_like(values_KMO, dtype=torch.uint8)
    for column in range(values_KMO.shape[1]):
        here_K1O = values_KMO[:, column : column + 1]
        found[:, :column] += here_K1O < values_KMO[:, :column]
        found[:, column + 1 :] += here_K1O <= values_KMO[:, column + 1 :]
    return found


def n_m_masks(values_DO: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """True at the N smallest of every M rows of a (transposed) matrix.

    Where M does not divide the rows, the last, shorter group loses its share, rounded down.

    Args:
        values_DO: what the weights are worth, input columns first.
        pattern: N:M.
    """
    assert pattern.group is not None and pattern.pruned is not None
    width, rows = values_DO.shape
    rest = width % pattern.group
    grouped = values_DO[: width - rest].view(-1, pattern.group, rows)
    mask = n_m_mask(grouped, pattern.pruned).view(-1, rows)
    if not rest:
        return mask
    last = n_m_mask(values_DO[None, -rest:], rest * pattern.pruned // pattern.group)
    return torch.cat([mask, last[0]])


def score_mask(
    score_OD: torch.Tensor, pattern: SparsityPattern, block_size: int, *, by_row: bool
) -> torch.Tensor:
    """True at the smallest scores, exactly as many as the sweep removes.

    N:M: the N smallest of every M columns of a row. Else the smallest of the whole matrix, or with
    ``by_row`` equally many of every row (arXiv 2306.11695, section 3); where the count does not
    divide, the rows whose next weight is worth least give one more. Equal scores go in index order.

    Args:
        score_OD: what every weight is worth.
        pattern: share and shape of the zeros.
        block_size: columns of the sweep's blocks, whose counts of zeros are rounded one by one.
        by_row: whether rows are pruned alike.
    """
    rows, width = score_OD.shape
    if pattern.group is not None:
        return n_m_masks(score_OD.T.contiguous(), pattern).T.contiguous()
    total = rows * width - pattern.num_kept(rows, width, block_size)
    if not by_row:
        return unstructured_mask(score_OD[None], total)[0]
    each, extra = divmod(total, rows)
    order_OD = torch.argsort(score_OD, dim=1, stable=True)
    mask = torch.zeros_like(score_OD, dtype=torch.bool)
    mask.scatter_(1, order_OD[:, :each], True)
    if extra:
        following = order_OD[:, each]
        worth = score_OD.gather(1, following[:, None])[:, 0]
        chosen = torch.argsort(worth, stable=True)[:extra]
        mask[chosen, following[chosen]] = True
    return mask
